"""The mass oracle: its threshold drops at most epsilon of the mass, and little less than it could."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

from reference import Double, Float, core

EPSILONS = (1e-4, 0.01, 0.05, 0.2, 0.5, 0.9, 0.999)
SIZES = (1, 2, 63, 64, 1000, 30000)
PEAKS = (1.0, 30.0, 1e5, 2e17)  # the largest weight: the reference may lie 40 nats below the best score
ROOM = 1 - 2.0**-13  # what the oracle leaves of epsilon for the weights' own errors


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


class Mass:
    """The sum of some weights under any threshold."""

    def __init__(self, weight: Float) -> None:
        self.ordered = np.sort(weight).astype(np.float64)
        self.sums = np.concatenate([[0], np.cumsum(self.ordered)])

    def below(self, thresholds: Float) -> Double:
        return self.sums[np.searchsorted(self.ordered, np.float64(thresholds), side="left")]

    def total(self) -> float:
        return float(self.sums[-1])


@dataclass
class Choice:
    threshold: float
    onward: float | None = None  # the next larger threshold that was tried, None where the guess was good


def choose(oracle: core.MassOracle, mass: Mass, sample: Double, lower: float) -> Choice:
    """The threshold for these upper weights, as one query alone finds it (verify() of decode.cpp).

    ``sample``: estimates of the sums under the coarse thresholds; ``lower``: of the sum of all weights.
    """
    guess = oracle.guess(sample, lower)
    too_much = not oracle.satisfies(float(mass.below(guess)), lower)
    if not too_much and not oracle.is_open(guess):
        return Choice(guess)
    fine = oracle.fine(guess, too_much, lower)
    assert (np.diff(fine) >= 0).all()
    assert (fine < guess).all() if too_much else fine[0] >= guess
    threshold = oracle.refined(fine, mass.below(fine), lower)
    end = guess if too_much else math.inf
    return Choice(threshold, min([x for x in fine.tolist() if x > threshold], default=end))


def heavy_tails(rng: np.random.Generator, n: int) -> Iterator[tuple[str, Float]]:
    """Weights as a scan makes them, of any size."""
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


def every_weight(rng: np.random.Generator) -> Iterator[tuple[str, Float]]:
    """The heavy tails in every size and height."""
    for n in SIZES:
        for name, weight in heavy_tails(rng, n):
            for peak in PEAKS:
                yield (
                    f"{name} {n} {peak}",
                    (weight / max(weight.max(), 1e-300) * peak).astype(np.float32),
                )


def samples(weight: Float, coarse: Float) -> Iterator[tuple[str, Double]]:
    """Sums under the coarse thresholds as a sample gives them: a good one, a misleading one, none at all."""
    step = core.SAMPLE_STEP
    ordered = np.sort(weight)
    yield "all", Mass(weight).below(coarse)
    yield "one in four", Mass(weight[::step]).below(coarse) * step
    yield "the lightest", Mass(ordered[: len(weight) // step]).below(coarse) * step
    yield "the heaviest", Mass(ordered[-(len(weight) // step) or len(weight) :]).below(coarse) * step
    yield "nothing", np.zeros(len(coarse))


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_at_most_epsilon_is_dropped(rng: np.random.Generator, epsilon: float) -> None:
    refined = 0
    for name, weight in every_weight(rng):
        oracle = core.MassOracle(epsilon, len(weight))
        mass = Mass(weight)
        for sample_name, sample in samples(weight, oracle.coarse):
            for tightness in (1.0, 0.7, 0.01):  # the lower bound's, of the sum
                lower = mass.total() * tightness
                choice = choose(oracle, mass, sample, lower)
                assert mass.below(choice.threshold) <= epsilon * lower, (name, sample_name, tightness)
                assert choice.threshold >= 0
                refined += choice.onward is not None
    assert refined > 1000  # so that both ways were tried


def test_a_guess_alone_may_drop_too_much(rng: np.random.Generator) -> None:
    # The control of the test above: without the second look epsilon would not hold.
    found = 0
    for _, weight in every_weight(rng):
        oracle, mass = core.MassOracle(0.05, len(weight)), Mass(weight)
        for _, sample in samples(weight, oracle.coarse):
            found += mass.below(oracle.guess(sample, mass.total())) > 0.05 * mass.total()
    assert found > 100


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_little_more_could_be_dropped(rng: np.random.Generator, epsilon: float) -> None:
    for name, weight in every_weight(rng):
        oracle, mass = core.MassOracle(epsilon, len(weight)), Mass(weight)
        lower = mass.total()
        choice = choose(oracle, mass, mass.below(oracle.coarse), lower)
        if choice.onward is not None:  # else the next test's business
            assert mass.below(choice.onward) > epsilon * lower * ROOM, name


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_a_guess_lies_between_the_candidates_that_bracket_epsilon(
    rng: np.random.Generator, epsilon: float
) -> None:
    for name, weight in every_weight(rng):
        oracle, mass = core.MassOracle(epsilon, len(weight)), Mass(weight)
        coarse, below, lower = oracle.coarse, mass.below(oracle.coarse), mass.total()
        guess = oracle.guess(below, lower)
        over = np.flatnonzero(below > epsilon * lower)
        if lower == 0:
            assert guess == 0
        elif len(over) == 0:
            assert guess >= coarse[-1] and oracle.is_open(guess), name
        else:
            j = over[0]
            assert guess <= coarse[j] * (1 + 1e-6), name
            # Where nothing is known to lie under the candidate before, a share of this one has to do.
            least = coarse[j - 1] if j > 0 and below[j - 1] > 0 else coarse[j] * epsilon * lower / below[j]
            assert guess >= least * (1 - 1e-6), name


def test_a_guess_follows_a_power_law(rng: np.random.Generator) -> None:
    # Where U is a power of the threshold, interpolation has nothing to lose.
    for power in (0.1, 0.5, 1.0, 2.0):
        for lower in np.exp2(rng.uniform(-5, 5, 20)):
            oracle = core.MassOracle(0.05, 4000)
            exact = (0.05 * lower) ** (1 / power)
            if oracle.coarse[0] < exact < oracle.coarse[-1]:
                guess = oracle.guess(oracle.coarse.astype(np.float64) ** power, float(lower))
                assert guess == pytest.approx(exact, rel=1e-4)


def test_a_guess_rises_with_the_mass(rng: np.random.Generator) -> None:
    for _, weight in heavy_tails(rng, 1000):
        mass = Mass((weight / weight.max()).astype(np.float32))
        oracle = core.MassOracle(0.05, 1000)
        below = mass.below(oracle.coarse)
        masses = np.geomspace(1e-3, 1e6, 300).tolist()
        guesses = np.array([oracle.guess(below, lower) for lower in masses])
        assert (np.diff(guesses) >= -1e-6 * guesses[1:]).all()
        refined = [oracle.refined(oracle.coarse, below, lower) for lower in masses]
        assert (np.diff(refined) >= 0).all()


@pytest.mark.parametrize("every", ["all", "one in four"])
def test_real_distributions_are_pruned_hard(rng: np.random.Generator, every: str) -> None:
    weight = np.exp(rng.normal(size=20000) * 4)
    w = (weight / weight.max()).astype(np.float32)
    oracle, mass = core.MassOracle(0.05, len(w)), Mass(w)
    threshold = choose(oracle, mass, dict(samples(w, oracle.coarse))[every], mass.total()).threshold
    optimum = mass.ordered[np.searchsorted(mass.sums, 0.05 * mass.total()) - 1]
    kept, best = (w >= threshold).sum(), (w >= optimum).sum()
    assert best <= kept < 1.25 * best < 2000


def test_coarse_thresholds_rise_and_span_the_answer() -> None:
    for epsilon in EPSILONS:
        for n in SIZES:
            coarse = core.MassOracle(epsilon, n).coarse
            assert (np.diff(coarse) > 0).all()
            assert coarse[0] <= epsilon / n * (1 + 1e-6) and coarse[-1] >= epsilon


def test_fine_thresholds_of_an_open_guess_end_where_one_cell_is_too_much() -> None:
    for epsilon in EPSILONS:
        oracle = core.MassOracle(epsilon, 1000)
        guess = float(oracle.coarse[-1])
        for lower in (1e3, 1e6, 2e17):
            fine = oracle.fine(guess, False, lower)
            last = epsilon * lower
            assert fine[0] == np.float32(guess) and (np.diff(fine) > 0).all() == (last > guess)
            assert last <= guess or fine[-1] < last <= fine[-1] * (last / guess) ** (1 / 15.9)


@pytest.mark.parametrize("too_much", [True, False])
def test_whatever_the_guess_the_refined_threshold_holds(rng: np.random.Generator, too_much: bool) -> None:
    for _, weight in heavy_tails(rng, 1000):
        mass = Mass((weight / weight.max()).astype(np.float32))
        for epsilon in (0.01, 0.2, 0.9):
            oracle = core.MassOracle(epsilon, 1000)
            for guess in (0.0, 1e-38, 1e-9, 1e-3, 1.0, 1e9, 3e38, math.inf, math.nan):
                for lower in (mass.total(), mass.total() / 100):
                    fine = oracle.fine(guess, too_much, lower)
                    with np.errstate(invalid="ignore"):
                        below = np.where(np.isnan(fine), math.nan, mass.below(fine))
                    threshold = oracle.refined(fine, below, lower)
                    assert mass.below(threshold) <= epsilon * lower
                    # n weights under epsilon L / n add up to less than epsilon L: that is always found.
                    assert threshold >= 0.999 * epsilon * lower / 1000


@pytest.mark.parametrize("lower", [0.0, -1.0, math.nan])
def test_without_a_lower_bound_nothing_is_dropped(lower: float) -> None:
    oracle = core.MassOracle(0.05, 100)
    for below in (np.full(16, 1e-30), np.ones(16), np.full(16, np.inf), np.full(16, np.nan)):
        assert oracle.guess(below, lower) == 0
        assert oracle.refined(oracle.coarse, below, lower) == 0
        assert not oracle.satisfies(below[0], lower)
    assert oracle.guess(np.zeros(16), lower) == 0


def test_sums_that_are_not_finite_are_never_dropped() -> None:
    oracle = core.MassOracle(0.05, 100)
    sure = oracle.refined(oracle.coarse, np.full(16, np.inf), 1.0)
    assert 0.999 * 0.05 / 100 <= sure < 0.05 / 100
    for bad in (np.inf, np.nan):
        assert not oracle.satisfies(bad, 1.0)
        assert oracle.guess(np.full(16, bad), 1.0) >= sure
        fine = oracle.fine(0.01, True, 1.0)
        assert oracle.refined(fine, np.full(16, bad), 1.0) == sure
        below = np.array([0.01] * 9 + [bad] * 7)
        assert oracle.refined(fine, below, 1.0) == fine[8]
    assert oracle.guess(np.array([0.001] * 8 + [np.inf] * 8), 1.0) <= oracle.coarse[8]


def test_the_sure_threshold_needs_no_sums() -> None:
    # n weights under epsilon L / n add up to less than epsilon L.
    for n in SIZES:
        oracle = core.MassOracle(0.05, n)
        for found in (
            oracle.guess(np.full(16, np.inf), 3.0),
            oracle.refined(oracle.coarse, np.full(16, np.inf), 3.0),
        ):
            assert 0.999 * 0.05 * 3 / n <= found < 0.05 * 3 / n


def test_satisfies_leaves_room_for_the_errors_of_the_weights() -> None:
    for epsilon in EPSILONS:
        oracle = core.MassOracle(epsilon, 1000)
        for lower in (1e-30, 1.0, 1e17):
            assert oracle.satisfies(0.0, lower)
            assert oracle.satisfies(epsilon * lower * ROOM, lower)
            assert not oracle.satisfies(epsilon * lower * (1 - core.WEIGHT_ERROR), lower)
            assert not oracle.satisfies(epsilon * lower * 2, lower)
    assert core.MassOracle(0.5, 1).satisfies(0.0, 0.0)  # nothing is dropped of nothing


def test_arguments_are_checked() -> None:
    for epsilon in (0.0, 1.0, -0.1, math.nan, 2.0):
        with pytest.raises(ValueError):
            core.MassOracle(epsilon, 10)
    oracle = core.MassOracle(0.1, 0)
    with pytest.raises(ValueError):
        oracle.guess(np.zeros(15), 1.0)
    with pytest.raises(ValueError):
        oracle.refined(oracle.coarse, np.zeros(17), 1.0)
    with pytest.raises(ValueError):
        oracle.refined(np.zeros(8, np.float32), np.zeros(16), 1.0)


def test_dropped_share() -> None:
    assert core.dropped_share(0.0, 1.0) == core.dropped_share(0.0, 0.0) == 0
    assert core.dropped_share(1.0, 0.0) == core.dropped_share(1.0, -1.0) == 1
    for dropped, kept in ((1.0, 3.0), (1e-12, 1.0), (1e12, 1.0), (1e-300, 1e-300)):
        exact = dropped / (dropped + kept)
        assert exact <= core.dropped_share(dropped, kept) <= min(1, exact * (1 + 4 * core.WEIGHT_ERROR))
    # Whatever cannot be bounded is all of it.
    for dropped, kept in ((math.inf, 1.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, math.inf)):
        assert core.dropped_share(dropped, kept) == 1
