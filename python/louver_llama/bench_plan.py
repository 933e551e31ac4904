"""What a benchmark is to measure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .cli_options import Offload
from .config import LouverConfig
from .machine import Machine, Software

_CELLS_STEP = 256
REFERENCE_CACHE = ("f16", "f16")


@dataclass(frozen=True)
class Contender:
    """One way to attend."""

    name: Literal["stock", "dense", "louver"]
    config: LouverConfig

    @property
    def label(self) -> str:
        """The name, with epsilon where it makes a difference."""
        return f"louver {self.config.epsilon:g}" if self.name == "louver" else self.name

    @property
    def path(self) -> str:
        """The path that should compute attention, of those in ``LouverStats.attention``."""
        return "dense" if self.config.enabled and self.config.epsilon == 0 else self.name


@dataclass(frozen=True)
class Test:
    """``n_prompt`` tokens in one batch, or ``n_gen`` tokens one by one."""

    n_prompt: int
    n_gen: int

    @property
    def name(self) -> str:
        """The test in llama-bench's words."""
        return f"tg{self.n_gen}" if self.n_gen else f"pp{self.n_prompt}"

    @property
    def n_tokens(self) -> int:
        """How many tokens a sample evaluates."""
        return self.n_prompt or self.n_gen


@dataclass(frozen=True)
class Text:
    """What a model reads, in its tokens."""

    model_path: str
    name: str
    tokens: list[int]
    n_ctx_train: int


@dataclass(frozen=True)
class Plan:
    """All that is to be measured; every combination is."""

    texts: list[Text]
    caches: list[tuple[str, str]]
    depths: list[int]
    n_threads: list[int]
    tests: list[Test]
    contenders: list[Contender]
    repetitions: int
    quality_steps: int | None
    n_batch: int
    n_ubatch: int
    swa_full: bool
    rope: dict[str, Any]
    offload: Offload
    state_folder: Path | None
    machine: Machine
    software: Software
    command: str

    @property
    def n_behind(self) -> int:
        """The most tokens that are evaluated behind a depth."""
        return max(self.quality_steps or 1, *(test.n_tokens for test in self.tests))

    @property
    def n_ctx(self) -> int:
        """Room for all, in llama.cpp's steps."""
        return -(-(self.depths[-1] + self.n_behind + 1) // _CELLS_STEP) * _CELLS_STEP

    @property
    def filled(self) -> list[tuple[str, str]]:
        """The caches in their order: F16 first where it is the measure of quality, asked for or not."""
        first = [REFERENCE_CACHE] if self.quality_steps else []
        return list(dict.fromkeys(first + self.caches))

    @property
    def n_stages(self) -> int:
        """How many parts the run has, for the progress."""
        n_fills = len(self.filled) * sum(depth > 0 for depth in self.depths)
        n_contenders = len(self.caches) * len(self.contenders)
        n_samples = n_contenders * len(self.tests) * self.repetitions
        n_passes = n_contenders + 1 if self.quality_steps else 0
        n_places = len(self.depths) * len(self.n_threads)
        return len(self.texts) * (n_fills + n_places * (n_samples + n_passes))


def cache_name(keys: str, values: str) -> str:
    """The types of keys and values; one where they are the same."""
    return keys if keys == values else f"{keys}/{values}"
