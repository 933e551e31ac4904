"""Random lives of an index, against a plain model that decides exactly.

LOUVER_FUZZ_EXAMPLES=1000 runs that many lives of each kind, other ones every time; hypothesis prints how to repeat a failure.
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from exact import DTYPES, METHODS, check, check_scores, dropped_mass, f64, is_finite, matching, scores, stored
from louver_llama import Index, Matches, Selection, attention, oracles

EXAMPLES = int(os.environ.get("LOUVER_FUZZ_EXAMPLES", "0"))
SEEDS = st.integers(0, 2**32 - 1)
MOST = 220  # positions: the last block is the fourth

SAMPLED = [(n_samples, seed) for n_samples in (1, 7, 100) for seed in (0, 1)]
ORACLES: list[oracles.Oracle] = [
    *map(oracles.Fixed, (-math.inf, -1.0, 0.0, 3.0, math.inf)),
    *map(oracles.Mass, (0.0, 1e-6, 0.05, 0.5, 0.999)),
    *map(oracles.TopK, (1, 2, 30, 80)),
    *(oracles.SampleMax(*sampled) for sampled in SAMPLED),
    *(oracles.SampleMeanMax(*sampled) for sampled in SAMPLED),
    *(oracles.SampleTopK(5, *sampled) for sampled in SAMPLED),
    *(oracles.SampleGap(*sampled) for sampled in SAMPLED),
    *(oracles.Budget(share, *sampled) for share in (0.01, 0.5, 1.0) for sampled in SAMPLED),
]


class Life(RuleBasedStateMachine):
    """An index beside its keys and which of them are live."""

    kind = "grid"

    @initialize(
        dim=st.sampled_from([1, 2, 7, 33]),
        dtype=st.sampled_from(list(DTYPES)),
        n_head_kv=st.integers(1, 2),
        n=st.sampled_from([0, 1, 63, 64, 65, 150]),
        copy=st.booleans(),
        grouping=st.sampled_from(["tree", "kmeans"]),
        enclosure=st.sampled_from(["ball", "box"]),
        group_size=st.integers(1, 9),
        merge_at=st.sampled_from([1, 5, 40, 1024]),
        seed=SEEDS,
    )
    def build(
        self, dim: int, dtype: str, n_head_kv: int, n: int, copy: bool, seed: int, **options: object
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = dtype
        self.n_subspaces = min(dim, int(self.rng.integers(1, 5)))
        self.keys = self.content(n_head_kv, n, dim)
        self.live = np.ones(n, bool)
        lent = self.keys.copy()
        self.index = Index.build(
            lent, self.kind, copy=copy, n_threads=1, n_subspaces=self.n_subspaces, **options
        )
        if copy:
            lent.view(np.uint8)[...] = 0xA5  # what was copied is not looked at again

    def content(self, n_head_kv: int, n: int, dim: int) -> NDArray:
        """Keys of a nasty mixture: ties, zeros, huge and tiny ones, NaN and infinities."""
        x = self.rng.normal(size=(n_head_kv, n, dim)) * np.exp(self.rng.normal(size=(n_head_kv, n, 1)))
        part = self.rng.uniform(size=(n_head_kv, n))
        x[part < 0.05] = 0
        x[(part > 0.05) & (part < 0.3)] = np.round(x[(part > 0.05) & (part < 0.3)])
        x[part > 0.97] *= 1e4
        x[(part > 0.9) & (part < 0.93)] *= 1e-30
        odd = np.argwhere((part > 0.8) & (part < 0.82))
        for head, i in odd:
            x[head, i, self.rng.integers(dim)] = self.rng.choice([np.nan, np.inf, -np.inf])
        return stored(x, self.dtype)

    def some(self, among: NDArray[np.bool_], share: float) -> NDArray[np.int64]:
        """Positions in any order."""
        return self.rng.permutation(np.flatnonzero(among & (self.rng.uniform(size=len(among)) < share)))

    @property
    def n(self) -> int:
        return self.keys.shape[1]

    @property
    def dim(self) -> int:
        return self.keys.shape[2]

    @precondition(lambda self: self.n < MOST)
    @rule(count=st.sampled_from([0, 1, 2, 30, 64, 100]))
    def append(self, count: int) -> None:
        new = self.content(len(self.keys), min(count, MOST - self.n), self.dim)
        assert self.index.append(new) == range(self.n, self.n + new.shape[1])
        self.keys = np.concatenate([self.keys, new], axis=1)
        self.live = np.append(self.live, np.ones(new.shape[1], bool))

    @rule(share=st.sampled_from([0.02, 0.3, 1.0]))
    def update(self, share: float) -> None:
        at = self.some(np.ones(self.n, bool), share)
        new = self.content(len(self.keys), len(at), self.dim)
        self.index.update(at, new)
        self.keys = self.keys.copy()
        self.keys[:, at] = new
        self.live[at] = True

    @rule(share=st.sampled_from([0.02, 0.02, 0.3, 0.95, 1.0]))
    def remove(self, share: float) -> None:
        at = self.some(self.live, share)
        self.index.remove(at.tolist())
        self.live[at] = False

    @rule()
    def rebuild(self) -> None:
        self.index.rebuild()

    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.index.save(Path(folder) / "index")
            self.index = Index.load(Path(folder) / "index", n_threads=1)

    @rule()
    def refused(self) -> None:
        """A call that raises changes nothing: what follows sees it if it did."""
        for positions in ([self.n], [-1], [0, 0]):
            for call in (
                lambda: self.index.remove(positions),  # noqa: B023
                lambda: self.index.update(positions, self.content(len(self.keys), len(positions), self.dim)),  # noqa: B023
            ):
                try:
                    call()
                except ValueError:
                    continue
                raise AssertionError(f"{positions} was accepted")

    def queries(self) -> NDArray[np.float32]:
        queries = self.rng.normal(size=(3 * len(self.keys), self.dim)) * np.exp(self.rng.normal())
        queries[1] = np.round(queries[1])
        queries[2] *= self.rng.choice([0.0, 1e-30, 1e25, 1.0])
        return queries.astype(np.float32)

    def thresholds(self, queries: NDArray) -> NDArray[np.float64]:
        """Mostly at a live key's score or an ulp beside it."""
        tau = []
        for i, query in enumerate(queries):
            found = scores(query, self.keys[i // 3][self.live])
            found = found[np.isfinite(found)]
            at = float(self.rng.choice(found)) if len(found) else 0.0
            tau.append(self.rng.choice([at, np.nextafter(at, 9e99), np.nextafter(at, -9e99), -math.inf, 0.0]))
        return np.array(tau)

    @invariant()
    def every_search_is_exact(self) -> None:
        """Not a rule: most lives would have next to none of them."""
        if not hasattr(self, "index"):
            return
        queries = self.queries()
        tau = self.thresholds(queries)
        for method in METHODS[self.kind]:
            check(self.index.search(queries, tau, method=method), self.keys, queries, tau, self.live)

    @precondition(lambda self: self.kind == "ball")
    @rule()
    def filter(self) -> None:
        queries = self.queries()
        tau = self.thresholds(queries)
        each = self.rng.normal(size=(len(queries), self.n_subspaces)) - 1
        found = self.index.search(queries, tau, method="filter", subspace_tau=each)
        check(found, self.keys, queries, tau, self.live, each)

    @invariant()
    def every_selection_is_certified(self) -> None:
        if not hasattr(self, "index") or not self.live.any():
            return
        oracle = ORACLES[self.rng.integers(len(ORACLES))]
        queries = self.queries()
        selection = self.index.select(queries, oracle)
        check_scores(selection.matches, self.keys, queries, -math.inf)
        self.check_selection(selection, queries, isinstance(oracle, oracles.Mass))

    def check_selection(self, selection: Selection, queries: NDArray, by_mass: bool) -> None:
        if not by_mass:
            check(selection.matches, self.keys, queries, selection.tau, self.live)
        for i, certificate in enumerate(selection.certificates):
            ids, keys = selection[i].ids, self.keys[i // 3]
            assert self.live[ids].all()
            assert set(matching(keys, queries[i : i + 1], certificate.tau, self.live)[0]) <= set(ids)
            assert certificate.n_keys == self.live.sum()
            assert certificate.n_selected == len(ids)
            if is_finite(keys[self.live]).all():
                dropped = dropped_mass(queries[i], keys, self.live, ids, self.dim**-0.5)
                assert dropped <= certificate.delta * (1 + 1e-12) + 1e-300

    @precondition(lambda self: self.live.any())
    @rule(oracle=st.sampled_from(ORACLES), compensate=st.booleans())
    def attend(self, oracle: oracles.Oracle, compensate: bool) -> None:
        queries = self.queries()
        values = self.rng.normal(size=(len(self.keys), self.n, 3)).astype(np.float32)
        values[:, ~self.live] = math.nan
        out, certificates = attention(queries, self.index, values, oracle, compensate=compensate)
        most = np.linalg.norm(values[:, self.live], axis=2).max()
        for i, certificate in enumerate(certificates):
            keys = self.keys[i // 3][self.live]
            if not is_finite(keys).all():
                assert certificate.dense
                continue
            scaled = scores(queries[i], keys) * self.dim**-0.5
            weight = np.exp(scaled - scaled.max())
            wanted = weight @ f64(values[i // 3][self.live]) / weight.sum()
            assert np.linalg.norm(out[i] - wanted) <= certificate.error_bound + 1e-5 * most

    @invariant()
    def it_holds_what_it_was_given(self) -> None:
        if not hasattr(self, "index"):
            return
        assert self.index.n_positions == self.n
        assert len(self.index) == self.live.sum()
        if self.n:
            at = int(self.rng.integers(self.n))
            assert (at in self.index) == self.live[at]
            np.testing.assert_array_equal(np.atleast_2d(self.index.key(at)), f64(self.keys[:, at]))


class BallLife(Life):
    kind = "ball"


EVERY_LIFE = settings(
    max_examples=EXAMPLES or 80,
    stateful_step_count=25,
    deadline=None,
    derandomize=not EXAMPLES,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
Life.TestCase.settings = BallLife.TestCase.settings = EVERY_LIFE
TestGridLife = Life.TestCase
TestBallLife = BallLife.TestCase


@pytest.mark.parametrize("life", [Life, BallLife])
def test_a_lost_match_is_found(monkeypatch: pytest.MonkeyPatch, life: type[Life]) -> None:
    """The negative control: an index that leaves out one key of one query, now and then."""
    search = Index.search

    def losing(index: Index, *args: object, **options: object) -> Matches:
        found = search(index, *args, **options)
        if len(found.ids) % 9 != 1:
            return found
        offsets = np.minimum(found.offsets, len(found.ids) - 1)
        return Matches(offsets, found.ids[:-1], found.scores[:-1], found.stats, found.shape)

    monkeypatch.setattr(Index, "search", losing)
    brief = settings(EVERY_LIFE, max_examples=30, derandomize=True, phases=[Phase.generate], print_blob=False)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(life, settings=brief)
