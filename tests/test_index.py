"""The index as a library: every dtype, layout and shape; what it finds is the exact set, after every change."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading

import numpy as np
import pytest

from exact import DTYPES, KINDS, OPTIONS, check, matching, name_of, normal, scores, search_and_check, stored
from louver_llama import Index, Matches, oracles

DIMS = (1, 3, 16, 63, 64, 65, 97, 128, 256, 1024)
SIZES = (0, 1, 63, 64, 65, 1000)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_dims(rng: np.random.Generator, dim: int, dtype: str, options: dict) -> None:
    keys = stored(normal(rng, 130, dim), dtype)
    index = Index.build(keys, **options)
    assert (index.kind, index.dtype, index.dim, index.n_head_kv) == (options["kind"], dtype, dim, 1)
    search_and_check(index, keys, normal(rng, 3, dim))


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("n", SIZES)
def test_sizes(rng: np.random.Generator, n: int, options: dict) -> None:
    keys = normal(rng, n, 24)
    index = Index.build(keys, **options)
    assert index.n_positions == len(index) == n
    search_and_check(index, keys, normal(rng, 2, 24))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_head_kv", "n_gqa"), [(1, 1), (1, 7), (2, 1), (3, 4), (8, 9)])
def test_heads_and_groups(rng: np.random.Generator, n_head_kv: int, n_gqa: int, kind: str) -> None:
    keys = normal(rng, n_head_kv, 150, 16) + np.arange(n_head_kv, dtype=np.float32)[:, None, None]
    queries = normal(rng, n_head_kv, n_gqa, 16)
    index = Index.build(keys, kind)
    flat = queries.reshape(-1, 16)
    search_and_check(index, keys, flat)
    by_head, by_query = index.search(queries, 2.0), index.search(flat, 2.0)
    assert by_head.shape == (n_head_kv, n_gqa)
    assert by_query.shape == (n_head_kv * n_gqa,)
    assert by_head.ids.tolist() == by_query.ids.tolist()
    for position in (0, 149):
        key = index.key(position)
        assert key.shape == ((16,) if n_head_kv == 1 else (n_head_kv, 16))
        assert np.array_equal(np.atleast_2d(key), keys[:, position])


# Changes


@pytest.mark.parametrize("options", OPTIONS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES)
def test_changes(rng: np.random.Generator, dtype: str, options: dict) -> None:
    keys = stored(normal(rng, 2, 400, 20), dtype)
    queries = normal(rng, 4, 20)
    index = Index.build(keys[:, :100], **options)
    for first, end in ((100, 101), (101, 190), (190, 400)):
        assert index.append(keys[:, first:end]) == range(first, end)
        search_and_check(index, keys[:, :end], queries)
    live = np.ones(400, bool)

    gone = rng.permutation(400)[:150]
    index.remove(gone)
    live[gone] = False
    search_and_check(index, keys, queries, live=live)

    written = np.concatenate([gone[:60], np.flatnonzero(live)[:50]])
    keys[:, written] = stored(normal(rng, 2, 110, 20) * 3, dtype)
    index.update(written.tolist(), keys[:, written])
    live[written] = True
    search_and_check(index, keys, queries, live=live)

    index.rebuild()
    search_and_check(index, keys, queries, live=live)
    assert len(index) == live.sum()
    assert [i in index for i in range(-1, 401)] == [False, *live.tolist(), False]

    index.remove(np.flatnonzero(live))
    live[:] = False
    assert len(index) == 0
    assert index.n_positions == 400
    assert index.search(queries, -math.inf).counts.tolist() == [0] * 4
    index.update([7], keys[:, 7:8])
    assert [match.ids.tolist() for match in index.search(queries, -math.inf)] == [[7]] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_changes_of_nothing(rng: np.random.Generator, kind: str) -> None:
    keys = normal(rng, 70, 8)
    index = Index.build(keys[:0], kind)
    assert index.append(keys[:0]) == range(0, 0)
    index.rebuild()
    index.append(keys)
    index.update([], keys[:0])
    index.remove(np.empty(0, np.int64))
    index.remove(iter(()))
    search_and_check(index, keys, keys[:2])
    assert len(index.search(keys[:0], 1.0)) == 0


def test_positions_in_any_form(rng: np.random.Generator) -> None:
    index = Index.build(normal(rng, 20, 4))
    for positions in (
        range(2),
        iter([2]),
        (3,),
        {4},
        np.array([5], np.uint8),
        [np.int16(6)],
        np.arange(7, 15)[::-2],
    ):
        index.remove(positions)
    assert [i for i in range(20) if i in index] == [7, 9, 11, 13, *range(15, 20)]


# What a search returns


def test_matches(rng: np.random.Generator) -> None:
    keys, queries = normal(rng, 300, 8), normal(rng, 5, 8)
    matches = Index.build(keys).search(queries, [0.0, 2.0, math.inf, 1.0, -math.inf])
    assert len(matches) == 5
    assert matches.counts.tolist() == [len(match.ids) for match in matches]
    assert matches.counts[2] == 0
    assert matches.counts[4] == 300
    assert matches.offsets[0] == 0
    assert matches.offsets[-1] == len(matches.ids) == len(matches.scores)
    for i, (ids, found) in enumerate(matches):
        assert ids.tolist() == matches[i].ids.tolist() == matches[i - 5].ids.tolist()
        assert (np.diff(ids) > 0).all()
        assert found.tolist() == matches.scores[matches.offsets[i] : matches.offsets[i + 1]].tolist()
    assert [match.ids.tolist() for match in matches[1:5:2]] == [
        matches[1].ids.tolist(),
        matches[3].ids.tolist(),
    ]
    assert [match.ids.tolist() for match in matches[::-1]] == [
        match.ids.tolist() for match in reversed(matches)
    ]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            matches[outside]
    stats = matches.stats
    assert 0 <= stats.n_exact <= stats.n_scored <= 5 * 300
    assert stats.n_bounded <= 5 * 300
    assert "5 queries" in repr(matches)


def test_shapes(rng: np.random.Generator) -> None:
    keys = normal(rng, 1, 50, 8)
    index = Index.build(keys)
    one = index.search(keys[0, 0], 0.5)
    assert (one.shape, len(one)) == ((), 1)
    assert index.search(keys[0, :6], 0.5).shape == (6,)
    assert index.search(keys[:, :6], 0.5).shape == (1, 6)
    assert (
        index.search(keys[:, :6], np.full(6, 0.5)).ids.tolist() == index.search(keys[0, :6], 0.5).ids.tolist()
    )


def test_the_checker_sees_errors(rng: np.random.Generator) -> None:
    """The negative control: a result with one id missing, one too many or a wrong score is found out."""
    keys, queries = normal(rng, 100, 8), normal(rng, 1, 8)
    good = Index.build(keys).search(queries, 1.0)
    check(good, keys, queries, 1.0)
    without = np.arange(len(good.ids)) != 3
    other = np.setdiff1d(np.arange(100), good.ids)[:1]
    bad = [
        (good.ids[without], good.scores[without]),
        (np.append(good.ids, other), np.append(good.scores, scores(queries[0], keys[other]))),
        (good.ids, np.nextafter(good.scores, 9) + 1e-14),
    ]
    for ids, found in bad:
        with pytest.raises(AssertionError):
            check(Matches(np.array([0, len(ids)]), ids, found, good.stats, (1,)), keys, queries, 1.0)


# Filter


@pytest.mark.parametrize("options", OPTIONS[1:], ids=name_of)
@pytest.mark.parametrize(("dim", "n_subspaces"), [(1, 1), (7, 3), (16, 16), (40, 6)])
def test_filter(rng: np.random.Generator, dim: int, n_subspaces: int, options: dict) -> None:
    keys, queries = normal(rng, 2, 300, dim), normal(rng, 4, dim)
    index = Index.build(keys, n_subspaces=n_subspaces, **options)
    for least in (-math.inf, -1.0, -0.1, math.inf):
        each = np.full((4, n_subspaces), least)
        found = index.search(queries, -2.0, method="filter", subspace_tau=each)
        check(found, keys, queries, -2.0, subspace_tau=each)
        same = index.search(queries, -2.0, method="filter", subspace_tau=each[0])
        assert same.ids.tolist() == found.ids.tolist()
    each = rng.normal(size=(4, n_subspaces)) - 1
    check(
        index.search(queries, -2.0, method="filter", subspace_tau=each),
        keys,
        queries,
        -2.0,
        subspace_tau=each,
    )


# Introspection


@pytest.mark.parametrize("kind", KINDS)
def test_introspection(rng: np.random.Generator, kind: str) -> None:
    keys = stored(normal(rng, 2, 100, 16), "float16")
    index = Index.build(keys, kind, n_threads=2)
    index.remove([3])
    stats, found = index.stats, json.loads(json.dumps(index.to_dict()))
    assert (stats.n_positions, stats.n_live, stats.dim, stats.n_head_kv) == (100, 99, 16, 2)
    assert stats.memory == index.memory_usage
    assert stats.memory.total == stats.memory.keys + stats.memory.index + stats.memory.other
    assert stats.memory.keys >= keys.nbytes
    assert stats.index_share == stats.memory.index / keys.nbytes
    assert found["kind"] == kind
    assert found["n_live"] == 99
    assert found["memory"]["total"] == stats.memory.total
    assert found["options"]["n_threads"] == 2
    assert ("group_size" in found["options"]) == (kind == "ball")
    assert (
        repr(index) == f"Index(kind={kind!r}, dtype='float16', n_head_kv=2, dim=16, n_positions=100, live=99)"
    )
    for odd in ("3", 3.0, None, -1, 100, 2**64, 3):
        assert odd not in index
    assert np.int8(4) in index
    assert np.array_equal(index.key(3), keys[:, 3].astype(np.float32))  # removed, but it still stands


@pytest.mark.parametrize("dim", [64, 128])
def test_grid_is_small(rng: np.random.Generator, dim: int) -> None:
    keys = stored(normal(rng, 20_000, dim), "float16")
    index = Index.build(keys)
    assert 0 < index.memory_usage.index <= 0.6 * keys.nbytes
    for first in range(0, 1000, 10):
        index.append(keys[first : first + 10])
    assert index.stats.index_share <= 0.6


# Threads


@pytest.mark.parametrize("kind", KINDS)
def test_searches_beside_changes(rng: np.random.Generator, kind: str) -> None:
    """Each search sees the index as it was between two changes."""
    keys, queries = normal(rng, 3000, 16), normal(rng, 4, 16)
    whole = matching(keys, queries, 4.0)
    sizes = list(range(1000, 3001, 100))
    expected = {tuple(int((ids < n).sum()) for ids in whole) for n in sizes}
    index = Index.build(keys[:1000], kind, merge_at=64)
    done = threading.Event()
    errors: list[object] = []

    def search() -> None:
        try:
            while not done.is_set():
                found = index.search(queries, 4.0)
                for ids, all_ids in zip((match.ids for match in found), whole, strict=True):
                    assert ids.tolist() == all_ids[: len(ids)].tolist()
                assert tuple(found.counts.tolist()) in expected
                index.select(queries, oracles.SampleMax(n_samples=8))
                assert len(index) <= index.n_positions
                json.dumps(index.to_dict())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for first in sizes[:-1]:
        index.append(keys[first : first + 100])
    index.rebuild()
    done.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert errors == []
    check(index.search(queries, 4.0), keys, queries, 4.0)


BORROWED = """
import threading
import numpy as np
from louver_llama import Index

keys = np.ones((20000, 64), np.float32)
for _ in range(40):
    index = Index.build(keys, copy=False)
    done = threading.Event()

    def look():
        while not done.is_set():
            index.n_positions

    thread = threading.Thread(target=look)
    thread.start()
    index.append(keys[:1])  # copies, and lets go of the caller's memory
    done.set()
    thread.join()
"""


def test_borrowed_keys_are_let_go_beside_other_threads() -> None:
    """In a process of its own: a deadlock there holds the GIL for ever."""
    subprocess.run([sys.executable, "-c", BORROWED], check=True, timeout=60)
