"""What a search and a selection return."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt


class Match(NamedTuple):
    """The keys that one query found: ``ids`` int64 (n,), rising, and ``scores`` float64 (n,), q.k of each."""

    ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]


class SearchStats(NamedTuple):
    """Work of one call, in (query, key) pairs."""

    n_bounded: int  # bounded through the index
    n_scored: int  # scored from the keys
    n_exact: int  # of these, too close to tau for float64: decided in exact arithmetic


@dataclass(frozen=True, eq=False)
class Matches(Sequence["Match"]):
    """The matches of all queries, in compressed rows; a sequence with one ``Match`` for each query.

    offsets: int64 (n_query + 1,); query i has ``ids[offsets[i]:offsets[i + 1]]``.
    ids: int64 (n,), positions, rising within a query.
    scores: float64 (n,): q.k, off by less than dim * 2**-53 of the sum of its terms' magnitudes, and on its side of tau.
    shape: of the queries, without their last dimension; () for a single query.
    """

    offsets: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float64]
    stats: SearchStats
    shape: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> Match: ...
    @overload
    def __getitem__(self, index: slice) -> list[Match]: ...
    def __getitem__(self, index: int | slice) -> Match | list[Match]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"query {index} of {len(self)}")
        row = slice(*self.offsets[index % len(self) :][:2])
        return Match(self.ids[row], self.scores[row])

    def __iter__(self) -> Iterator[Match]:
        return (self[i] for i in range(len(self)))

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How many keys each query found: int64 (n_query,)."""
        return np.diff(self.offsets)

    def __repr__(self) -> str:
        return f"Matches({len(self)} queries, {len(self.ids)} keys)"


@dataclass(frozen=True)
class Certificate:
    """What is proven of the selection of one query.

    tau: every live key with q.k >= tau was selected.
    n_keys: live keys. n_bounded, n_scored: bounded through the index, scored from the keys. n_selected: kept.
    bytes_read: of the index and of the keys.
    delta: the softmax mass that was not selected is at most this share of all.
    error_bound: with ``attention``, |output - dense output| is at most this (Euclidean norm), up to the rounding of
        the output to float32; otherwise None.
    dense: with ``attention``, whether a NaN or an infinity was met, so that all live keys were attended in plain arithmetic.
    """

    tau: float
    n_keys: int
    n_bounded: int
    n_scored: int
    n_selected: int
    bytes_read: int
    delta: float
    error_bound: float | None = None
    dense: bool = False


@dataclass(frozen=True, eq=False)
class Selection(Sequence["Match"]):
    """What an oracle kept: the keys of each query, and a certificate for each."""

    matches: Matches
    certificates: tuple[Certificate, ...]

    def __len__(self) -> int:
        return len(self.matches)

    @overload
    def __getitem__(self, index: int) -> Match: ...
    @overload
    def __getitem__(self, index: slice) -> list[Match]: ...
    def __getitem__(self, index: int | slice) -> Match | list[Match]:
        return self.matches[index]

    @property
    def tau(self) -> npt.NDArray[np.float64]:
        """The threshold of each query: float64 (n_query,)."""
        return np.array([certificate.tau for certificate in self.certificates])

    def __repr__(self) -> str:
        kept = sum(certificate.n_selected for certificate in self.certificates)
        return f"Selection({len(self)} queries, {kept} keys)"
