"""Bad input: a TypeError or ValueError that names the argument, what was given, what is accepted; nothing changes."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from exact import DTYPES, KINDS, normal, state_of, stored
from louver_llama import Index, attention, oracles

N, DIM = 70, 6
Call = Callable[[Index, NDArray[np.float32]], Any]


@pytest.fixture
def keys() -> NDArray[np.float32]:
    return normal(np.random.default_rng(16), N, DIM)


@pytest.fixture(params=KINDS)
def index(request: pytest.FixtureRequest, keys: NDArray) -> Index:
    index = Index.build(keys, request.param, n_subspaces=3, merge_at=8)
    index.remove([9, 64])
    return index


Error = tuple[type[Exception], str]


def value(*words: str) -> Error:
    """A ValueError with these words in this order, as pytest.raises matches them."""
    return ValueError, ".*".join(map(re.escape, words))


def type_(*words: str) -> Error:
    """A TypeError with these words in this order."""
    return TypeError, ".*".join(map(re.escape, words))


class ElsewhereArray:
    def __dlpack__(self, **settings: object) -> object:
        raise AssertionError("not reached")

    def __dlpack_device__(self) -> tuple[int, int]:
        return 10, 0


ARRAYS: list[tuple[Any, Error]] = [
    (None, type_("keys is a NoneType", "accepted is an array of float32, float16 or bfloat16")),
    ([[1.0] * DIM], type_("keys is a list", "accepted")),
    ("text", type_("keys is a str", "accepted")),
    (np.ones((2, DIM)), type_("keys has dtype float64", "accepted is float32")),
    (np.ones((2, DIM), np.int8), type_("keys has dtype int8", "accepted is float32")),
    (np.ones((2, DIM), ">f4"), type_("keys has dtype >f4", "accepted is float32")),
    (np.ones((2, DIM), object), type_("keys has dtype object", "accepted is float32")),
    (np.ones((2, DIM), complex), type_("keys has dtype complex128", "accepted is float32")),
    (np.ma.ones((2, DIM), np.float32), type_("keys is a masked array", "accepted")),
    (np.float32(1), value("keys has shape ()", "accepted is (n, dim) or (n_head_kv, n, dim)")),
    (np.ones(DIM, np.float32), value("keys has shape (6,)", "accepted is (n, dim)")),
    (np.ones((1, 1, 2, DIM), np.float32), value("keys has shape (1, 1, 2, 6)", "accepted")),
    (memoryview(bytes(24)), type_("keys has dtype uint8", "accepted is float32")),
    (ElsewhereArray(), value("keys is on device (10, 0)", "accepted is host memory")),
]


@pytest.mark.parametrize(("given", "error"), ARRAYS, ids=str)
def test_arrays(index: Index, given: object, error: Error) -> None:
    before = state_of(index)
    kind, pattern = error
    calls: list[tuple[str, Callable[[], object]]] = [
        ("keys", lambda: Index.build(given)),
        ("keys", lambda: index.append(given)),
        ("keys", lambda: index.update([1, 2], given)),
        ("values", lambda: attention(np.ones(DIM, np.float32), index, given)),
    ]
    # A query may have fewer dimensions.
    if kind is TypeError:
        calls.append(("queries", lambda: index.search(given, 1.0)))
        calls.append(("queries", lambda: index.select(given, oracles.Mass())))
        calls.append(("queries", lambda: attention(given, index, index)))
    for name, call in calls:
        with pytest.raises(kind, match=pattern.replace("keys", name)):
            call()
    assert state_of(index) == before


BUILD: list[tuple[dict[str, Any], Error]] = [
    ({"keys": np.ones((2, 0), np.float32)}, value("keys has head_dim 0", "accepted is 1 to 1024")),
    ({"keys": np.ones((2, 1025), np.float32)}, value("keys has head_dim 1025", "1 to 1024")),
    (
        {"keys": np.ones((0, 2, 3), np.float32)},
        value("keys has shape (0, 2, 3)", "n_head_kv >= 1"),
    ),
    ({"keys": np.ones((1025, 1, 1), np.float32)}, value("n_head_kv is 1025", "1 to 1024")),
    ({"kind": "tree"}, value('kind is "tree"', "accepted are grid, ball")),
    ({"kind": 1}, type_("kind must be a string, not 1")),
    ({"kind": None}, type_("kind must be a string, not None")),
    ({"copy": 1}, type_("copy must be True or False, not 1")),
    ({"n_threads": -1}, value("n_threads must be an integer in [0, 1024], not -1")),
    ({"n_threads": 1025}, value("n_threads", "not 1025")),
    ({"n_threads": 1.0}, type_("n_threads must be an integer", "not 1.0")),
    ({"n_threads": True}, type_("n_threads must be an integer", "not True")),
    ({"n_subspaces": 0}, value("n_subspaces must be an integer in [1, 6], not 0")),
    ({"n_subspaces": 7}, value("n_subspaces must be an integer in [1, 6], not 7")),
    ({"n_subspaces": "3"}, type_("n_subspaces must be an integer", "not '3'")),
    ({"group_size": 0}, value("group_size must be an integer", "not 0")),
    ({"group_size": 2**31}, value("group_size must be an integer", "not 2147483648")),
    ({"grouping": "random"}, value('grouping is "random"', "accepted are tree, kmeans")),
    ({"grouping": b"tree"}, type_("grouping must be a string")),
    ({"enclosure": "cone"}, value('enclosure is "cone"', "accepted are ball, box")),
    ({"merge_at": 0}, value("merge_at must be an integer", "not 0")),
    ({"seed": -1}, value("seed must be an integer", "not -1")),
    ({"seed": 2**64}, value("seed must be an integer", "not 18446744073709551616")),
]


@pytest.mark.parametrize(("given", "error"), BUILD, ids=str)
def test_build(keys: NDArray, given: dict[str, Any], error: Error) -> None:
    with pytest.raises(error[0], match=error[1]):
        Index.build(**({"keys": keys, "kind": "ball"} | given))


@pytest.mark.parametrize("kind", KINDS)
def test_not_contiguous_without_a_copy(keys: NDArray, kind: str) -> None:
    for given in (
        np.asfortranarray(keys),
        keys[:, ::2],
        keys[:, ::-1],
        np.broadcast_to(keys[:, :1], (N, DIM)),
    ):
        with pytest.raises(ValueError, match=r"keys are not contiguous .*; accepted with a copy"):
            Index.build(given, kind, copy=False)
        assert len(Index.build(given, kind)) == N
    assert len(Index.build(keys[:, :1], kind, copy=False)) == N  # one channel lies in no order


CALLS: list[tuple[str, Call, Error]] = [
    # keys that do not fit the index
    ("append dim", lambda i, k: i.append(k[:, 1:]), value("keys has head_dim 5", "the index's 6")),
    ("append heads", lambda i, k: i.append(k.reshape(2, -1, DIM)), value("keys has 2 heads", "n_head_kv = 1")),
    ("append dtype", lambda i, k: i.append(stored(k, "float16")), type_("keys has dtype float16", "float32")),
    ("append bf16", lambda i, k: i.append(stored(k, "bfloat16")), type_("keys has dtype bfloat16", "float32")),
    ("update dim", lambda i, k: i.update([1], k[:1, 1:]), value("keys has head_dim 5", "the index's 6")),
    ("update length", lambda i, k: i.update([1, 2], k[:3]), value("keys has 3 keys", "each of 2 positions")),
    ("update none", lambda i, k: i.update([], k[:1]), value("keys has 1 keys", "each of 0 positions")),
    # positions
    ("number", lambda i, k: i.remove(5), type_("positions must be a sequence", "not 5")),
    ("None", lambda i, k: i.remove(None), type_("positions must be a sequence", "not None")),
    ("text", lambda i, k: i.remove("12"), type_("positions must be integers", "not '1'")),
    ("float", lambda i, k: i.remove([1.0]), type_("positions must be integers", "not 1.0")),
    ("floats", lambda i, k: i.remove(np.ones(2)), type_("positions has dtype float64", "integers")),
    ("bool", lambda i, k: i.remove([True, 2]), type_("positions must be integers", "not True")),
    ("mask", lambda i, k: i.remove(np.ones(N, bool)), type_("positions has dtype bool", "integers")),
    ("rank", lambda i, k: i.remove(np.ones((2, 2), int)), value("positions has shape (2, 2)", "accepted is (n,)")),
    ("scalar", lambda i, k: i.remove(np.array(3)), value("positions has shape ()", "accepted is (n,)")),
    ("negative", lambda i, k: i.remove([1, -1]), value("positions", "-1")),
    ("below", lambda i, k: i.remove(np.array([1, -1])), value("positions has -1", "accepted is 0 to", "69")),
    ("beyond", lambda i, k: i.remove([1, N]), value("positions has 70", "accepted is 0 to", "69")),
    ("huge", lambda i, k: i.remove([2**64]), value("positions", "18446744073709551616")),
    ("wrapping", lambda i, k: i.remove(np.array([2**64 - 1], np.uint64)), value("positions", "1844674407370955161")),
    ("repeated", lambda i, k: i.remove([1, 2, 1]), value("positions has 1 more than once")),
    ("removed", lambda i, k: i.remove([1, 9]), value("positions has 9, which was removed before")),
    ("update repeated", lambda i, k: i.update([3, 3], k[:2]), value("positions has 3 more than once")),
    ("update beyond", lambda i, k: i.update([0, N], k[:2]), value("positions has 70", "accepted is 0 to")),
    ("update bool", lambda i, k: i.update([False], k[:1]), type_("positions must be integers", "not False")),
    ("key beyond", lambda i, k: i.key(N), value("position must be an integer in [0, 69], not 70")),
    ("key negative", lambda i, k: i.key(-1), value("position must be an integer in [0, 69], not -1")),
    ("key float", lambda i, k: i.key(1.0), type_("position must be an integer", "not 1.0")),
    # queries
    ("query dim", lambda i, k: i.search(k[:, 1:], 0.0), value("queries has head_dim 5", "the index's 6")),
    ("query rank", lambda i, k: i.search(k[None, None], 0.0), value("queries has shape (1, 1, 70, 6)", "accepted")),
    ("query heads", lambda i, k: i.search(k.reshape(2, -1, DIM), 0.0), value("queries has shape (2, 35, 6)", "(1, n_gqa, 6)")),
    ("query NaN", lambda i, k: i.search(k[:2] * math.nan, 0.0), value("queries has", "nan at [0, 0]", "finite")),
    ("query infinite", lambda i, k: i.search(np.full(DIM, math.inf, np.float32), 0.0), value("queries has inf", "finite")),
    ("select NaN", lambda i, k: i.select(k[:2] * math.nan, oracles.Mass()), value("queries has", "nan at [0, 0]", "finite")),
    # thresholds
    ("tau NaN", lambda i, k: i.search(k[0], math.nan), value("tau has a NaN", "accepted is a number or an infinity")),
    ("tau NaNs", lambda i, k: i.search(k[:2], [0.0, math.nan]), value("tau has a NaN", "accepted")),
    ("tau None", lambda i, k: i.search(k[0], None), type_("tau must be numbers", "not None")),
    ("tau text", lambda i, k: i.search(k[0], "1"), type_("tau must be numbers", "not '1'")),
    ("tau bool", lambda i, k: i.search(k[0], True), type_("tau must be numbers", "not True")),
    ("tau complex", lambda i, k: i.search(k[0], 1j), type_("tau must be numbers", "not 1j")),
    ("tau ragged", lambda i, k: i.search(k[:2], [[1], [1, 2]]), type_("tau must be numbers", "not [[1], [1, 2]]")),
    ("tau rounds", lambda i, k: i.search(k[0], 2**53 + 1), value("tau has a number that float64 cannot hold")),
    ("tau length", lambda i, k: i.search(k[:2], [1.0, 2.0, 3.0]), value("tau has shape (3,)", "(2,)")),
    ("tau rank", lambda i, k: i.search(k[:2], np.ones((2, 1))), value("tau has shape (2, 1)", "(2,)")),
    # methods
    ("method", lambda i, k: i.search(k[0], 0.0, method="all"), value('method is "all"', "accepted are sum, sweep, filter")),
    ("method type", lambda i, k: i.search(k[0], 0.0, method=0), type_("method must be a string, not 0")),
    ("filter not", lambda i, k: i.search(k[0], 0.0, subspace_tau=[0.0] * 3), value("subspace_tau", "'filter'", "'sum'")),
    # oracles, scale, values
    ("oracle", lambda i, k: i.select(k[0], "mass"), type_("oracle must be one of louver_llama.oracles, not 'mass'")),
    ("oracle class", lambda i, k: i.select(k[0], oracles.Mass), type_("oracle must be one of")),
    ("oracle base", lambda i, k: i.select(k[0], oracles.Oracle()), type_("racle")),
    ("scale 0", lambda i, k: i.select(k[0], oracles.Mass(), scale=0), value("scale must be a number above 0", "not 0")),
    ("scale NaN", lambda i, k: i.select(k[0], oracles.Mass(), scale=math.nan), value("scale", "not nan")),
    ("scale infinite", lambda i, k: i.select(k[0], oracles.Mass(), scale=math.inf), value("scale", "not inf")),
    ("scale text", lambda i, k: i.select(k[0], oracles.Mass(), scale="1"), type_("scale", "not '1'")),
    ("scale bool", lambda i, k: i.select(k[0], oracles.Mass(), scale=True), type_("scale", "not True")),
    ("values length", lambda i, k: attention(k[0], i, k[1:]), value("values has 69 rows", "the index's 70 positions")),
    ("values heads", lambda i, k: attention(k[0], i, np.stack([k, k])), value("values has 2 heads", "n_head_kv = 1")),
    ("values dim", lambda i, k: attention(k[0], i, np.ones((N, 1025), np.float32)), value("values has", "1025", "1 to 1024")),
    ("index", lambda i, k: attention(k[0], k, k), type_("index must be a louver_llama.Index")),
    ("compensate", lambda i, k: attention(k[0], i, k, compensate=1), type_("compensate must be True or False, not 1")),
    ("attention oracle", lambda i, k: attention(k[0], i, k, 0.05), type_("oracle must be one of", "not 0.05")),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_calls(index: Index, keys: NDArray, call: Call, error: Error) -> None:
    before = state_of(index)
    with pytest.raises(error[0], match=error[1]):
        call(index, keys)
    assert state_of(index) == before
    assert index.append(keys[:1]) == range(N, N + 1)  # and it still works
    assert state_of(index) != before  # the negative control


def test_methods_of_the_other_kind(keys: NDArray) -> None:
    grid, ball = Index.build(keys), Index.build(keys, "ball", n_subspaces=3)
    for settings in ({"method": "sweep"}, {"method": "filter", "subspace_tau": [0.0] * 6}):
        with pytest.raises(
            ValueError, match=r"method is '.*', accepted for an index of kind 'grid' is 'sum'"
        ):
            grid.search(keys[0], 0.0, **settings)
    with pytest.raises(ValueError, match="subspace_tau must be given"):
        ball.search(keys[0], 0.0, method="filter")
    for wrong, error in (
        ([0.0] * 4, value("subspace_tau has shape (4,)", "(1, 3)")),
        ([0.0, math.nan, 0.0], value("subspace_tau has a NaN", "accepted")),
        (["a"] * 3, type_("subspace_tau must be numbers")),
    ):
        with pytest.raises(error[0], match=error[1]):
            ball.search(keys[0], 0.0, method="filter", subspace_tau=wrong)


def test_queries_that_do_not_divide(keys: NDArray) -> None:
    index = Index.build(keys.reshape(2, -1, DIM))
    for queries in (keys[0], keys[:3]):
        with pytest.raises(
            ValueError, match="queries are [13], accepted is a multiple of the index's n_head_kv = 2"
        ):
            index.search(queries, 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_index(keys: NDArray, dtype: str, kind: str) -> None:
    never = Index.build(stored(keys[:0], dtype), kind)
    emptied = Index.build(stored(keys, dtype), kind)
    emptied.remove(range(N))
    for index in (never, emptied):
        assert len(index.search(keys[:2], -math.inf).ids) == 0
        for oracle in (oracles.Mass(), oracles.TopK(1), oracles.SampleMax(), oracles.Fixed(0.0)):
            for call in (
                lambda: index.select(keys[0], oracle),  # noqa: B023
                lambda: attention(keys[0], index, keys[: index.n_positions], oracle),  # noqa: B023
            ):
                with pytest.raises(ValueError, match=r"index is empty.*accepted is an index with live keys"):
                    call()
    with pytest.raises(ValueError, match="position"):
        never.key(0)
    with pytest.raises(ValueError, match="positions has 0"):
        never.remove([0])


@pytest.mark.parametrize("kind", KINDS)
def test_borrowed_index_stays_borrowed(keys: NDArray, kind: str) -> None:
    index = Index.build(keys, kind, copy=False)
    for call in (
        lambda: index.update([1, 1], keys[:2]),
        lambda: index.update([N], keys[:1]),
        lambda: index.append(keys[:, 1:]),
        lambda: index.remove([0, 0]),
    ):
        with pytest.raises(ValueError):
            call()
        assert index.stats.is_borrowed
