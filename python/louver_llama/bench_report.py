"""The results of ``louver-llama bench`` on stdout: a Markdown table, CSV, JSON or JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from typing import TextIO

from rich import box
from rich.console import Console
from rich.table import Column, Table

from .bench_record import Record

_WIDE = 10_000  # no line of a Markdown table may be folded


class Report:
    """Takes records as they come; JSON lines are written at once, the other formats by ``close``."""

    def __init__(self, output: str, stream: TextIO) -> None:
        self.records: list[Record] = []
        self._output = output
        self._stream = stream

    def add(self, record: Record) -> None:
        """Take one more row."""
        self.records.append(record)
        if self._output == "jsonl":
            print(json.dumps(record.flat()), file=self._stream, flush=True)

    def close(self) -> None:
        """Write what there is."""
        if self._output == "json":
            json.dump([record.flat() for record in self.records], self._stream, indent=2)
            print(file=self._stream)
        elif self.records and self._output == "csv":
            _write_csv(self.records, self._stream)
        elif self.records and self._output == "md":
            _write_markdown(self.records, self._stream)
        self._stream.flush()


def _write_csv(records: Sequence[Record], stream: TextIO) -> None:
    rows = [
        {
            name: json.dumps(value) if isinstance(value, (dict, list)) else value
            for name, value in record.flat().items()
        }
        for record in records
    ]
    writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def _write_markdown(records: Sequence[Record], stream: TextIO) -> None:
    console = Console(file=stream, width=_WIDE, highlight=False, markup=False, emoji=False, no_color=True)
    first = records[0]
    console.print(
        f"`{first.command}`\n\n{first.machine}; {first.software}; n_gpu_layers {first.setting.n_gpu_layers}\n"
    )
    with_quality = any(record.distance.quality_steps for record in records)
    columns = ["model", "cache", "threads", "test", "attention", "ms/token", "t/s", "x stock", "keys"]
    columns += ["KL", "KL 95 %", "top-1"] if with_quality else []
    table = Table(*(Column(name, no_wrap=True) for name in columns), box=box.MARKDOWN)
    footnotes: dict[str, int] = {}
    for record in records:
        table.add_row(*_cells(record, footnotes)[: len(columns)])
    with console.capture() as capture:
        console.print(table)
    console.print(capture.get().strip())  # without the empty lines where the edges would be
    for text, number in footnotes.items():
        console.print(f"\n({number}) {text}")


def _cells(record: Record, footnotes: dict[str, int]) -> list[str]:
    timing, speedup, distance = record.timing, record.speedup, record.distance
    label = record.contender.label
    if text := _other_paths(record):
        label += f" ({footnotes.setdefault(text, len(footnotes) + 1)})"
    return [
        f"{record.setting.model_filename}",
        record.cache,
        f"{record.n_threads}",
        record.test_name,
        label,
        f"{timing.avg_ms:.2f} ± {timing.stddev_ms:.2f}",
        f"{timing.avg_ts:.1f}",
        ""
        if speedup.x_stock is None
        else f"{speedup.x_stock:.2f} ({speedup.x_stock_min:.2f} to {speedup.x_stock_max:.2f})",
        _share(record.paths.keys_attended_share),
        "" if distance.kl_mean is None else f"{distance.kl_mean:.5f}",
        "" if distance.kl_p95 is None else f"{distance.kl_p95:.5f}",
        _share(distance.top1_agreement),
    ]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _other_paths(record: Record) -> str:
    """Says where attention was not computed by what the row is named after; "" where it was."""
    total = sum(record.paths.attention.values())
    parts = []
    for path, n in record.paths.attention.items():
        if path != record.contender.path:
            reasons = ", ".join(record.paths.reasons.get(path, {})) or "no reason counted"
            parts.append(f"{path} computed {n / total:.1%} of the attention ({reasons})")
    return "; ".join(parts)
