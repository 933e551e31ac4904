"""Bad input: an error that names the argument, what was given and what is accepted, and an index that is as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import louver_llama as ll
from exact import KINDS, state_of
from louver_llama import Index, oracles

KEYS = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
HEADS = np.stack([KEYS, -KEYS])
QUERY = KEYS[0]
NAN = np.where(np.arange(6) == 2, np.nan, QUERY).astype(np.float32)


def fails(call: Callable[[], object], error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert type(raised.value) is error and all(word in message for word in words), message


BUILD = [
    ((KEYS.astype(np.float64),), {}, TypeError, ("keys", "float64", "float32, float16 or bfloat16")),
    ((KEYS.astype(np.int8),), {}, TypeError, ("keys", "int8", "float32")),
    ((KEYS.astype(">f4"),), {}, TypeError, ("keys", ">f4", "float32")),
    (([[1.0, 2.0]],), {}, TypeError, ("keys", "list", "float32")),
    ((None,), {}, TypeError, ("keys", "NoneType")),
    ((np.ma.masked_array(KEYS),), {}, TypeError, ("keys", "masked")),
    ((QUERY,), {}, ValueError, ("keys", "(6,)", "(n, dim)")),
    ((KEYS[None, None],), {}, ValueError, ("keys", "(1, 1, 100, 6)", "(n_head_kv, n, dim)")),
    ((KEYS[:, :0],), {}, ValueError, ("keys", "head_dim 0", "1 to 1024")),
    ((np.zeros((1, 1025), np.float32),), {}, ValueError, ("keys", "head_dim 1025", "1 to 1024")),
    ((HEADS[:0],), {}, ValueError, ("keys", "(0, 100, 6)", "n_head_kv")),
    ((np.zeros((1025, 1, 1), np.float32),), {}, ValueError, ("n_head_kv", "1025", "1 to 1024")),
    ((KEYS[:, ::2],), {"copy": False}, ValueError, ("keys", "contiguous")),
    ((KEYS,), {"copy": 1}, TypeError, ("copy", "1", "True or False")),
    ((KEYS, "tree"), {}, ValueError, ("kind", "tree", "grid, ball")),
    ((KEYS, 3), {}, TypeError, ("kind", "3")),
    ((KEYS,), {"n_threads": -1}, ValueError, ("n_threads", "-1", "[0, 1024]")),
    ((KEYS,), {"n_threads": 2.0}, TypeError, ("n_threads", "2.0", "integer")),
    ((KEYS, "ball"), {"n_subspaces": 7}, ValueError, ("n_subspaces", "7", "[1, 6]")),
    ((KEYS, "ball"), {"n_subspaces": 0}, ValueError, ("n_subspaces", "0")),
    ((KEYS, "ball"), {"group_size": 0}, ValueError, ("group_size", "0", "[1,")),
    ((KEYS, "ball"), {"grouping": "forest"}, ValueError, ("grouping", "forest", "tree, kmeans")),
    ((KEYS, "ball"), {"enclosure": "cone"}, ValueError, ("enclosure", "cone", "ball, box")),
    ((KEYS, "ball"), {"merge_at": 0}, ValueError, ("merge_at", "0")),
    ((KEYS, "ball"), {"seed": -1}, ValueError, ("seed", "-1")),
    ((KEYS, "ball"), {"seed": True}, TypeError, ("seed", "True")),
]


@pytest.mark.parametrize(("arguments", "named", "error", "words"), BUILD)
def test_build(
    arguments: tuple[Any, ...], named: dict[str, Any], error: type[Exception], words: tuple[str, ...]
) -> None:
    fails(lambda: Index.build(*arguments, **named), error, *words)


CALLS: list[tuple[str, Callable[[Index], object], type[Exception], tuple[str, ...]]] = [
    ("append dtype", lambda i: i.append(HEADS.astype(np.float16)), TypeError, ("keys", "float16", "float32")),
    ("append dim", lambda i: i.append(HEADS[:, :, :5]), ValueError, ("keys", "head_dim 5", "6")),
    ("append heads", lambda i: i.append(KEYS), ValueError, ("keys", "1 heads", "2")),
    ("append rank", lambda i: i.append(QUERY), ValueError, ("keys", "(6,)")),
    ("update count", lambda i: i.update([1, 2], HEADS[:, :3]), ValueError, ("keys", "3", "2 positions")),
    ("update range", lambda i: i.update([100], HEADS[:, :1]), ValueError, ("positions", "100", "99")),
    ("update negative", lambda i: i.update([-1], HEADS[:, :1]), ValueError, ("positions", "-1")),
    ("update array", lambda i: i.update(np.array([-1]), HEADS[:, :1]), ValueError, ("positions", "-1")),
    (
        "update repeated",
        lambda i: i.update([5, 5], HEADS[:, :2]),
        ValueError,
        ("positions", "5", "more than once"),
    ),
    ("remove range", lambda i: i.remove([3, 100]), ValueError, ("positions", "100", "99")),
    ("remove repeated", lambda i: i.remove([3, 4, 3]), ValueError, ("positions", "3", "more than once")),
    ("remove removed", lambda i: i.remove([1, 50]), ValueError, ("positions", "50", "removed before")),
    ("remove float", lambda i: i.remove([1.5]), TypeError, ("positions", "1.5", "integers")),
    ("remove floats", lambda i: i.remove(np.array([1.0])), TypeError, ("positions", "float64", "integers")),
    ("remove bool", lambda i: i.remove([True, 2]), TypeError, ("positions", "True", "integers")),
    ("remove mask", lambda i: i.remove(np.ones(100, bool)), TypeError, ("positions", "bool", "integers")),
    ("remove one", lambda i: i.remove(5), TypeError, ("positions", "5")),  # type: ignore[arg-type]
    ("remove huge", lambda i: i.remove([2**64]), ValueError, ("positions", str(2**64))),
    ("remove rank", lambda i: i.remove(np.ones((1, 1), int)), ValueError, ("positions", "(1, 1)", "(n,)")),
    ("query dim", lambda i: i.search(HEADS[:, 0, :5], 1), ValueError, ("queries", "head_dim 5", "6")),
    ("query count", lambda i: i.search(QUERY, 1), ValueError, ("queries", "1", "n_head_kv = 2")),
    (
        "query heads",
        lambda i: i.search(np.ones((3, 2, 6), np.float32), 1),
        ValueError,
        ("queries", "(3, 2, 6)"),
    ),
    ("query rank", lambda i: i.search(HEADS[None], 1), ValueError, ("queries", "(1, 2, 100, 6)", "(dim,)")),
    (
        "query dtype",
        lambda i: i.search(HEADS[:, 0].astype(float), 1),
        TypeError,
        ("queries", "float64", "float32"),
    ),
    ("query NaN", lambda i: i.search(np.stack([QUERY, NAN]), 1), ValueError, ("queries", "nan", "[1, 2]")),
    (
        "query inf",
        lambda i: i.search(np.stack([QUERY * np.inf] * 2), 1),
        ValueError,
        ("queries", "inf", "finite"),
    ),
    ("tau NaN", lambda i: i.search(HEADS[:, 0], np.nan), ValueError, ("tau", "NaN", "infinity")),
    ("tau one NaN", lambda i: i.search(HEADS[:, 0], [1.0, np.nan]), ValueError, ("tau", "NaN")),
    ("tau count", lambda i: i.search(HEADS[:, 0], [1.0, 2.0, 3.0]), ValueError, ("tau", "(3,)", "(2,)")),
    ("tau word", lambda i: i.search(HEADS[:, 0], "high"), TypeError, ("tau", "high")),  # type: ignore[arg-type]
    ("tau ragged", lambda i: i.search(HEADS[:, 0], [[1], [1, 2]]), TypeError, ("tau",)),  # type: ignore[list-item]
    ("tau rounds", lambda i: i.search(HEADS[:, 0], 2**53 + 1), ValueError, ("tau", "float64")),
    (
        "method",
        lambda i: i.search(HEADS[:, 0], 1, method="guess"),
        ValueError,
        ("method", "guess", "sum, sweep"),
    ),  # type: ignore[arg-type]
    ("method type", lambda i: i.search(HEADS[:, 0], 1, method=1), TypeError, ("method", "1")),  # type: ignore[arg-type]
    (
        "filter alone",
        lambda i: i.search(HEADS[:, 0], 1, method="filter"),
        ValueError,
        ("filter",),
    ),
    (
        "filter less",
        lambda i: i.search(HEADS[:, 0], 1, subspace_tau=[1]),
        ValueError,
        ("subspace_tau", "filter"),
    ),
    ("oracle", lambda i: i.select(HEADS[:, 0], 0.05), TypeError, ("oracle", "0.05")),  # type: ignore[arg-type]
    ("oracle base", lambda i: i.select(HEADS[:, 0], oracles.Oracle()), TypeError, ("oracle",)),
    ("scale", lambda i: i.select(HEADS[:, 0], oracles.Mass(), scale=0), ValueError, ("scale", "0")),
    (
        "scale NaN",
        lambda i: i.select(HEADS[:, 0], oracles.Mass(), scale=np.nan),
        ValueError,
        ("scale", "nan"),
    ),
    ("scale word", lambda i: i.select(HEADS[:, 0], oracles.Mass(), scale="x"), TypeError, ("scale", "x")),  # type: ignore[arg-type]
    ("key", lambda i: i.key(100), ValueError, ("position", "100", "99")),
    ("values", lambda i: ll.attention(HEADS[:, 0], i, HEADS[:, :99]), ValueError, ("values", "99", "100")),
    ("value heads", lambda i: ll.attention(HEADS[:, 0], i, KEYS), ValueError, ("values", "1 heads", "2")),
    (
        "value dtype",
        lambda i: ll.attention(HEADS[:, 0], i, HEADS.astype(int)),
        TypeError,
        ("values", "int64"),
    ),
    (
        "compensate",
        lambda i: ll.attention(HEADS[:, 0], i, HEADS, compensate=1),
        TypeError,
        ("compensate", "1"),
    ),  # type: ignore[arg-type]
    ("no index", lambda i: ll.attention(QUERY, KEYS, KEYS), TypeError, ("index", "louver_llama.Index")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("call", "error", "words"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_calls(
    kind: str, call: Callable[[Index], object], error: type[Exception], words: tuple[str, ...]
) -> None:
    index = Index.build(HEADS, kind)  # type: ignore[arg-type]
    index.remove([50])
    before = state_of(index)
    fails(lambda: call(index), error, *words)
    assert state_of(index) == before


def test_methods_of_the_ball_are_refused_by_the_grid() -> None:
    index = Index.build(KEYS)
    for method in ("sweep", "filter"):
        given = {"subspace_tau": np.zeros(16)} if method == "filter" else {}
        fails(
            lambda method=method, given=given: index.search(QUERY, 1, method=method, **given),
            ValueError,
            "method",
            "grid",
            "sum",
        )
    ball = Index.build(KEYS, "ball", n_subspaces=3)
    fails(
        lambda: ball.search(QUERY, 1, method="filter", subspace_tau=[1, 2]),
        ValueError,
        "subspace_tau",
        "(2,)",
        "(1, 3)",
    )
    fails(
        lambda: ball.search(QUERY, 1, method="filter", subspace_tau=[1, 2, np.nan]),
        ValueError,
        "subspace_tau",
        "NaN",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_index_has_no_mass(kind: str) -> None:
    for index in (Index.build(KEYS[:0], kind), Index.build(KEYS, kind)):  # type: ignore[arg-type]
        index.remove(range(len(index)))
        assert index.search(QUERY, -np.inf).ids.size == 0
        for oracle in (oracles.Mass(), oracles.Fixed(0), oracles.SampleMax(), oracles.TopK(3)):
            fails(
                lambda index=index, oracle=oracle: index.select(QUERY, oracle), ValueError, "index is empty"
            )
        values = np.zeros((index.n_positions, 4), np.float32)
        fails(
            lambda index=index, values=values: ll.attention(QUERY, index, values),
            ValueError,
            "index is empty",
        )
