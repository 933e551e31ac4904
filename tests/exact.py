"""Exact references for the index's tests: each decision as in real arithmetic on the stored numbers.

The product of two float32 is exact in float64, and ``math.fsum`` rounds an exact sum once: its sign is the sum's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from louver_llama import Index, Matches

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
KINDS = ("grid", "ball")
METHODS = {"grid": ("sum",), "ball": ("sum", "sweep")}  # that find every match

# Every way to build an index, with small groups and merges so that little data meets all of the code.
OPTIONS = [{"kind": "grid"}] + [
    {"kind": "ball", "grouping": grouping, "enclosure": enclosure, "merge_at": 8}
    for grouping in ("tree", "kmeans")
    for enclosure in ("ball", "box")
]

Double = NDArray[np.float64]
Ids = NDArray[np.int64]


def name_of(options: dict[str, object]) -> str:
    """An id for pytest."""
    return "-".join(str(options[key]) for key in ("kind", "grouping", "enclosure") if key in options)


def stored(x: ArrayLike, dtype: str) -> NDArray:
    """What an array of that dtype holds."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(x).astype(DTYPES[dtype])


def f64(x: ArrayLike) -> Double:
    """Exact for all dtypes of keys."""
    return np.asarray(x).astype(np.float64)


def is_finite(keys: NDArray) -> NDArray[np.bool_]:
    """Of each key (n, dim): no NaN, no infinity."""
    return np.isfinite(f64(keys)).all(axis=1)


def scores(query: NDArray, keys: NDArray) -> Double:
    """q.k of each key (n, dim), rounded once; NaN for a key that is not finite."""
    finite = is_finite(keys)
    found = np.full(len(keys), math.nan)
    found[finite] = [math.fsum(row) for row in (f64(query) * f64(keys[finite])).tolist()]
    return found


def magnitudes(query: NDArray, keys: NDArray) -> Double:
    """The sum of |q_i k_i| of each finite key."""
    with np.errstate(invalid="ignore"):
        return np.abs(f64(query) * f64(keys)).sum(axis=1)


def reaches(query: NDArray, keys: NDArray, tau: float) -> NDArray[np.bool_]:
    """Whether q.k >= tau, for each key (n, dim); True for a key that is not finite."""
    finite = is_finite(keys)
    reached = ~finite
    if math.isinf(tau):
        return reached if tau > 0 else np.ones(len(keys), bool)
    terms = f64(query) * f64(keys[finite])
    terms = np.column_stack([terms, np.full(len(terms), -tau)])
    sums = terms.sum(axis=1)
    decided = sums > 0
    unsure = np.abs(sums) <= np.abs(terms).sum(axis=1) * (terms.shape[1] * 2.0**-52)
    for i in np.flatnonzero(unsure):
        decided[i] = math.fsum(terms[i].tolist()) >= 0
    reached[finite] = decided
    return reached


def heads(keys: NDArray) -> NDArray:
    """(n_head_kv, n, dim) of keys in either form."""
    return keys if keys.ndim == 3 else keys[np.newaxis]


def subspaces(dim: int, n_subspaces: int) -> list[slice]:
    """The channels of each subspace."""
    ends = [s * dim // n_subspaces for s in range(n_subspaces + 1)]
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def matching(
    keys: NDArray,
    queries: NDArray,
    tau: ArrayLike,
    live: NDArray[np.bool_] | None = None,
    subspace_tau: Double | None = None,
) -> list[Ids]:
    """The ids that a search has to find, for each of the queries (n_query, dim)."""
    keys = heads(keys)
    live = np.ones(keys.shape[1], bool) if live is None else live
    positions = np.flatnonzero(live)
    n_gqa = max(1, len(queries) // len(keys))
    found = []
    for i, (query, threshold) in enumerate(
        zip(queries, np.broadcast_to(tau, len(queries)).tolist(), strict=True)
    ):
        mine = keys[i // n_gqa][positions]
        reached = reaches(query, mine, threshold)
        if subspace_tau is not None:
            finite = is_finite(mine)
            for part, least in zip(
                subspaces(keys.shape[2], subspace_tau.shape[1]), subspace_tau[i], strict=True
            ):
                reached &= reaches(query[part], mine[:, part], float(least)) | ~finite
        found.append(positions[reached])
    return found


def check(
    matches: Matches,
    keys: NDArray,
    queries: NDArray,
    tau: ArrayLike,
    live: NDArray[np.bool_] | None = None,
    subspace_tau: Double | None = None,
) -> None:
    """That a search found the matching keys and no others, in order, with the scores that it promises."""
    queries = np.atleast_2d(queries).reshape(-1, queries.shape[-1])
    wanted = matching(keys, queries, tau, live, subspace_tau)
    assert matches.offsets.dtype == matches.ids.dtype == np.int64
    assert matches.scores.dtype == np.float64
    assert matches.offsets.tolist() == np.cumsum([0, *map(len, wanted)]).tolist()
    np.testing.assert_array_equal(matches.ids, np.concatenate([*wanted, np.empty(0, np.int64)]))
    check_scores(matches, keys, queries, tau)


def check_scores(matches: Sequence, keys: NDArray, queries: NDArray, tau: ArrayLike) -> None:
    """The scores of what was found: as close as promised, on tau's side, not finite where the key is not."""
    n_gqa = max(1, len(queries) // len(heads(keys)))
    for i, threshold in enumerate(np.broadcast_to(tau, len(queries)).tolist()):
        found = matches[i]
        mine = heads(keys)[i // n_gqa][found.ids]
        finite = is_finite(mine)
        assert not np.isfinite(found.scores[~finite]).any()
        off = np.abs(found.scores - scores(queries[i], mine))[finite]
        assert (off <= mine.shape[1] * 2.0**-53 * magnitudes(queries[i], mine)[finite]).all()
        assert (found.scores[finite] >= threshold).all()


def softmax(scaled: Double) -> NDArray[np.longdouble]:
    """Of one query's finite scores."""
    weight = np.exp(scaled.astype(np.longdouble) - scaled.max())
    return weight / weight.sum()


def dropped_mass(query: NDArray, keys: NDArray, live: NDArray[np.bool_], kept: Ids, scale: float) -> float:
    """The share of the softmax mass of the live keys (n, dim) that is not among ``kept``; all keys are finite."""
    share = np.zeros(len(keys), np.longdouble)
    share[live] = softmax(scores(query, keys[live]) * scale)
    share[kept] = 0
    return float(share.sum())


def dense(queries: NDArray, keys: NDArray, values: NDArray, live: NDArray[np.bool_], scale: float) -> Double:
    """Attention over the live keys in float64: (n_query, value_dim)."""
    keys, values = f64(heads(keys))[:, live], f64(heads(values))[:, live]
    n_gqa = max(1, len(queries) // len(keys))
    out = []
    with np.errstate(invalid="ignore"):
        for i, query in enumerate(f64(queries)):
            scaled = (keys[i // n_gqa] * query).sum(axis=1) * scale
            weight = np.exp(scaled - scaled.max())
            out.append((weight[:, None] * values[i // n_gqa]).sum(axis=0) / weight.sum())
    return np.array(out).reshape(len(queries), values.shape[2])


def state_of(index: Index) -> tuple[object, ...]:
    """What must not change when a call raises: positions, their keys, and what a search finds."""
    n, dim = index.n_positions, index.dim
    everything = index.search(np.zeros((index.n_head_kv, dim), np.float32), -math.inf)
    some = index.search(np.ones((index.n_head_kv, dim), np.float32), 0.0)
    return (
        n,
        len(index),
        everything.ids.tolist(),
        some.ids.tolist(),
        some.scores.tobytes(),
        b"".join(index.key(i).tobytes() for i in range(n)),
    )


def normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.normal(size=shape).astype(np.float32)


def search_and_check(index: Index, keys: NDArray, queries: NDArray, **settings: NDArray[np.bool_]) -> None:
    """At thresholds that a tenth and a half of the keys reach, by every method."""
    for share in (0.1, 0.5):
        tau = np.array([threshold(query, keys, share) for query in queries])
        for method in METHODS[index.kind]:
            check(index.search(queries, tau, method=method), keys, queries, tau, **settings)


def threshold(query: NDArray, keys: NDArray, share: float) -> float:
    found = scores(query, keys.reshape(-1, keys.shape[-1]))
    return float(np.quantile(found, 1 - share)) if len(found) else 0.0
