"""Threshold oracles: what chooses tau for a query.

The sampling ones score a reservoir of the index's live positions, which follows appends and removals; an index keeps
one for each ``n_samples`` and ``seed``. ``Fixed``, the samplers and ``TopK`` select exactly the keys with
``q.k >= tau``; ``Mass`` selects every key whose upper bound reaches its threshold. Sources: the sampling oracles
are those of arXiv 2605.06763, ``Mass`` is docs/guarantee.md, "The threshold".
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from numbers import Integral, Real
from typing import Any, ClassVar

from ._index import Oracle as _CoreOracle

__all__ = [
    "Budget",
    "Fixed",
    "Mass",
    "Oracle",
    "SampleGap",
    "SampleMax",
    "SampleMeanMax",
    "SampleTopK",
    "TopK",
]


@dataclass(frozen=True)
class Oracle:
    """The base of all oracles; raises TypeError or ValueError for a parameter out of range."""

    kind: ClassVar[str]

    def _to_core(self) -> _CoreOracle:
        return _CoreOracle(self.kind, **vars(self))


@dataclass(frozen=True)
class Fixed(Oracle):
    """``tau`` itself, in units of q.k; any number or infinity."""

    tau: float
    kind: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        _number(
            "tau", self.tau, "a float64 or an infinity", isinstance(self.tau, Real) and _is_float(self.tau)
        )


@dataclass(frozen=True)
class Mass(Oracle):
    """The largest threshold whose dropped softmax mass is provably at most ``epsilon``, in [0, 1); 0 keeps all."""

    epsilon: float = 0.05
    kind: ClassVar[str] = "mass"

    def __post_init__(self) -> None:
        _number(
            "epsilon",
            self.epsilon,
            "a number in [0, 1)",
            isinstance(self.epsilon, Real) and 0 <= self.epsilon < 1,
        )


@dataclass(frozen=True)
class TopK(Oracle):
    """The k-th largest score of all keys, found exactly; keys that tie with it within float64's rounding stay."""

    k: int
    kind: ClassVar[str] = "top_k"

    def __post_init__(self) -> None:
        _count("k", self.k)


@dataclass(frozen=True)
class _Sampling(Oracle):
    def __post_init__(self) -> None:
        for name in ("n_samples", "k"):
            if name in vars(self):
                _count(name, getattr(self, name))
        seed = vars(self)["seed"]
        if isinstance(seed, bool) or not isinstance(seed, Integral):
            raise TypeError(f"seed must be an integer in [0, 2**64), not {seed!r}")
        if not 0 <= int(seed) < 2**64:
            raise ValueError(f"seed must be an integer in [0, 2**64), not {seed!r}")


@dataclass(frozen=True)
class SampleMax(_Sampling):
    """The largest score of the sample."""

    n_samples: int = 256
    seed: int = 0
    kind: ClassVar[str] = "sample_max"


@dataclass(frozen=True)
class SampleMeanMax(_Sampling):
    """Halfway between the mean and the largest score of the sample."""

    n_samples: int = 256
    seed: int = 0
    kind: ClassVar[str] = "sample_mean_max"


@dataclass(frozen=True)
class SampleTopK(_Sampling):
    """The k-th largest score of the sample."""

    k: int = 16
    n_samples: int = 256
    seed: int = 0
    kind: ClassVar[str] = "sample_top_k"


@dataclass(frozen=True)
class SampleGap(_Sampling):
    """The score below the highest of the three widest gaps in the upper half of the sorted sample."""

    n_samples: int = 256
    seed: int = 0
    kind: ClassVar[str] = "sample_gap"


@dataclass(frozen=True)
class Budget(_Sampling):
    """The score that a ``fraction`` of the sample reaches, in (0, 1]: about that share of the keys is selected."""

    fraction: float = 0.1
    n_samples: int = 256
    seed: int = 0
    kind: ClassVar[str] = "budget"

    def __post_init__(self) -> None:
        super().__post_init__()
        accepted = isinstance(self.fraction, Real) and 0 < self.fraction <= 1
        _number("fraction", self.fraction, "a number in (0, 1]", accepted)


def _is_float(value: Any) -> bool:
    try:
        return not isnan(float(value)) and float(value) == value
    except OverflowError:
        return False


def _number(name: str, value: Any, wanted: str, accepted: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {wanted}, not {value!r}")
    if not accepted:
        raise ValueError(f"{name} must be {wanted}, not {value!r}")


def _count(name: str, value: Any) -> None:
    wanted = "an integer in [1, 2**31)"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be {wanted}, not {value!r}")
    if not 1 <= int(value) < 2**31:
        raise ValueError(f"{name} must be {wanted}, not {value!r}")
