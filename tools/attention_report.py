"""What tools/attention_bench.py measured, and how it is shown."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Column, Table

from louver_llama.machine import this_machine, this_software

PHASES = ("begin", "scan", "select", "attend", "combine", "wait")
_WIDE = 10_000  # no line of a Markdown table may be folded


@dataclass(frozen=True)
class Sample:
    """One step: microseconds, and bytes that had to be read."""

    step_us: float
    phases_us: dict[str, float]
    scan_bytes: int
    attend_bytes: int
    dense_bytes: int
    attended_share: float
    delta_mean: float
    delta_max: float


@dataclass(frozen=True)
class Result:
    """All samples of one number of threads and one epsilon; sample i was taken beside dense's sample i."""

    n_threads: int
    epsilon: float
    samples: list[Sample]
    times_dense: list[float]  # dense attention's time over this one's


@dataclass(frozen=True)
class Append:
    """What keeping the index up to date costs: a block is encoded when its 64 cells are complete."""

    block_us: float  # of one KV head, one thread
    cell_us: float  # the same for one of its cells
    step_us: float  # for all KV heads and layers, for one cell


@dataclass(frozen=True)
class Run:
    """Everything that was measured, with what it was measured on."""

    source: str
    n_layers: int
    n_cells: int
    caches: list[str]
    cache_bytes: int
    append: Append | None
    bandwidth: dict[int, list[float]]  # GB/s by number of threads
    results: list[Result]


def write_markdown(run: Run) -> None:
    """The figures for a person, on stdout."""
    console = Console(width=_WIDE, highlight=False, markup=False, emoji=False, no_color=True)
    console.print(f"{this_machine()}; {this_software()}\n")
    console.print(
        f"{run.source}; {run.n_layers} layers of {run.n_cells} cells, {', '.join(run.caches)}, "
        f"K and V {run.cache_bytes / 1e6:.1f} MB\n"
    )
    columns = ["threads", "epsilon", "phase", "us/step", "quartiles", "MB", "GB/s", "of memory's", "x dense"]
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=box.MARKDOWN)
    for result in run.results:
        memory = statistics.median(run.bandwidth[result.n_threads])
        for cells in rows(result, memory):
            table.add_row(f"{result.n_threads}", f"{result.epsilon:g}", *cells)
    with console.capture() as capture:
        console.print(table)
    console.print(capture.get().strip())  # without the empty lines where the edges would be
    console.print()
    for n_threads, values in run.bandwidth.items():
        console.print(
            f"memory, {n_threads} threads: {statistics.median(values):.1f} GB/s, {spread(values, 1)}"
        )
    for result in run.results:
        if result.epsilon > 0 and result.n_threads == run.results[0].n_threads:
            console.print(keys_line(result))
    if run.append is not None:
        console.print(
            f"append: {run.append.block_us:.1f} us to index a block of a KV head, "
            f"{run.append.cell_us:.2f} us a cell; "
            f"{run.append.step_us:.1f} us of a decode step, on one thread"
        )


def rows(result: Result, memory: float) -> Iterator[list[str]]:
    """Each phase, and all of them; `memory` in GB/s."""
    for name in PHASES:
        times = [one.phases_us[name] for one in result.samples]
        n_bytes = [getattr(one, f"{name}_bytes", 0) for one in result.samples]
        if any(times):
            yield [name, *figures(times, n_bytes, memory), ""]
    total = [one.step_us for one in result.samples]
    n_bytes = [one.scan_bytes + one.attend_bytes for one in result.samples]
    ratio = statistics.median(result.times_dense)
    yield [
        "total",
        *figures(total, n_bytes, memory),
        "" if result.epsilon == 0 else f"{ratio:.2f} ({spread(result.times_dense, 2)})",
    ]


def figures(times: Sequence[float], n_bytes: Sequence[int], memory: float) -> list[str]:
    """Time, spread, bytes, bandwidth and share of the memory's."""
    time = statistics.median(times)
    read = statistics.median(n_bytes)
    if not read:
        return [f"{time:.0f}", spread(times, 0), "", "", ""]
    speed = statistics.median(n / us / 1e3 for n, us in zip(n_bytes, times, strict=True))
    return [f"{time:.0f}", spread(times, 0), f"{read / 1e6:.1f}", f"{speed:.1f}", f"{speed / memory:.0%}"]


def spread(values: Sequence[float], digits: int) -> str:
    """The quartiles."""
    low, high = np.quantile(values, [0.25, 0.75])
    return f"{low:.{digits}f} to {high:.{digits}f}"


def keys_line(result: Result) -> str:
    """What was left out."""
    share = statistics.fmean(one.attended_share for one in result.samples)
    delta = statistics.fmean(one.delta_mean for one in result.samples)
    largest = max(one.delta_max for one in result.samples)
    return (
        f"epsilon {result.epsilon:g}: {share:.1%} of the keys attended; "
        f"delta {delta:.4f} on average, {largest:.4f} at most"
    )
