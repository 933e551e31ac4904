"""The oracles: each threshold against its definition, the sample, and the certificate against the true mass."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from exact import DTYPES, KINDS, check, check_scores, dropped_mass, matching, normal, scores, stored
from louver_llama import Index, Selection, oracles
from louver_llama.oracles import (
    Budget,
    Fixed,
    Mass,
    Oracle,
    SampleGap,
    SampleMax,
    SampleMeanMax,
    SampleTopK,
    TopK,
)

EPSILONS = (0.0, 1e-6, 0.01, 0.05, 0.3, 0.9, 0.999)
EVERY: list[Oracle] = [
    Fixed(2.0),
    SampleMax(),
    SampleMeanMax(),
    SampleTopK(),
    SampleGap(),
    Budget(),
    TopK(9),
    Mass(),
]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(14)


def concentrated(rng: np.random.Generator, n: int, dim: int, n_head_kv: int = 1) -> NDArray[np.float32]:
    """Keys whose softmax has a few large weights."""
    keys = rng.normal(size=(n_head_kv, n, dim)) * np.exp(rng.normal(size=(n_head_kv, 1, dim)))
    return (keys + rng.normal(size=(n_head_kv, 1, dim)) * 2).astype(np.float32)


# Thresholds of a known sample


def gap(falling: NDArray) -> float:
    """The score below the highest of the three widest gaps in the upper half."""
    upper = falling[: min(len(falling), max(2, len(falling) // 2))]
    if len(upper) == 1:
        return float(upper[0])
    widest = np.argsort(-(upper[:-1] - upper[1:]), kind="stable")[:3]
    return float(upper[widest.min() + 1])


DEFINITIONS: list[tuple[Callable[[int], Oracle], Callable[[NDArray], float]]] = [
    (lambda n: SampleMax(n), lambda falling: falling[0]),
    (lambda n: SampleMeanMax(n), lambda falling: (falling.mean() + falling[0]) / 2),
    (lambda n: SampleTopK(3, n), lambda falling: falling[min(3, len(falling)) - 1]),
    (lambda n: SampleTopK(2**31 - 1, n), lambda falling: falling[-1]),
    (lambda n: SampleGap(n), gap),
    (lambda n: Budget(0.25, n), lambda falling: falling[max(1, math.floor(len(falling) / 4)) - 1]),
    (lambda n: Budget(1.0, n), lambda falling: falling[-1]),
    (lambda n: Budget(1e-9, n), lambda falling: falling[0]),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("make", "definition"), DEFINITIONS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 300])
def test_where_the_sample_is_everything(
    rng: np.random.Generator, n: int, make: Callable, definition: Callable, kind: str
) -> None:
    keys, queries = normal(rng, 2, n, 12), normal(rng, 4, 12)
    index = Index.build(keys, kind)
    for n_samples in (n, n + 1, 1000):
        selection = index.select(queries, make(n_samples))
        for i, certificate in enumerate(selection.certificates):
            falling = np.sort(scores(queries[i], keys[i // 2]))[::-1]
            assert certificate.tau == pytest.approx(definition(falling), rel=1e-12, abs=1e-12)
        check(selection.matches, keys, queries, selection.tau)
        # The negative control: with another threshold another set would be found.
        if n > 5:
            with pytest.raises(AssertionError):
                check(selection.matches, keys, queries, selection.tau - 3)


def test_what_is_not_finite_is_no_sample(rng: np.random.Generator) -> None:
    keys, query = normal(rng, 60, 5), normal(rng, 5)
    keys[::3, 1] = math.inf
    index = Index.build(keys)
    finite = np.sort(scores(query, np.delete(keys, range(0, 60, 3), axis=0)))[::-1]
    for make, definition in DEFINITIONS:
        selection = index.select(query, make(60))
        assert selection.tau[0] == pytest.approx(definition(finite), rel=1e-12)
        assert set(range(0, 60, 3)) <= set(selection[0].ids.tolist())
    keys[:] = math.nan
    broken = Index.build(keys)
    for oracle in EVERY:
        assert broken.select(query, oracle)[0].ids.tolist() == list(range(60))


# Fixed and top-k


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fixed(rng: np.random.Generator, dtype: str, kind: str) -> None:
    keys, queries = stored(normal(rng, 2, 200, 20), dtype), normal(rng, 6, 20)
    index = Index.build(keys, kind)
    for tau in (-math.inf, 0, 1.5, Fraction(1, 4), np.float32(2), math.inf):
        selection = index.select(queries, Fixed(tau))
        assert selection.tau.tolist() == [float(tau)] * 6
        check(selection.matches, keys, queries, float(tau))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 5, 64, 65, 500])
def test_top_k(rng: np.random.Generator, n: int, kind: str) -> None:
    keys, queries = normal(rng, n, 16), normal(rng, 3, 16)
    queries[2] *= 1e20
    index = Index.build(keys, kind)
    live = np.ones(n, bool)
    for _ in range(2):
        for k in {1, 2, n // 2 or 1, max(n - 1, 1), n, n + 1, 2**31 - 1}:
            selection = index.select(queries, TopK(k))
            for query, match in zip(queries, selection, strict=True):
                order = [i for i in np.argsort(-scores(query, keys), kind="stable").tolist() if live[i]]
                assert match.ids.tolist() == sorted(order[:k])
            check_scores(selection.matches, keys, queries, selection.tau)
        gone = rng.permutation(np.flatnonzero(live))[: n // 3]
        index.remove(gone)
        live[gone] = False


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_with_ties(rng: np.random.Generator, kind: str) -> None:
    keys = rng.integers(-1, 2, (150, 6)).astype(np.float32)
    query = np.ones(6, np.float32)
    found = scores(query, keys)
    for k in (1, 10, 75, 149):
        least = np.sort(found)[-k]
        ids = Index.build(keys, kind).select(query, TopK(k))[0].ids
        assert ids.tolist() == np.flatnonzero(found >= least).tolist()


# The sample


def sample_of(index: Index, n_samples: int, seed: int) -> list[int]:
    """The positions in the reservoir of an index whose key at position i is the number i."""
    one = np.ones(1, np.float32)
    return [
        int(index.select(one, SampleTopK(k, n_samples, seed)).tau[0])
        for k in range(1, min(n_samples, len(index)) + 1)
    ]


def numbers(first: int, end: int) -> NDArray[np.float32]:
    return np.arange(first, end, dtype=np.float32)[:, None]


def statistic(counts: NDArray, n_draws: int, n_samples: int) -> float:
    """Chi-square of how often each of n positions was in a sample without replacement, as deviations of a normal."""
    n = len(counts)
    share = n_samples / n
    chi2 = ((counts - n_draws * share) ** 2).sum() / (n_draws * share * (1 - share)) * (n - 1) / n
    return float((chi2 - (n - 1)) / math.sqrt(2 * (n - 1)))


def built(seed: int) -> tuple[Index, list[int]]:
    return Index.build(numbers(0, 30), n_threads=1), list(range(30))


def appended(seed: int) -> tuple[Index, list[int]]:
    index = Index.build(numbers(0, 10), n_threads=1)
    sample_of(index, 6, seed)
    index.append(numbers(10, 11))
    index.append(numbers(11, 30))
    return index, list(range(30))


def removed_and_appended(seed: int) -> tuple[Index, list[int]]:
    index = Index.build(numbers(0, 30), n_threads=1)
    sample_of(index, 6, seed)
    index.remove(range(0, 20, 2))
    index.append(numbers(30, 45))
    index.update([4, 8], numbers(0, 9)[[4, 8]])
    return index, [4, 8, *range(1, 20, 2), *range(20, 45)]


@pytest.mark.parametrize("make", [built, appended, removed_and_appended])
def test_sample_is_uniform(make: Callable[[int], tuple[Index, list[int]]]) -> None:
    counts, n_draws = np.zeros(45), 500
    for seed in range(n_draws):
        index, live = make(seed)
        sample = sample_of(index, 6, seed)
        assert len(set(sample)) == 6
        assert set(sample) <= set(live)
        counts[sample] += 1
    assert -3.5 < statistic(counts[live], n_draws, 6) < 3.5


def test_statistic_sees_a_sample_that_is_not_uniform(rng: np.random.Generator) -> None:
    """The negative control: one position twice as likely as the others is found out, a fair sample is not."""
    fair, unfair = np.zeros(30), np.zeros(30)
    for _ in range(500):
        fair[rng.permutation(30)[:6]] += 1
        unfair[rng.choice(30, 6, replace=False, p=np.r_[2, np.ones(29)] / 31)] += 1
    assert abs(statistic(fair, 500, 6)) < 3.5
    assert statistic(unfair, 500, 6) > 3.5


def test_sample_after_removals() -> None:
    index = Index.build(numbers(0, 100))
    before = sample_of(index, 10, 0)
    index.remove(before[:4])
    one = np.ones(1, np.float32)
    left = {int(index.select(one, SampleTopK(k, 10)).tau[0]) for k in range(1, 7)}
    assert left == set(before[4:])
    index.remove(before[4:])
    assert index.select(one, SampleMax(10)).tau[0] > -math.inf  # drawn anew
    index.remove([i for i in range(100) if i in index])
    index.update([42], numbers(42, 43))
    assert index.select(one, SampleMax(10)).tau[0] == 42


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_selection(rng: np.random.Generator, kind: str) -> None:
    keys, query = normal(rng, 500, 8), normal(rng, 8)

    def changed() -> Index:
        index = Index.build(keys[:300], kind)
        index.select(query, SampleMax(16, 5))
        index.remove(range(0, 50, 3))
        index.append(keys[300:])
        return index

    first, second = changed(), changed()
    assert sample_is_equal(first.select(query, SampleGap(16, 5)), second.select(query, SampleGap(16, 5)))
    taus = {first.select(query, SampleMax(16, seed)).tau[0] for seed in (0, 1, 2, 3, 5, 2**64 - 1)}
    assert len(taus) > 1


def sample_is_equal(a: Selection, b: Selection) -> bool:
    return a.tau.tolist() == b.tau.tolist() and a.matches.ids.tolist() == b.matches.ids.tolist()


# Mass and certificates


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("n", [1, 2, 64, 130, 1500])
def test_mass(rng: np.random.Generator, n: int, epsilon: float, kind: str) -> None:
    keys, queries = concentrated(rng, n, 32, 2), normal(rng, 6, 32)
    index = Index.build(keys, kind)
    live = np.ones(n, bool)
    if n > 2:
        live[::5] = False
        index.remove(np.flatnonzero(~live))
    selection = index.select(queries, Mass(epsilon))
    for i, (match, certificate) in enumerate(zip(selection, selection.certificates, strict=True)):
        dropped = dropped_mass(queries[i], keys[i // 3], live, match.ids, 32**-0.5)
        assert dropped <= certificate.delta <= epsilon
        assert certificate.n_selected == len(match.ids)
        assert live[match.ids].all()
        assert set(reaching(keys[i // 3], queries[i], certificate.tau, live)) <= set(match.ids.tolist())
        if epsilon == 0:
            assert len(match.ids) == live.sum()
        if epsilon == 0.9 and n == 1500:
            assert len(match.ids) < n / 2  # something was dropped, so that there was something to bound
    check_scores(selection.matches, keys, queries, -math.inf)


def reaching(keys: NDArray, query: NDArray, tau: float, live: NDArray) -> list[int]:
    return matching(keys, query[None], tau, live)[0].tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("oracle", EVERY, ids=lambda oracle: oracle.kind)
def test_delta_bounds_the_mass_of_every_oracle(
    rng: np.random.Generator, oracle: Oracle, dtype: str, kind: str
) -> None:
    for spread in (0.0, 0.1, 1.0, 30.0, 1e4, 1e15):
        keys = stored(concentrated(rng, 300, 24)[0], dtype)
        queries = normal(rng, 3, 24) * np.float32(spread)
        index = Index.build(keys, kind)
        live = np.ones(300, bool)
        live[100:140] = False
        index.remove(np.flatnonzero(~live))
        for scale in (24**-0.5, 1e-6, 7.0):
            selection = index.select(queries, oracle, scale=scale)
            for query, match, certificate in zip(queries, selection, selection.certificates, strict=True):
                dropped = dropped_mass(query, keys, live, match.ids, scale)
                assert dropped <= certificate.delta * (1 + 1e-12) + 1e-300
                assert certificate.delta <= 1
                assert certificate.n_keys == 260 == len(index)
                assert certificate.n_selected == len(match.ids)
                assert certificate.n_selected <= certificate.n_scored <= 2 * 260
                assert certificate.n_bounded <= 260
                assert certificate.bytes_read > 0


def test_delta_is_not_idle(rng: np.random.Generator) -> None:
    """The negative control: without its heaviest key, a selection's mass exceeds what its certificate says."""
    keys, query = concentrated(rng, 300, 24)[0], normal(rng, 24)
    selection = Index.build(keys).select(query, Mass(0.05))
    kept = np.delete(selection[0].ids, selection[0].scores.argmax())
    everywhere = np.ones(300, bool)
    assert dropped_mass(query, keys, everywhere, kept, 24**-0.5) > selection.certificates[0].delta


def test_sequences(rng: np.random.Generator) -> None:
    keys = normal(rng, 2, 100, 8)
    selection = Index.build(keys).select(normal(rng, 2, 3, 8), Mass())
    assert len(selection) == len(selection.certificates) == 6
    assert selection.matches.shape == (2, 3)
    assert [m.ids.tolist() for m in selection] == [m.ids.tolist() for m in selection[:]]
    assert selection.tau.shape == (6,)
    assert all(c.error_bound is None and not c.dense for c in selection.certificates)


# Parameters


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Fixed(math.nan), ValueError),
        (lambda: Fixed("1"), TypeError),
        (lambda: Fixed(True), TypeError),
        (lambda: Fixed(None), TypeError),
        (lambda: Mass(1.0), ValueError),
        (lambda: Mass(-1e-9), ValueError),
        (lambda: Mass(math.nan), ValueError),
        (lambda: Mass("0.05"), TypeError),
        (lambda: TopK(0), ValueError),
        (lambda: TopK(2**31), ValueError),
        (lambda: TopK(3.0), TypeError),
        (lambda: TopK(True), TypeError),
        (lambda: SampleMax(0), ValueError),
        (lambda: SampleMax(1.5), TypeError),
        (lambda: SampleMax(seed=-1), ValueError),
        (lambda: SampleMax(seed=2**64), ValueError),
        (lambda: SampleMeanMax(seed=0.0), TypeError),
        (lambda: SampleTopK(0), ValueError),
        (lambda: SampleTopK(1, 0), ValueError),
        (lambda: SampleGap(-1), ValueError),
        (lambda: Budget(0.0), ValueError),
        (lambda: Budget(1.01), ValueError),
        (lambda: Budget(math.nan), ValueError),
        (lambda: Budget("a"), TypeError),
        (lambda: Budget(0.5, 0), ValueError),
    ],
)
def test_parameters_out_of_range(make: Callable[[], Oracle], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"(tau|epsilon|k|n_samples|seed|fraction) must be .*, not "):
        make()


def test_extreme_parameters_that_are_fine(rng: np.random.Generator) -> None:
    index = Index.build(normal(rng, 100, 4))
    for oracle in (
        Mass(math.nextafter(1, 0)),
        Mass(5e-324),
        TopK(np.int64(3)),
        SampleMax(2**31 - 1, np.uint64(2**64 - 1)),
        Budget(5e-324),
        Fixed(-1.7e308),
    ):
        (certificate,) = index.select(normal(rng, 4), oracle).certificates
        assert 0 <= certificate.delta <= 1
    assert oracles.Mass() == Mass(0.05)
