"""Louver's settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

MAX_CELLS = 2**31 - 1


@dataclass(frozen=True)
class LouverConfig:
    """How Louver attends. To change it: ``llm.louver = dataclasses.replace(llm.louver, epsilon=0.1)``.

    epsilon: bound on the softmax mass dropped per head and step, in [0, 1); 0 is dense attention.
    min_context: visible cells below which all of them are attended, by our own dense kernel.
    min_context_gpu: the same for layers on a GPU, where it is stock's kernel that attends: the index pays later
        there. It is compared with the cells in use, which llama.cpp rounds up to a multiple of 256.
    sinks: how many of the first cells are always attended.
    recent: how many of the newest cells are always attended.
    guarantee: "certified" proves the bound for every head and step; "estimated" aims at it without proof.
    compensate: add the dropped keys back as approximate weight times their block's mean value.
    enabled: False leaves all attention to stock llama.cpp.
    check: brute force beside every step, counted in ``Llama.louver_stats()["check"]``. Slow.

    Raises ValueError for a value out of range, TypeError for one of the wrong type; both name the parameter.
    """

    epsilon: float = 0.05
    min_context: int = 1024
    min_context_gpu: int = 32768
    sinks: int = 4
    recent: int = 64
    guarantee: Literal["certified", "estimated"] = "certified"
    compensate: bool = True
    enabled: bool = True
    check: bool = False

    def __post_init__(self) -> None:
        _check("epsilon", self.epsilon, Real, "a number in [0, 1)", lambda epsilon: 0 <= epsilon < 1)
        for name in ("min_context", "min_context_gpu", "sinks", "recent"):
            wanted = f"an integer in [0, {MAX_CELLS}]"
            _check(name, getattr(self, name), Integral, wanted, lambda cells: 0 <= cells <= MAX_CELLS)
        wanted = '"certified" or "estimated"'
        _check("guarantee", self.guarantee, str, wanted, lambda value: value in ("certified", "estimated"))
        for name in ("compensate", "enabled", "check"):
            _check(name, getattr(self, name), bool, "True or False", lambda _: True)


def _check(name: str, value: Any, kind: type, wanted: str, accepts: Callable[[Any], bool]) -> None:
    # A bool is an Integral to Python, and a mistake where a number is wanted.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be {wanted}, not {value!r}")
    if not accepts(value):
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
