"""The mass oracle: its threshold drops at most epsilon of the mass, and little less than it could."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from reference import Double, Float, core

EPSILONS = (1e-4, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999)
SIZES = (1, 2, 63, 64, 1000, 30000)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def mass_below(weight: Float, thresholds: Float) -> Double:
    """Sum of the weights under each threshold."""
    ordered = np.sort(weight).astype(np.float64)
    sums = np.concatenate([[0], np.cumsum(ordered)])
    return sums[np.searchsorted(ordered, thresholds.astype(np.float64), side="left")]


def choose(weight: Float, lower: float, epsilon: float) -> tuple[float, core.Bracket]:
    """The threshold for these upper weights and this lower bound of their sum, by the two passes."""
    oracle = core.MassOracle(epsilon, len(weight))
    bracket = oracle.narrow(mass_below(weight, oracle.coarse), lower)
    return oracle.threshold(bracket, mass_below(weight, bracket.fine), lower), bracket


def heavy_tails(rng: np.random.Generator, n: int) -> Iterator[tuple[str, Float]]:
    """Weights as a scan makes them: some cell has about 1."""
    yield "lognormal", np.exp(rng.normal(size=n) * 3)
    yield "wide lognormal", np.exp(rng.normal(size=n) * 12)
    yield "pareto", rng.pareto(0.7, n) + 1e-6
    yield "zipf", 1 / np.arange(1, n + 1)
    yield "exponential", rng.exponential(size=n)
    yield "all equal", np.ones(n)
    yield "two levels", np.where(rng.uniform(size=n) < 0.9, 1e-7, 1)
    yield "one of many", np.where(np.arange(n) == n // 2, 1, 1e-6)
    yield "far below", np.where(np.arange(n) == 0, 1, 2.0**-120)
    yield "geometric", np.exp2(-np.arange(n) / 4).clip(2.0**-120)
    yield "many ties", rng.integers(1, 5, n) / 4
    yield "some hidden", np.exp(rng.normal(size=n) * 3) * (rng.uniform(size=n) < 0.5)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_at_most_epsilon_is_dropped(rng: np.random.Generator, epsilon: float) -> None:
    for n in SIZES:
        for name, weight in heavy_tails(rng, n):
            for peak in (
                1.0,
                30.0,
                1e5,
            ):  # the reference need not be the largest score
                w = (weight / max(weight.max(), 1e-300) * peak).astype(np.float32)
                for tightness in (1.0, 0.7, 0.01):  # the lower bound's, of the sum
                    lower = float(w.astype(float).sum() * tightness)
                    threshold, _ = choose(w, lower, epsilon)
                    dropped = mass_below(w, np.array([threshold], np.float32))[0]
                    assert dropped <= epsilon * lower, (name, n, peak, tightness)
                    assert threshold >= 0


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_little_more_could_be_dropped(rng: np.random.Generator, epsilon: float) -> None:
    for n in SIZES:
        for name, weight in heavy_tails(rng, n):
            w = (weight / max(weight.max(), 1e-300)).astype(np.float32)
            lower = float(w.astype(float).sum())
            threshold, bracket = choose(w, lower, epsilon)
            # The next candidate of the second pass drops too much, or is past where one cell alone would.
            ratio = float(bracket.fine[1]) / float(bracket.fine[0])
            onward = np.array([threshold * ratio * (1 + 1e-5)], np.float32)
            too_much = mass_below(w, onward)[0] > epsilon * lower * (1 - 2**-14)
            assert too_much or onward[0] >= epsilon * lower * (1 - 1e-3), (name, n)
            # And it is not far: the coarse thresholds' distance in nine.
            spacing = (math.log2(n) + 7) / 7
            beyond = max(math.log2(lower) - 6, 0)
            assert ratio <= 2 ** (max(spacing, beyond) / 9 * 1.01), (name, n)
            assert (np.diff(bracket.fine) >= 0).all() and bracket.fine[0] >= bracket.sure


def test_real_distributions_are_pruned_hard(rng: np.random.Generator) -> None:
    weight = np.exp(rng.normal(size=20000) * 4)
    w = (weight / weight.max()).astype(np.float32)
    threshold, _ = choose(w, float(w.sum()), 0.05)
    optimum = np.sort(w)[np.searchsorted(np.cumsum(np.sort(w).astype(float)), 0.05 * w.astype(float).sum())]
    kept, best = (w >= threshold).sum(), (w >= optimum).sum()
    assert best <= kept < 1.25 * best < 2000


def test_coarse_thresholds_rise_and_span_the_answer() -> None:
    for epsilon in EPSILONS:
        for n in SIZES:
            coarse = core.MassOracle(epsilon, n).coarse
            assert (np.diff(coarse) > 0).all()
            assert coarse[0] <= epsilon / n and coarse[-1] >= epsilon


@pytest.mark.parametrize("lower", [0.0, -1.0, math.nan])
def test_without_a_lower_bound_nothing_is_dropped(lower: float) -> None:
    oracle = core.MassOracle(0.05, 100)
    for below in (np.zeros(8), np.ones(8), np.full(8, np.inf), np.full(8, np.nan)):
        bracket = oracle.narrow(below, lower)
        assert bracket.sure == 0
        if not np.isnan(below).any() and not math.isnan(lower):
            assert oracle.threshold(bracket, below, lower) == 0


def test_sums_that_are_not_finite_are_never_dropped() -> None:
    oracle = core.MassOracle(0.05, 100)
    for bad in (np.inf, np.nan):
        below = np.array([0.001] * 4 + [bad] * 4)
        bracket = oracle.narrow(below, 1.0)
        assert 0 < bracket.sure <= oracle.coarse[3]
        assert oracle.threshold(bracket, np.full(8, bad), 1.0) == bracket.sure
        fine = np.array([0.01] * 2 + [bad] * 6)
        assert oracle.threshold(bracket, fine, 1.0) == max(bracket.sure, bracket.fine[1])


def test_the_sure_threshold_needs_no_sums() -> None:
    # n weights under epsilon L / n add up to less than epsilon L.
    for n in SIZES:
        bracket = core.MassOracle(0.05, n).narrow(np.full(8, np.inf), 3.0)
        assert 0.999 * 0.05 * 3 / n <= bracket.sure < 0.05 * 3 / n


def test_arguments_are_checked() -> None:
    for epsilon in (0.0, 1.0, -0.1, math.nan, 2.0):
        with pytest.raises(ValueError):
            core.MassOracle(epsilon, 10)
    oracle = core.MassOracle(0.1, 0)
    with pytest.raises(ValueError):
        oracle.narrow(np.zeros(7), 1.0)
    with pytest.raises(ValueError):
        oracle.threshold(oracle.narrow(np.zeros(8), 1.0), np.zeros(9), 1.0)


def test_dropped_share() -> None:
    assert core.dropped_share(0.0, 1.0) == core.dropped_share(0.0, 0.0) == 0
    assert core.dropped_share(1.0, 0.0) == core.dropped_share(1.0, -1.0) == 1
    for dropped, kept in ((1.0, 3.0), (1e-12, 1.0), (1e12, 1.0), (1e-300, 1e-300)):
        exact = dropped / (dropped + kept)
        assert exact <= core.dropped_share(dropped, kept) <= min(1, exact * (1 + 4 * core.WEIGHT_ERROR))
    # Whatever cannot be bounded is all of it.
    for dropped, kept in ((math.inf, 1.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, math.inf)):
        assert core.dropped_share(dropped, kept) == 1
