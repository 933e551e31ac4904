"""Where the time of a decode step's attention goes, phase by phase, without the rest of the model.

All layers of a step run in turn, each on keys and values of its own, as in a model; every repetition takes
the queries of another captured step. Epsilons, and a large buffer that is read for the bandwidth of memory,
take turns.

    python tools/capture.py -d 8192 -n 16 -o capture.npz
    python tools/attention_bench.py capture.npz -t 1,2 --epsilon 0,0.05,0.1

Phases, as medians over the repetitions of the mean over the threads, for all layers together:
begin (queries, references), scan (bounds of all scores, off the index), select (threshold, survivors),
attend (exact attention to the survivors, compensation), combine, wait (for other threads).
MB and GB/s count the index's planes for the scan, and the attended rows of K and V for attend and total.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from attention_report import PHASES, Append, Result, Run, Sample, write_markdown
from capture_file import Layer, encoded, load_layers, load_meta, random_layers
from louver_llama._libraries import core
from louver_llama.machine import this_machine, this_software

SERVED = ("f32", "f16", "bf16", "q8_0", "q4_0")
READ_BYTES = 512 << 20
BLOCK_CELLS = 64
SHAPE = ("n_layer", "n_head", "n_head_kv", "head_dim", "n_kv")


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = command_line()
    options = parser.parse_args()
    if (options.capture is None) == (options.random is None):
        parser.error("give a capture, or --random " + ",".join(SHAPE))
    if min(*options.threads, options.repetitions, options.repeat_layers) < 1:
        parser.error("threads, repetitions and --repeat-layers are at least 1")
    if not all(0 <= epsilon < 1 for epsilon in options.epsilon):
        parser.error("epsilon is in [0, 1)")
    try:
        run = measure(options)
    except (OSError, ValueError) as error:
        sys.exit(f"attention_bench.py: {error}")
    if options.output == "json":
        described = {"machine": asdict(this_machine()), "software": asdict(this_software()), **asdict(run)}
        json.dump(described, sys.stdout, indent=2)
        print()
    else:
        write_markdown(run)


def command_line() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("capture", nargs="?", type=Path, metavar="CAPTURE.npz", help="of tools/capture.py")
    parser.add_argument(
        "--random",
        metavar="SHAPE",
        type=shape,
        help=f"Gaussian data instead, {','.join(SHAPE)}: the phases' cost by shape. "
        "Random keys prune badly, so it says nothing of a model",
    )
    parser.add_argument(
        "-t",
        "--threads",
        type=numbers(int),
        default=sorted({1, len(os.sched_getaffinity(0))}),
        metavar="N,...",
        help="(default: 1, and all processors)",
    )
    parser.add_argument(
        "--epsilon",
        type=numbers(float),
        default=[0.0, 0.05, 0.1],
        metavar="N,...",
        help="(default: 0,0.05,0.1); 0, which is dense attention, is always measured",
    )
    parser.add_argument("-r", "--repetitions", type=int, default=20, metavar="N", help="(default: 20)")
    parser.add_argument("--depth", type=int, metavar="N", help="use only the first N cells")
    parser.add_argument("--cache", choices=SERVED, help="convert keys and values (default: as captured)")
    parser.add_argument(
        "--repeat-layers",
        type=int,
        default=1,
        metavar="N",
        help="lay out each layer N times in memory, where a capture would fit into the processor's cache",
    )
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md", help="(default: md)")
    return parser


def shape(text: str) -> list[int]:
    """The argument of --random."""
    values = [int(item) for item in text.split(",")]
    if len(values) != len(SHAPE) or min(values) < 1 or values[1] % values[2]:
        raise argparse.ArgumentTypeError(
            f"must be {','.join(SHAPE)}, with n_head a multiple of n_head_kv, not {text!r}"
        )
    return values


def numbers(kind: type) -> Any:
    """A comma list."""

    def values(text: str) -> list[Any]:
        try:
            return list(dict.fromkeys(kind(item) for item in text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers with commas between, not {text!r}") from None

    return values


def measure(options: argparse.Namespace) -> Run:
    """Everything, in turn."""
    if options.random is not None:
        source = "random, " + ", ".join(f"{name} {n}" for name, n in zip(SHAPE, options.random, strict=True))
        layout = Layout(random_layers(options.random), options)
    else:
        meta = load_meta(options.capture)
        source = f"{meta['model']}, captured at depth {meta['depth']}"
        layout = Layout(load_layers(options.capture), options)
    reader = core.testing.MemoryReader(READ_BYTES)
    append = layout.append()
    bandwidth: dict[int, list[float]] = {}
    results = []
    for n_threads in options.threads:
        samples, bandwidth[n_threads] = take_turns(layout, reader, n_threads, options)
        for epsilon, taken in samples.items():
            ratios = [d.step_us / one.step_us for d, one in zip(samples[0.0], taken, strict=True)]
            results.append(Result(n_threads, epsilon, taken, ratios))
    return Run(
        source=source,
        n_layers=len(layout.queries),
        n_cells=layout.n_cells,
        caches=sorted(layout.caches),
        cache_bytes=layout.cache_bytes,
        append=append,
        bandwidth=bandwidth,
        results=results,
    )


class Layout:
    """The layers in llama.cpp's layout, each --repeat-layers times."""

    def __init__(self, layers: Iterable[Layer], options: argparse.Namespace) -> None:
        self.bench = core.testing.AttentionBench()
        self.queries: list[np.ndarray] = []  # of each layer, (n_step, n_head, key_dim)
        self.caches: set[str] = set()
        self.cache_bytes = 0
        self.n_cells = 0
        self._n_head_kv = 0
        for layer in layers:
            if layer.reason in ("none", "cache_type"):
                self._add(layer, options)
            else:
                print(f"layer {layer.number} is left out: {layer.reason}", file=sys.stderr)
        if not self.queries:
            raise ValueError("the capture has no layer that Louver serves")

    def _add(self, layer: Layer, options: argparse.Namespace) -> None:
        captured = layer.visible.shape[1]
        n_cells = captured if options.depth is None else options.depth
        if not 1 <= n_cells <= captured:
            raise ValueError(f"--depth is {n_cells}, accepted are 1 to {captured}")
        types = [options.cache or kind for kind in (layer.type_k, layer.type_v)]
        if not set(types) <= set(SERVED):
            raise ValueError(
                f"the captured cache is {'/'.join(types)}: convert it, --cache {'|'.join(SERVED)}"
            )
        k = encoded(layer.k[:n_cells], layer.type_k, types[0])
        v = encoded(layer.v[:n_cells], layer.type_v, types[1])
        for _ in range(options.repeat_layers):
            self.bench.add_layer(
                k,
                v,
                # All steps see the cells of the first one: the later ones' own are the future to it.
                np.ascontiguousarray(layer.visible[0, :n_cells]),
                type_k=types[0],
                type_v=types[1],
                key_dim=layer.key_dim,
                value_dim=layer.value_dim,
                n_head=layer.n_head,
                n_head_kv=layer.n_head_kv,
                scale=layer.scale,
            )
            self.queries.append(layer.queries)
            self.cache_bytes += k.nbytes + v.nbytes
            self._n_head_kv += layer.n_head_kv
        self.caches.add("/".join(dict.fromkeys(types)))
        self.n_cells = max(self.n_cells, n_cells)

    def append(self) -> Append | None:
        """What indexing costs, with keys that the processor has not cached; None without a complete block."""
        blocks = [ns for layer in range(len(self.queries)) for ns in self.bench.append_ns(layer).tolist()]
        if not blocks:
            return None
        block_us = statistics.median(blocks) / 1e3
        return Append(block_us, block_us / BLOCK_CELLS, block_us / BLOCK_CELLS * self._n_head_kv)


def take_turns(
    layout: Layout, reader: Any, n_threads: int, options: argparse.Namespace
) -> tuple[dict[float, list[Sample]], list[float]]:
    """The samples of each epsilon, and memory's GB/s: one of each a turn, and another one first each time."""
    contenders = [*dict.fromkeys([0.0, *options.epsilon]), None]
    samples: dict[float, list[Sample]] = {epsilon: [] for epsilon in contenders if epsilon is not None}
    bandwidth = []
    console = Console(stderr=True, highlight=False)
    turns = range(-1, options.repetitions)  # the first one warms up, and is not counted
    label = f"{n_threads} threads"
    for turn in track(turns, label, console=console, transient=True, disable=not console.is_terminal):
        queries = [rows[turn % len(rows)] for rows in layout.queries]
        first = turn % len(contenders)
        for epsilon in contenders[first:] + contenders[:first]:
            if epsilon is None:
                bandwidth.append(reader.read(n_threads))
            else:
                found = layout.bench.step(queries, epsilon=epsilon, n_threads=n_threads)
                samples[epsilon].append(sample(found))
    return {epsilon: taken[1:] for epsilon, taken in samples.items()}, bandwidth[1:]


def sample(found: dict[str, Any]) -> Sample:
    """What one step gave."""
    return Sample(
        step_us=found["step_ns"] / 1e3,
        phases_us={name: float(found["phases_ns"][name].mean()) / 1e3 for name in PHASES},
        scan_bytes=found["scan_bytes"],
        attend_bytes=found["attend_bytes"],
        dense_bytes=found["dense_bytes"],
        attended_share=found["attended"] / found["visible"],
        delta_mean=float(found["delta"].mean()),
        delta_max=float(found["delta"].max()),
    )


if __name__ == "__main__":
    main()
