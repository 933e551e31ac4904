"""One row of a benchmark's results: what was measured, on what, with which settings, and every sample.

Names and meanings are those of llama-bench wherever it has the field. docs/bench.md describes each of them.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

from .bench_plan import Contender, Test, cache_name
from .machine import Machine, Software


@dataclass(frozen=True)
class Setting:
    """The context that all contenders of a row share."""

    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    model_n_ctx_train: int
    text: str
    n_ctx: int
    n_batch: int
    n_ubatch: int
    type_k: str
    type_v: str
    swa_full: bool
    rope: dict[str, Any]
    n_gpu_layers: int
    split_mode: str
    main_gpu: int
    tensor_split: list[float] | None


@dataclass(frozen=True)
class Timing:
    """The samples of one contender, and what they come to."""

    avg_ns: int
    stddev_ns: int
    avg_ts: float
    stddev_ts: float
    samples_ns: list[int]
    samples_ts: list[float]
    avg_ms: float
    stddev_ms: float
    median_ms: float
    min_ms: float
    max_ms: float
    samples_ms: list[float]


@dataclass(frozen=True)
class Speedup:
    """Stock's time over the contender's, paired by repetition; None where stock was not measured."""

    x_stock: float | None
    x_stock_min: float | None
    x_stock_max: float | None


@dataclass(frozen=True)
class Paths:
    """Who computed attention during the samples, and what it read; None where stock computed all."""

    attention: dict[str, int]
    reasons: dict[str, dict[str, int]]
    keys_attended_share: float | None
    bytes_read_share: float | None
    delta_mean: float | None
    delta_max: float | None


@dataclass(frozen=True)
class Distance:
    """How far next-token distributions are from stock's on an F16 cache; None without --quality."""

    quality_steps: int | None = None
    kl_mean: float | None = None
    kl_p95: float | None = None
    kl_max: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class Record:
    """A row, in parts; ``flat`` is what is written."""

    contender: Contender
    test: Test
    n_depth: int
    n_threads: int
    test_time: str
    timing: Timing
    speedup: Speedup
    paths: Paths
    distance: Distance
    setting: Setting
    software: Software
    machine: Machine
    command: str

    @property
    def test_name(self) -> str:
        """Test and depth in llama-bench's words."""
        return f"{self.test.name} @ d{self.n_depth}" if self.n_depth else self.test.name

    @property
    def cache(self) -> str:
        """The types of keys and values."""
        return cache_name(self.setting.type_k, self.setting.type_v)

    def flat(self) -> dict[str, Any]:
        """All fields side by side."""
        config = self.contender.config
        return {
            "contender": self.contender.name,
            "epsilon": config.epsilon if config.enabled else None,
            "test": self.test_name,
            "n_prompt": self.test.n_prompt,
            "n_gen": self.test.n_gen,
            "n_depth": self.n_depth,
            "n_threads": self.n_threads,
            "test_time": self.test_time,
            **vars(self.timing),
            **vars(self.speedup),
            **vars(self.paths),
            **vars(self.distance),
            "louver": asdict(config),
            **vars(self.setting),
            **vars(self.software),
            **vars(self.machine),
            "command": self.command,
        }


def timing(samples_ns: list[int], n_tokens: int) -> Timing:
    """The statistics of samples that evaluated ``n_tokens`` each."""
    samples_ts = [n_tokens * 1e9 / ns for ns in samples_ns]
    samples_ms = [ns / n_tokens / 1e6 for ns in samples_ns]
    return Timing(
        avg_ns=round(statistics.fmean(samples_ns)),
        stddev_ns=round(_deviation(samples_ns)),
        avg_ts=statistics.fmean(samples_ts),
        stddev_ts=_deviation(samples_ts),
        samples_ns=samples_ns,
        samples_ts=samples_ts,
        avg_ms=statistics.fmean(samples_ms),
        stddev_ms=_deviation(samples_ms),
        median_ms=statistics.median(samples_ms),
        min_ms=min(samples_ms),
        max_ms=max(samples_ms),
        samples_ms=samples_ms,
    )


def speedup(stock_ns: list[int] | None, samples_ns: list[int]) -> Speedup:
    """How much faster than stock; the samples of a repetition are neighbours in time, and so are compared."""
    if stock_ns is None:
        return Speedup(None, None, None)
    ratios = [stock / ns for stock, ns in zip(stock_ns, samples_ns, strict=True)]
    return Speedup(statistics.median(ratios), min(ratios), max(ratios))


def _deviation(samples: list[int] | list[float]) -> float:
    return statistics.stdev(samples) if len(samples) > 1 else 0.0
