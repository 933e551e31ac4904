"""Time per token against depth, as a picture."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from .bench_record import Record

_PARTS: tuple[Callable[[Record], str], ...] = (
    lambda record: record.setting.model_filename,
    lambda record: record.contender.label,
    lambda record: f"{record.cache} cache",
    lambda record: f"{record.n_threads} threads",
    lambda record: f"{record.test.n_gen} tokens",
)


def check_plot(file: str) -> None:
    """Raise, before anything is measured, for a picture that could not be drawn afterwards."""
    path = Path(file)
    if path.suffix != ".png":
        raise ValueError(f"--plot draws PNG: it needs a name that ends in .png, not {file!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--plot {file}: there is no folder {path.parent}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("--plot needs matplotlib: pip install 'louver-llama[plot]'") from None


def plot(records: Sequence[Record], file: str) -> None:
    """Draw the decode tests of ``records``; bars reach from the fastest sample to the slowest."""
    from matplotlib.figure import Figure

    decode = [record for record in records if record.test.n_gen]
    if not decode:
        return
    # What all lines have in common stands in the title, the rest beside each line.
    common = {part for part in _PARTS if len({part(record) for record in decode}) == 1}
    lines = defaultdict(list)
    for record in decode:
        names = (part(record) for part in _PARTS if part not in common or part is _PARTS[1])
        lines[", ".join(names)].append(record)

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, points in lines.items():
        times = [point.timing for point in points]
        axes.errorbar(
            [point.n_depth for point in points],
            [time.avg_ms for time in times],
            yerr=(
                [time.avg_ms - time.min_ms for time in times],
                [time.max_ms - time.avg_ms for time in times],
            ),
            label=name,
            marker="o",
            markersize=4,
            capsize=3,
        )
    shared = [part(decode[0]) for part in _PARTS if part in common and part is not _PARTS[1]]
    axes.set_title(f"{', '.join(shared)}\n{decode[0].machine.cpu_info}, {decode[0].software.isa}", fontsize=9)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("ms per token")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, format="png")
