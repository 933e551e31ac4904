"""Keys and queries as they lie in memory: every layout, buffers, DLPack, and memory that is read without a copy."""

from __future__ import annotations

import array
import gc
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from exact import DTYPES, KINDS, f64, normal, search_and_check, stored
from louver_llama import Index


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(12)


def layouts(keys: NDArray) -> Iterator[tuple[str, NDArray]]:
    """The same (n, dim) keys, laid out in different ways."""
    n, dim = keys.shape
    yield "C", np.ascontiguousarray(keys)
    yield "Fortran", np.asfortranarray(keys)
    yield "rows backwards", np.ascontiguousarray(keys[::-1])[::-1]
    yield "channels backwards", np.ascontiguousarray(keys[:, ::-1])[:, ::-1]
    yield "some channels", np.pad(keys, ((0, 0), (1, 5)))[:, 1:-5]
    yield "every other channel", np.repeat(keys, 2, axis=1)[:, ::2]
    yield "every third row", np.repeat(keys, 3, axis=0)[::3]
    room = np.zeros(keys.nbytes + 1, np.uint8)
    unaligned = room[1:].view(keys.dtype).reshape(n, dim)
    unaligned[...] = keys
    yield "unaligned", unaligned
    fixed = keys.copy()
    fixed.flags.writeable = False
    yield "read-only", fixed


def layout_names() -> list[str]:
    return [name for name, _ in layouts(np.zeros((1, 1), np.float32))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", layout_names())
def test_layouts(rng: np.random.Generator, layout: str, dtype: str, kind: str) -> None:
    keys = stored(normal(rng, 140, 21), dtype)
    laid_out = dict(layouts(keys))[layout]
    assert np.array_equal(f64(laid_out), f64(keys))
    queries = normal(rng, 2, 21)
    borrowable = laid_out.strides[1] == laid_out.itemsize
    for copy in (True, False) if borrowable else (True,):
        index = Index.build(laid_out, kind, copy=copy)
        search_and_check(index, keys, queries)
        index.append(laid_out[:70])
        index.update(range(70), laid_out[70:])
        search_and_check(index, np.concatenate([keys[70:], keys[70:], keys[:70]]), queries)
    for name, other in layouts(stored(queries, dtype)):
        found = index.search(other, 1.0)
        assert (
            found.ids.tolist()
            == index.search(f64(stored(queries, dtype)).astype(np.float32), 1.0).ids.tolist()
        ), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("copy", [True, False])
def test_broadcast_and_strided_heads(rng: np.random.Generator, copy: bool, kind: str) -> None:
    one = normal(rng, 12)
    everywhere = np.broadcast_to(one, (2, 130, 12))
    search_and_check(Index.build(everywhere, kind, copy=copy), everywhere, normal(rng, 2, 12))
    cells_first = normal(rng, 130, 2, 12).swapaxes(0, 1)
    search_and_check(Index.build(cells_first[::-1], kind, copy=copy), cells_first[::-1], normal(rng, 2, 12))


class Speaks:
    """Only DLPack."""

    def __init__(self, inner: NDArray) -> None:
        self.inner = inner

    def __dlpack__(self, **settings: object) -> object:
        return self.inner.__dlpack__(**settings)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.inner.__dlpack_device__()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("wrap", [memoryview, Speaks], ids=["buffer", "DLPack"])
def test_other_arrays(rng: np.random.Generator, wrap: Callable, dtype: str) -> None:
    keys = stored(normal(rng, 100, 6), dtype)
    queries = normal(rng, 2, 6)
    for given in (keys, np.asfortranarray(keys), keys[::-1]):
        index = Index.build(wrap(given))
        assert index.dtype == dtype
        search_and_check(index, given, queries)
        assert index.search(wrap(queries), 1.0).ids.tolist() == index.search(queries, 1.0).ids.tolist()
    flat = memoryview(array.array("f", keys.astype(np.float32).ravel())).cast("B").cast("f", shape=[100, 6])
    search_and_check(Index.build(flat), keys.astype(np.float32), queries)
    single = index.search(array.array("f", queries[0]), 1.0)
    assert single.shape == ()
    assert single.ids.tolist() == index.search(queries[0], 1.0).ids.tolist()


# Without a copy


@pytest.mark.parametrize("kind", KINDS)
def test_borrowed_keys(rng: np.random.Generator, kind: str) -> None:
    keys = normal(rng, 2, 200, 16)
    before = keys.copy()
    index = Index.build(keys, kind, copy=False)
    assert index.stats.is_borrowed
    assert index.memory_usage.keys == 0
    assert not Index.build(keys, kind).stats.is_borrowed
    # It reads the caller's memory: the negative control of all that follows.
    keys[:, 0] = 1
    assert (index.key(0) == 1).all()
    keys[:, 0] = before[:, 0]

    index.remove([5])
    index.append(keys[:, :3])
    assert not index.stats.is_borrowed
    assert index.memory_usage.keys >= 203 * 2 * 16 * 4
    keys[...] = 0
    live = np.arange(203) != 5
    search_and_check(index, np.concatenate([before, before[:, :3]], axis=1), normal(rng, 2, 16), live=live)

    keys[...] = before
    index = Index.build(keys, kind, copy=False)
    index.update([4], keys[:, 9:10])
    assert not index.stats.is_borrowed
    assert np.array_equal(keys, before)
    assert np.array_equal(index.key(4), before[:, 9])


class Owner(np.ndarray):
    """Can be referred to weakly."""


@pytest.mark.parametrize("kind", KINDS)
def test_owner_lives_as_long_as_it_is_read(rng: np.random.Generator, kind: str) -> None:
    keys = normal(rng, 200, 16)
    for end_it in ("append", "delete"):
        owner = keys.copy().view(Owner)
        alive = weakref.ref(owner)
        index = Index.build(owner, kind, copy=False)
        del owner
        gc.collect()
        assert alive() is not None
        search_and_check(index, keys, keys[:2])
        if end_it == "append":
            index.append(keys[:1])
        else:
            del index
        gc.collect()
        assert alive() is None
