"""Each oracle's threshold against its definition, the sample behind it, and the truth of what they certify."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from exact import KINDS, Double, dropped_mass, reaches, scores
from louver_llama import Index, oracles

N, DIM = 300, 12
SCALE = DIM**-0.5
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def keys() -> np.ndarray:
    rng = np.random.default_rng(3)
    return (rng.normal(size=(N, DIM)) * rng.uniform(0.5, 2, (N, 1))).astype(np.float32)


@pytest.fixture
def queries() -> np.ndarray:
    return np.random.default_rng(4).normal(size=(5, DIM)).astype(np.float32)


def gap(found: Double) -> float:
    """The paper's: of the three widest gaps in the upper half, the highest; the score below it."""
    ranked = np.sort(found)[::-1]
    upper = ranked[: max(2, len(ranked) // 2)]
    gaps = upper[:-1] - upper[1:]
    widest = np.sort(np.argsort(-gaps, kind="stable")[:3])
    return float(upper[widest[0] + 1])


# With a sample of all keys the threshold is known.
DEFINITIONS: list[tuple[oracles.Oracle, Callable[[Double], float]]] = [
    (oracles.SampleMax(n_samples=N), lambda s: float(s.max())),
    (oracles.SampleMeanMax(n_samples=N), lambda s: float(s.max() + s.mean()) / 2),
    (oracles.SampleTopK(7, n_samples=N), lambda s: float(np.sort(s)[-7])),
    (oracles.SampleTopK(10 * N, n_samples=N), lambda s: float(s.min())),
    (oracles.SampleGap(n_samples=N), gap),
    (oracles.Budget(0.1, n_samples=N), lambda s: float(np.sort(s)[-N // 10])),
    (oracles.Budget(1.0, n_samples=N), lambda s: float(s.min())),
    (oracles.Budget(1e-9, n_samples=N), lambda s: float(s.max())),
    (oracles.TopK(9), lambda s: float(np.sort(s)[-9])),
    (oracles.TopK(N), lambda s: -math.inf),
    (oracles.TopK(N + 1), lambda s: -math.inf),
    (oracles.Fixed(1.5), lambda s: 1.5),
    (oracles.Fixed(-math.inf), lambda s: -math.inf),
]


@each_kind
@pytest.mark.parametrize(("oracle", "definition"), DEFINITIONS, ids=[str(d[0]) for d in DEFINITIONS])
def test_definitions(
    kind: Any,
    keys: np.ndarray,
    queries: np.ndarray,
    oracle: oracles.Oracle,
    definition: Callable[[Double], float],
) -> None:
    index = Index.build(keys, kind)
    chosen = index.select(queries, oracle)
    for query, match, certificate in zip(queries, chosen, chosen.certificates, strict=True):
        wanted = definition(scores(query, keys))
        assert certificate.tau == pytest.approx(wanted, rel=1e-12)
        np.testing.assert_array_equal(match.ids, np.flatnonzero(reaches(query, keys, certificate.tau)))
        assert certificate.n_selected == len(match.ids) and certificate.n_keys == N
        if isinstance(oracle, oracles.TopK):
            assert len(match.ids) == min(oracle.k, N)
    np.testing.assert_array_equal(chosen.tau, [certificate.tau for certificate in chosen.certificates])


@each_kind
@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.01, 0.05, 0.3, 0.9, 0.999])
def test_mass(kind: Any, keys: np.ndarray, queries: np.ndarray, epsilon: float) -> None:
    index = Index.build(keys, kind)
    index.remove([0, 10, 299])
    live = np.ones(N, bool)
    live[[0, 10, 299]] = False
    chosen = index.select(queries, oracles.Mass(epsilon))
    for query, match, certificate in zip(queries, chosen, chosen.certificates, strict=True):
        truth = dropped_mass(query, keys, live, match.ids, SCALE)
        assert truth <= certificate.delta * (1 + 1e-12) and certificate.delta <= epsilon
        missed = np.setdiff1d(np.flatnonzero(live & reaches(query, keys, certificate.tau)), match.ids)
        assert missed.size == 0
        assert (truth > 0) == (len(match.ids) < N - 3)


def test_mass_drops_what_it_may(keys: np.ndarray, queries: np.ndarray) -> None:
    """Not only safe: with epsilon 0.3 the grid keeps little more than the fewest keys that hold 70 % of the mass."""
    chosen = Index.build(np.tile(keys, (20, 1))).select(queries, oracles.Mass(0.3))
    for query, certificate in zip(queries, chosen.certificates, strict=True):
        weights = np.sort(np.exp(scores(query, keys) * SCALE))[::-1]
        fewest = np.searchsorted(np.cumsum(weights), 0.7 * weights.sum()) + 1
        assert certificate.n_selected <= 20 * fewest * 1.2 + 64


@each_kind
@pytest.mark.parametrize(
    "oracle",
    [oracles.Fixed(3.0), oracles.TopK(4), oracles.SampleMax(), oracles.SampleGap(), oracles.Budget(0.3)],
    ids=str,
)
def test_delta_bounds_the_truth(
    kind: Any, keys: np.ndarray, queries: np.ndarray, oracle: oracles.Oracle
) -> None:
    chosen = Index.build(keys, kind).select(queries, oracle)
    for query, match, certificate in zip(queries, chosen, chosen.certificates, strict=True):
        truth = dropped_mass(query, keys, np.ones(N, bool), match.ids, SCALE)
        assert truth <= certificate.delta * (1 + 1e-12)
        assert certificate.delta <= truth * 1.6 + 0.05 or kind == "ball"
        if len(match.ids) > 1:  # the negative control: with one key less it must not hold
            short = dropped_mass(query, keys, np.ones(N, bool), match.ids[1:], SCALE)
            assert short > truth


def sampled(index: Index, n_samples: int, seed: int) -> list[int]:
    """The positions in the sample: with key i = (i, 1), the query (1, 0) scores the position."""
    found = []
    for k in range(1, n_samples + 1):
        tau = index.select(
            np.array([1, 0], np.float32), oracles.SampleTopK(k, n_samples=n_samples, seed=seed)
        ).tau[0]
        if found and tau == found[-1]:
            break
        found.append(int(tau))
    return found


def numbered(first: int, count: int) -> np.ndarray:
    return np.stack([np.arange(first, first + count), np.ones(count)], axis=1).astype(np.float32)


def test_the_sample_follows_the_index() -> None:
    index = Index.build(numbered(0, 100))
    first = sampled(index, 20, 1)
    assert len(set(first)) == 20 and first == sampled(index, 20, 1) != sampled(index, 20, 2)
    index.remove(first[:5])
    assert set(sampled(index, 20, 1)) == set(first[5:])
    index.append(numbered(100, 5))
    after = sampled(index, 20, 1)
    assert set(after) <= set(range(105)) - set(first[:5]) and len(after) >= 15
    index.remove([i for i in range(105) if i in index and i != 50])
    assert sampled(index, 20, 1) == [50]
    index.update([50], numbered(500, 1))
    assert sampled(index, 20, 1) == [500]
    index.remove([50])
    index.update([1, 2], numbered(1, 2))
    assert sorted(sampled(index, 20, 1)) == [1, 2]


def test_the_same_changes_give_the_same_sample() -> None:
    def changed() -> Index:
        index = Index.build(numbered(0, 50))
        sampled(index, 8, 3)
        for first in range(50, 400, 50):
            index.append(numbered(first, 50))
            index.remove([i for i in range(first - 50, first) if i % 3])
        return index

    assert sampled(changed(), 8, 3) == sampled(changed(), 8, 3)


def test_the_sample_is_uniform() -> None:
    """After appends and removals every live position is as likely: chi-square over 400 seeds."""
    counts = dict.fromkeys(range(60), 0)
    for seed in range(400):
        index = Index.build(numbered(0, 30))
        sampled(index, 6, seed)
        index.append(numbered(30, 30))
        index.remove(range(0, 60, 3))
        index.update([0, 3], numbered(0, 2) * np.float32(1) + np.array([[0, 0], [2, 0]], np.float32))
        for value in sampled(index, 6, seed):
            counts[value] += 1
    live = [i for i in range(60) if i % 3 or i in (0, 3)]
    assert all(counts[i] == 0 for i in counts if i not in live)
    mean = sum(counts.values()) / len(live)
    chi_square = sum((counts[i] - mean) ** 2 / mean for i in live)
    assert chi_square < 80, chi_square  # 41 degrees of freedom: more has a chance of 1 in 4,000


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: oracles.Mass(1.0), ValueError, "epsilon must be a number in [0, 1), not 1.0"),
        (lambda: oracles.Mass(-0.1), ValueError, "epsilon"),
        (lambda: oracles.Mass(math.nan), ValueError, "epsilon"),
        (lambda: oracles.Mass("0.1"), TypeError, "epsilon"),
        (lambda: oracles.Mass(True), TypeError, "epsilon"),
        (lambda: oracles.Fixed(math.nan), ValueError, "tau"),
        (lambda: oracles.Fixed(10**400), ValueError, "tau"),
        (lambda: oracles.Fixed("1"), TypeError, "tau"),
        (lambda: oracles.TopK(0), ValueError, "k must be an integer in [1, 2**31), not 0"),
        (lambda: oracles.TopK(1.0), TypeError, "k"),
        (lambda: oracles.SampleTopK(0), ValueError, "k"),
        (lambda: oracles.SampleMax(n_samples=0), ValueError, "n_samples"),
        (lambda: oracles.SampleMax(n_samples=True), TypeError, "n_samples"),
        (lambda: oracles.SampleMax(seed=-1), ValueError, "seed"),
        (lambda: oracles.SampleMax(seed=0.5), TypeError, "seed"),
        (lambda: oracles.Budget(0.0), ValueError, "fraction must be a number in (0, 1], not 0.0"),
        (lambda: oracles.Budget(1.5), ValueError, "fraction"),
    ],
)
def test_parameters(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error) as raised:
        make()
    assert words in str(raised.value)
