"""The attack: what a search finds is the exact set on the data that is hardest for it, on every instruction set."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import hard_cases
from exact import DTYPES, OPTIONS, check, matching, name_of, scores, stored
from hard_cases import Case
from louver_llama import Index, Matches, _index

ISAS: list[str] = _index.available_isas()


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(13)


@pytest.fixture(scope="module")
def expected() -> dict[str, list[list[int]]]:
    return {
        case.name: [ids.tolist() for ids in matching(case.keys, case.queries, case.tau)]
        for case in hard_cases.cases()
    }


def test_hard_cases() -> None:
    """Ids, their order and the scores, in this process."""
    n_exact = 0
    for case in hard_cases.cases():
        first, *others = hard_cases.searches(case)
        try:
            check(first[1], case.keys, case.queries, case.tau)
            for _, matches in others:
                for of in ("offsets", "ids", "scores"):
                    np.testing.assert_array_equal(getattr(matches, of), getattr(first[1], of))
        except AssertionError as error:
            raise AssertionError(f"{case.name}: {error}") from error
        n_exact += first[1].stats.n_exact
    assert n_exact > 1000  # float64 alone decides otherwise


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_finds_the_same(
    tmp_path: Path, isa: str, expected: dict[str, list[list[int]]]
) -> None:
    program = Path(hard_cases.__file__)
    subprocess.run(
        [sys.executable, str(program), str(tmp_path / "found.npz")],
        check=True,
        timeout=300,
        env=os.environ | {"LOUVER_ISA": isa},
    )
    found = np.load(tmp_path / "found.npz")
    assert found["isa"] == isa
    hows = {name.split("/")[1] for name in found.files if "/" in name}
    assert len(hows) == 1 + 4 * 2
    for i, (name, ids) in enumerate(expected.items()):
        for how in hows:
            offsets = found[f"{i}/{how}/offsets"][1:-1]
            assert [part.tolist() for part in np.split(found[f"{i}/{how}/ids"], offsets)] == ids, (name, how)


@pytest.mark.parametrize("dim", [2, 5, 64, 300])
def test_scores_that_hug_tau(rng: np.random.Generator, dim: int) -> None:
    case = hard_cases.hugging(rng, dim)
    plain = case.keys.astype(np.float64) @ case.queries[0].astype(np.float64)
    differs = 0
    for how, matches in hard_cases.searches(case):
        check(matches, case.keys, case.queries, case.tau)
        differs += sum(
            set(match.ids.tolist()) != set(np.flatnonzero(plain >= tau).tolist())
            for match, tau in zip(matches, case.tau, strict=True)
        )
        assert matches.stats.n_exact > 0, how
    # The negative control: a product in float64 decides differently somewhere.
    assert dim < 64 or differs > 0


def test_checker_on_a_missing_neighbour(rng: np.random.Generator) -> None:
    """The negative control: the key whose score is tau, left out, is missed; taken in an ulp above, it is too many."""
    keys = rng.normal(size=(70, 9)).astype(np.float32)
    tau = float(scores(keys[0], keys)[5])
    index = Index.build(keys)
    at, above = index.search(keys[0], tau), index.search(keys[0], np.nextafter(tau, math.inf))
    assert set(at.ids) - set(above.ids) == {5}
    check(at, keys, keys[0], tau)
    for wrong, threshold in ((above, tau), (at, np.nextafter(tau, math.inf))):
        with pytest.raises(AssertionError):
            check(wrong, keys, keys[0], threshold)


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_with_removed_and_rewritten_cells(rng: np.random.Generator, dtype: str, options: dict) -> None:
    """After changes no bound is stale: keys grow, shrink, turn infinite and back."""
    case = next(c for c in hard_cases.cases() if c.name == f"normal, {dtype}, 67")
    keys, live = case.keys.copy(), np.ones(len(case.keys), bool)
    index = Index.build(keys, **options)
    for size in (1.0, 1e4, 1e-4, math.inf, 1.0, 0.0):
        written = rng.permutation(len(keys))[:40]
        with np.errstate(invalid="ignore"):
            keys[written] = stored(rng.normal(size=(40, 67)) * size, dtype)
        index.update(written, keys[written])
        live[written] = True
        gone = rng.permutation(np.flatnonzero(live))[:30]
        index.remove(gone)
        live[gone] = False
        for method in ("sum", "sweep") if index.kind == "ball" else ("sum",):
            found = index.search(case.queries, case.tau, method=method)
            check(found, keys, case.queries, case.tau, live)


@pytest.mark.parametrize("options", OPTIONS[1:], ids=name_of)
def test_filter_at_the_scores_of_the_subspaces(rng: np.random.Generator, options: dict) -> None:
    """Each subspace's threshold lies at a key's score there, or an ulp beside it."""
    keys = rng.integers(-2, 3, (150, 12)).astype(np.float32) / 3
    keys[::10] = keys[0]
    keys[3, 5] = math.nan
    queries = rng.normal(size=(12, 12)).astype(np.float32)
    parts = [slice(0, 4), slice(4, 8), slice(8, 12)]
    index = Index.build(keys, n_subspaces=3, **options)
    for steps in (-1, 0, 1):
        each = np.array([[scores(q[part], keys[:1, part])[0] for part in parts] for q in queries])
        each = np.nextafter(each, steps * math.inf) if steps else each
        found = index.search(queries, -math.inf, method="filter", subspace_tau=each)
        check(found, keys, queries, -math.inf, subspace_tau=each)
        # The scores are rounded: only an ulp beside them it is certain on which side the key is.
        assert steps == 0 or all((0 in match.ids) == (steps < 0) for match in found)
        assert all(3 in match.ids for match in found)


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
def test_infinite_thresholds(rng: np.random.Generator, options: dict) -> None:
    keys = rng.normal(size=(130, 10)).astype(np.float32)
    keys[17, 3], keys[70, 0], keys[129, 9] = math.nan, math.inf, -math.inf
    index = Index.build(keys, **options)
    for query in (keys[0], np.zeros(10, np.float32), -keys[0]):
        assert index.search(query, math.inf).ids.tolist() == [17, 70, 129]
        assert index.search(query, -math.inf).ids.tolist() == list(range(130))
        assert set(index.search(query, 1e300).ids) == {17, 70, 129}


def test_many_queries_share_a_scan(rng: np.random.Generator) -> None:
    """Queries are bounded in batches; each finds what it finds alone."""
    keys = rng.normal(size=(2, 500, 33)).astype(np.float32)
    queries = rng.normal(size=(2, 21, 33)).astype(np.float32)
    queries[0, 3] *= 1e30
    queries[1, 7] = 0
    tau = rng.normal(size=42) * 4
    for kind in ("grid", "ball"):
        index = Index.build(keys, kind)
        together: Matches = index.search(queries, tau)
        check(together, keys, queries, tau)
        for head in range(2):
            alone = Index.build(keys[head], kind)
            for i in range(21):
                one = alone.search(queries[head, i], tau[head * 21 + i])
                assert one.ids.tolist() == together[head * 21 + i].ids.tolist()


def test_cases_are_what_they_claim() -> None:
    """The negative control of the data: there are ties, subnormals, infinities and all thresholds among them."""
    all_cases: list[Case] = list(hard_cases.cases())
    assert any((np.abs(c.keys.astype(np.float64)) < 2.0**-126).any() and c.keys.any() for c in all_cases)
    assert any(np.isinf(c.keys.astype(np.float64)).any() for c in all_cases)
    assert any((c.tau == math.inf).any() for c in all_cases)
    assert any(np.abs(c.queries).max() > 3e38 for c in all_cases)
    assert sum(len(c.tau) * len(c.keys) for c in all_cases) > 1e6
