"""Index and attention over arrays on a GPU: found exactly, attended to within the certificate, in the caller's library.

What has no ``gpu`` mark needs none: which arrays go where, what is refused, and what a build without CUDA says.
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

import louver_llama
from exact import DTYPES, check, dense, dropped_mass, f64, heads, normal, stored, threshold
from louver_llama import Index, Matches, oracles
from louver_llama.device_index import DeviceArray, DeviceIndex, _from_interface, on_gpu
from louver_llama.oracles import Mass

HAS_EXTENSION = find_spec("louver_llama._cuda") is not None


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(29)


# Without a GPU


class ByInterface:
    """What has __cuda_array_interface__ alone."""

    def __init__(self, inner: Any = None, **changes: object) -> None:
        self.inner = inner  # the memory's owner
        described = {"shape": (3, 8), "typestr": "<f2", "data": (4096, False), "version": 3}
        self.__cuda_array_interface__ = {
            **(inner.__cuda_array_interface__ if inner is not None else described),
            **changes,
        }


class ByDlpack:
    def __init__(self, device: tuple[int, int]) -> None:
        self.device = device

    def __dlpack__(self, **settings: object) -> object:
        raise BufferError("not to be had")

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


@pytest.mark.skipif(HAS_EXTENSION, reason="this build has CUDA")
@pytest.mark.parametrize(
    ("given", "where"),
    [(ByInterface(), "a GPU"), (ByDlpack((2, 1)), r"device \(2, 1\)"), (ByDlpack((13, 0)), "")],
)
def test_a_build_without_cuda_says_so(given: object, where: str) -> None:
    pattern = f"keys is on {where}.*accepted is host memory.*built without CUDA.*-DLOUVER_CUDA=ON"
    with pytest.raises(ValueError, match=pattern):
        Index.build(given)


def test_what_is_on_a_gpu() -> None:
    assert on_gpu(ByInterface())
    assert on_gpu(ByDlpack((2, 0)))
    assert on_gpu(ByDlpack((13, 0)))
    # The negative control: host memory, another vendor's memory, and no array.
    for other in (np.ones(3), ByDlpack((1, 0)), ByDlpack((10, 0)), [1.0], memoryview(b"1234"), None):
        assert not on_gpu(other)
    assert not isinstance(Index.build(np.ones((3, 8), np.float32)), DeviceIndex)


def fake_index() -> DeviceIndex:
    core = SimpleNamespace(
        dtype="f16",
        n_head_kv=2,
        dim=8,
        n_positions=5,
        n_live=5,
        device=0,
        is_borrowed=True,
        memory_usage=lambda: (0, 7, 2),
    )
    return DeviceIndex(core, None)


REFUSED: list[tuple[str, Callable[[DeviceIndex], object]]] = [
    ("append", lambda index: index.append(np.ones((1, 8), np.float16))),
    ("update", lambda index: index.update([0], np.ones((1, 8), np.float16))),
    ("remove", lambda index: index.remove([0])),
    ("rebuild", lambda index: index.rebuild()),
    ("select", lambda index: index.select(np.ones((2, 8)), Mass())),
    ("key", lambda index: index.key(0)),
    ("save", lambda index: index.save("nowhere")),
    ("load", lambda index: index.load("nowhere")),
]


@pytest.mark.parametrize(("name", "call"), REFUSED, ids=[name for name, _ in REFUSED])
def test_what_a_gpu_has_not(name: str, call: Callable[[DeviceIndex], object]) -> None:
    with pytest.raises(NotImplementedError, match=f"^{name} is not there .* has search and attention"):
        call(fake_index())


def test_refused_arguments() -> None:
    index, queries = fake_index(), np.ones((2, 8), np.float32)
    with pytest.raises(ValueError, match="method is 'sweep', accepted for an index on a GPU is 'sum'"):
        index.search(queries, 1.0, method="sweep")
    with pytest.raises(ValueError, match="without subspace_tau"):
        index.search(queries, 1.0, subspace_tau=np.ones(4))
    with pytest.raises(ValueError, match="oracle is TopK.*, accepted for an index on a GPU is Mass"):
        index.attention(queries, ByInterface(), oracles.TopK(3))
    with pytest.raises(TypeError, match="oracle must be one of"):
        index.attention(queries, ByInterface(), 0.05)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="compensate must be True or False, not 1"):
        index.attention(queries, ByInterface(), compensate=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="values is a ndarray, accepted is an array on GPU 0"):
        index.attention(queries, np.ones((2, 5, 8), np.float16))


def test_properties() -> None:
    index = fake_index()
    assert (index.kind, index.dtype, index.dim, index.n_head_kv, len(index)) == ("grid", "float16", 8, 2, 5)
    assert 4 in index
    assert 5 not in index
    assert -1 not in index
    assert index.memory_usage.total == 9
    assert index.stats.is_borrowed
    assert index.to_dict()["options"] == {"device": 0}
    assert index.to_dict()["memory"]["index"] == 7
    assert repr(index).endswith("live=5, device=0)")


def interface_seen(given: object) -> tuple[Any, ...]:
    """What the extension is told of it."""
    core = SimpleNamespace(Array=SimpleNamespace(from_interface=lambda *told: told))
    return _from_interface(core, given)


def test_interface() -> None:
    given = ByInterface(shape=(2, 3, 8))
    assert interface_seen(given) == (4096, "f16", [2, 3, 8], [48, 16, 2], None, given)
    given = ByInterface(shape=(3, 8), typestr="<f4", strides=(64, 4), stream=7)
    assert interface_seen(given) == (4096, "f32", [3, 8], [64, 4], 7, given)
    assert interface_seen(ByInterface(shape=(0, 8), data=(None, False)))[0] == 0
    for kind in ("<f8", ">f4", "|V2", "<u2"):
        with pytest.raises(
            TypeError,
            match=f"typestr is '{kind[0]}.*accepted is float32, float16 or bfloat16".replace("|", "."),
        ):
            interface_seen(ByInterface(typestr=kind))
    with pytest.raises(TypeError, match="has a mask"):
        interface_seen(ByInterface(mask=given))


def test_device_array() -> None:
    inner = SimpleNamespace(__dlpack__=lambda **settings: settings, __dlpack_device__=lambda: (2, 3))
    array = DeviceArray(inner, 4096, (5, 2), "<f4")
    assert len(array) == 5
    assert array.__dlpack__(stream=9) == {"stream": 9}
    assert array.__dlpack_device__() == (2, 3)
    described = array.__cuda_array_interface__
    assert (described["shape"], described["typestr"], described["data"]) == ((5, 2), "<f4", (4096, False))
    assert described["version"] == 3
    assert on_gpu(array)


# On a GPU

gpu = pytest.mark.gpu
LIBRARIES = ("cupy", "torch", "jax")


class Library:
    """CuPy, PyTorch or JAX: to the GPU, and back."""

    def __init__(self, name: str) -> None:
        self.name = name
        os.environ.setdefault(
            "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
        )  # or JAX takes most of the GPU's memory
        self.module = pytest.importorskip(name)

    def to_gpu(self, array: NDArray) -> Any:
        if self.name == "torch":
            if array.dtype == DTYPES["bfloat16"]:
                return self.module.from_numpy(array.view(np.int16).copy()).cuda().view(self.module.bfloat16)
            return self.module.from_numpy(array.copy()).cuda()
        if self.name == "jax":
            return self.module.device_put(array, self.module.devices("gpu")[0])
        if array.dtype == DTYPES["bfloat16"]:
            pytest.skip("CuPy has no bfloat16")
        return self.module.asarray(array)

    def to_host(self, array: Any) -> NDArray:
        assert type(array).__module__.partition(".")[0].startswith(self.name), type(array)
        assert on_gpu(array)
        if self.name == "torch":
            return array.cpu().numpy()
        return array.get() if self.name == "cupy" else np.asarray(array)

    def found(self, matches: Matches) -> Matches:
        return replace(matches, ids=self.to_host(matches.ids), scores=self.to_host(matches.scores))


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return Library(request.param)


@pytest.fixture
def torch() -> Library:
    return Library("torch")


def search_and_check(
    library: Library, index: Index, keys: NDArray, queries: NDArray, tau: ArrayLike, poisoned: bool = True
) -> Matches:
    if poisoned:
        index._core.poison()  # type: ignore[attr-defined]
    found = library.found(index.search(library.to_gpu(queries), tau))
    check(found, keys, queries, tau)
    return found


def at_shares(keys: NDArray, queries: NDArray, share: float) -> NDArray[np.float64]:
    n_gqa = len(queries) // len(heads(keys))
    return np.array([threshold(query, heads(keys)[i // n_gqa], share) for i, query in enumerate(queries)])


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_libraries(rng: np.random.Generator, library: Library, dtype: str) -> None:
    keys, queries = stored(normal(rng, 2, 300, 64), dtype), normal(rng, 6, 64)
    index = Index.build(library.to_gpu(keys))
    assert isinstance(index, DeviceIndex)
    assert (index.kind, index.dtype, index.dim, index.n_head_kv, index.n_positions) == (
        "grid",
        dtype,
        64,
        2,
        300,
    )
    found = search_and_check(library, index, keys, queries, at_shares(keys, queries, 0.1))
    # Queries on the host: results in the keys' library; queries of the keys' dtype.
    again = library.found(index.search(queries, at_shares(keys, queries, 0.1)))
    assert np.array_equal(again.ids, found.ids)
    narrow = stored(queries, dtype)
    check(library.found(index.search(library.to_gpu(narrow), 1.0)), keys, narrow, 1.0)
    output, certificates = index.attention(library.to_gpu(queries.reshape(2, 3, 64)), library.to_gpu(keys))
    assert library.to_host(output).shape == (2, 3, 64)
    assert library.to_host(output).dtype == np.float32
    assert len(certificates) == 6


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [8, 64, 72, 80, 96, 128, 136, 256])
def test_dims(rng: np.random.Generator, torch: Library, dim: int, dtype: str) -> None:
    keys, queries = stored(normal(rng, 2, 1000, dim), dtype), normal(rng, 8, dim)
    index = Index.build(torch.to_gpu(keys))
    for share in (0.0, 0.01, 0.2, 1.0):
        search_and_check(torch, index, keys, queries, at_shares(keys, queries, share))


@gpu
@pytest.mark.parametrize(("n_head_kv", "n_gqa"), [(1, 1), (1, 5), (2, 1), (3, 9), (2, 16), (1, 17), (5, 3)])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 129, 4000])
def test_groups(rng: np.random.Generator, torch: Library, n: int, n_head_kv: int, n_gqa: int) -> None:
    keys, queries = stored(normal(rng, n_head_kv, n, 64), "float16"), normal(rng, n_head_kv * n_gqa, 64)
    index = Index.build(torch.to_gpu(keys if n_head_kv > 1 else keys[0]))
    search_and_check(torch, index, keys, queries, at_shares(keys, queries, 0.1))
    shaped = index.search(torch.to_gpu(queries.reshape(n_head_kv, n_gqa, 64)), 2.0)
    assert shaped.shape == (n_head_kv, n_gqa)
    check(torch.found(shaped), keys, queries, 2.0)


@gpu
def test_more_queries_than_a_pass_takes(rng: np.random.Generator, torch: Library) -> None:
    keys, queries = stored(normal(rng, 3, 200, 64), "float16"), normal(rng, 3 * 3001, 64)
    values = stored(normal(rng, 3, 200, 64), "float16")
    index = Index.build(torch.to_gpu(keys))
    tau = rng.normal(size=len(queries)) * 8
    search_and_check(torch, index, keys, queries, tau)
    output, certificates = index.attention(torch.to_gpu(queries), torch.to_gpu(values), Mass(0.1))
    check_attention(torch.to_host(output), certificates, queries, keys, values)


@gpu
def test_nothing(rng: np.random.Generator, library: Library) -> None:
    keys = stored(normal(rng, 2, 100, 64), "float16")
    index = Index.build(library.to_gpu(keys))
    for empty in (np.empty((0, 64), np.float32), np.empty((2, 0, 64), np.float32)):
        found = index.search(empty, 0.0)
        assert len(found) == len(found.ids) == 0
        output, certificates = index.attention(empty, library.to_gpu(keys))
        assert tuple(output.shape) == (*empty.shape[:-1], 64)
        assert certificates == ()
    nowhere = library.found(index.search(normal(rng, 2, 64), math.inf))
    assert nowhere.offsets.tolist() == [0, 0, 0]
    none = Index.build(library.to_gpu(keys[:, :0]))
    assert len(none) == 0
    check(
        library.found(none.search(normal(rng, 4, 64), -math.inf)), keys[:, :0], normal(rng, 4, 64), -math.inf
    )
    with pytest.raises(ValueError, match="the index is empty"):
        none.attention(normal(rng, 2, 64), library.to_gpu(keys[:, :0]))


def constant(rng: np.random.Generator, dtype: str) -> NDArray:
    return stored(np.full((1, 500, 64), 0.3), dtype)


def duplicates(rng: np.random.Generator, dtype: str) -> NDArray:
    return stored(normal(rng, 1, 7, 64)[:, rng.integers(7, size=500)], dtype)


def huge(rng: np.random.Generator, dtype: str) -> NDArray:
    keys = normal(rng, 1, 500, 64)
    keys[:, ::9] *= np.float32(1e4 if dtype == "float16" else 1e36)
    return stored(keys, dtype)


def tiny(rng: np.random.Generator, dtype: str) -> NDArray:
    return stored(normal(rng, 1, 500, 64) * np.float32(1e-7 if dtype == "float16" else 1e-38), dtype)


def not_finite(rng: np.random.Generator, dtype: str) -> NDArray:
    keys = normal(rng, 1, 500, 64)
    keys[0, [0, 63, 64, 200], [0, 5, 63, 7]] = [np.nan, np.inf, -np.inf, np.nan]
    keys[0, 256:320] = np.inf
    return stored(keys, dtype)


def far_apart(rng: np.random.Generator, dtype: str) -> NDArray:
    """Channels of very different size, far from zero."""
    return stored((normal(rng, 1, 500, 64) + 10) * np.logspace(-4, 2, 64, dtype=np.float32), dtype)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hard", [constant, duplicates, huge, tiny, not_finite, far_apart])
def test_hard_keys(
    rng: np.random.Generator, torch: Library, hard: Callable[[np.random.Generator, str], NDArray], dtype: str
) -> None:
    keys = hard(rng, dtype)
    index = Index.build(torch.to_gpu(keys))
    for factor in (0.0, 1e-20, 1.0, 1e20):
        queries = normal(rng, 5, 64) * np.float32(factor)
        finite = np.isfinite(f64(keys[0])).all(axis=1)
        for at in (0, 100, 499):
            # Exactly the score of a key, as float64 rounds it, and the numbers next to it.
            exact = f64(queries) @ np.where(finite[at], f64(keys[0, at]), 0.0)
            for tau in (exact, np.nextafter(exact, math.inf), np.nextafter(exact, -math.inf)):
                search_and_check(torch, index, keys, queries, tau)
        for tau in (0.0, -math.inf, math.inf, 1e300, -1e300, 5e-324):
            search_and_check(torch, index, keys, queries, tau)


@gpu
def test_scores_that_equal_tau(torch: Library) -> None:
    """Small integers: float64 holds every score, and tau is one of them."""
    rng = np.random.default_rng(2)
    keys = stored(rng.integers(-3, 4, size=(1, 700, 96)), "float16")
    queries = rng.integers(-3, 4, size=(4, 96)).astype(np.float32)
    index = Index.build(torch.to_gpu(keys))
    for tau in (-5.0, 0.0, 1.0, 40.0):
        found = search_and_check(torch, index, keys, queries, tau)
        assert (found.scores == tau).any()
        assert found.stats.n_exact > 0


@gpu
def test_the_index_prunes_and_the_judge_judges(rng: np.random.Generator, torch: Library) -> None:
    """The negative controls: few keys are scored, and a match too few or too many is found out."""
    keys, queries = stored(normal(rng, 1, 4096, 64), "float16"), normal(rng, 4, 64)
    tau = at_shares(keys, queries, 0.01)
    index = Index.build(torch.to_gpu(keys))
    found = search_and_check(torch, index, keys, queries, tau)
    assert found.stats.n_bounded == 4 * 4096
    assert len(found.ids) <= found.stats.n_scored < 0.2 * found.stats.n_bounded
    with pytest.raises(AssertionError):
        check(found, keys, queries, np.nextafter(found.scores.min(), math.inf))
    with pytest.raises(AssertionError):
        check(torch.found(index.search(queries, tau - 1)), keys, queries, tau)


# Layouts and lifetimes


@gpu
def test_layouts(rng: np.random.Generator, torch: Library) -> None:
    keys = stored(normal(rng, 3, 200, 64), "float16")
    values, queries = stored(normal(rng, 3, 200, 80), "float16"), normal(rng, 6, 64)
    tau = at_shares(keys, queries, 0.1)
    wide = torch.to_gpu(np.pad(keys, [(0, 0), (0, 0), (3, 5)]))
    cells_first = torch.to_gpu(np.ascontiguousarray(keys.swapaxes(0, 1)))
    layouts = {
        "as it is": (torch.to_gpu(keys), True),
        "cells first": (cells_first.permute(1, 0, 2), True),
        "every other": (torch.to_gpu(np.repeat(keys, 2, axis=1))[:, ::2], True),
        "not aligned": (wide[:, :, 3:67], False),
        "channels first": (torch.to_gpu(np.ascontiguousarray(keys.swapaxes(1, 2))).transpose(1, 2), False),
    }
    plain: NDArray | None = None
    for name, (given, in_rows) in layouts.items():
        index = Index.build(given)
        assert index.stats.is_borrowed == in_rows, name
        assert index.memory_usage.keys == (0 if in_rows else keys.nbytes), name
        search_and_check(torch, index, keys, queries, tau)
        assert not Index.build(given, copy=True).stats.is_borrowed
        search_and_check(torch, Index.build(given, copy=True), keys, queries, tau)
        if in_rows:
            assert Index.build(given, copy=False).stats.is_borrowed
        else:
            with pytest.raises(ValueError, match="aligned to 16 bytes; accepted with a copy"):
                Index.build(given, copy=False)
        output, _ = index.attention(queries, torch.to_gpu(values), Mass(0.1))
        plain = torch.to_host(output) if plain is None else plain
        assert np.array_equal(torch.to_host(output), plain), name
    padded = torch.to_gpu(np.pad(values, [(0, 0), (0, 0), (1, 7)]))[:, :, 1:81]
    output, _ = Index.build(layouts["as it is"][0]).attention(queries, padded, Mass(0.1))
    assert np.array_equal(torch.to_host(output), plain)


@gpu
def test_keys_live_as_long_as_the_index(rng: np.random.Generator, library: Library) -> None:
    keys, queries = stored(normal(rng, 2, 5000, 128), "float16"), normal(rng, 2, 128)
    for given in (keys, np.pad(keys, [(0, 0), (0, 0), (0, 1)])[:, :, :128]):
        index = Index.build(library.to_gpu(np.ascontiguousarray(given)))
        gc.collect()
        others = [library.to_gpu(np.zeros_like(keys)) for _ in range(8)]  # would be where the keys were
        search_and_check(library, index, keys, queries, at_shares(keys, queries, 0.05))
        del others
    ids = index.search(queries, 0.0).ids
    before = library.to_host(ids).copy()
    del index
    gc.collect()
    assert np.array_equal(library.to_host(ids), before)


@gpu
def test_streams(rng: np.random.Generator, torch: Library) -> None:
    """Keys, queries and values that a stream of the caller's is still busy with."""
    keys = stored(normal(rng, 2, 3000, 64), "float16")
    queries = normal(rng, 4, 64)
    host = torch.module.from_numpy(keys)
    stream = torch.module.cuda.Stream()
    for _ in range(5):
        with torch.module.cuda.stream(stream):
            late = torch.module.full((2, 3000, 64), math.nan, dtype=torch.module.float16, device="cuda")
            late_queries = torch.module.zeros((4, 64), device="cuda")
            torch.module.cuda._sleep(50_000_000)
            late.copy_(host, non_blocking=True)
            late_queries.copy_(torch.module.from_numpy(queries), non_blocking=True)
            index = Index.build(late)
            found = index.search(late_queries, 3.0)
            output, certificates = index.attention(late_queries, late, Mass(0.1))
        check(torch.found(found), keys, queries, 3.0)
        check_attention(torch.to_host(output), certificates, queries, keys, keys)


@gpu
def test_cuda_array_interface(rng: np.random.Generator) -> None:
    """An array of no library: results speak both protocols."""
    cupy = Library("cupy")
    keys, queries = stored(normal(rng, 2, 300, 64), "float16"), normal(rng, 4, 64)
    side = cupy.module.cuda.Stream(non_blocking=True)
    with side:
        given = ByInterface(cupy.to_gpu(keys), stream=side.ptr)
    index = Index.build(given)
    assert index.stats.is_borrowed
    found = index.search(ByInterface(cupy.to_gpu(queries)), 2.0)
    assert isinstance(found.ids, DeviceArray)
    for take in (cupy.module.asarray, cupy.module.from_dlpack):
        check(replace(found, ids=take(found.ids).get(), scores=take(found.scores).get()), keys, queries, 2.0)
    output, certificates = index.attention(queries, given, Mass(0.1))
    check_attention(cupy.module.asarray(output).get(), certificates, queries, keys, keys)
    nothing = index.search(queries, math.inf)
    assert len(nothing.ids) == cupy.module.asarray(nothing.ids).size == 0


@gpu
def test_errors(rng: np.random.Generator, torch: Library) -> None:
    good = torch.to_gpu(stored(normal(rng, 2, 100, 64), "float16"))
    index = Index.build(good)
    queries = normal(rng, 2, 64)
    for keys, error, pattern in (
        (good.double(), TypeError, "keys is a Tensor.*float32, float16 or bfloat16"),
        (good[0, 0], ValueError, r"keys has shape \(64,\), accepted is \(n, dim\)"),
        (good[:, :, :60], ValueError, "head_dim 60, accepted on a GPU is a multiple of 8 up to 256"),
        (good.repeat(1, 1, 5), ValueError, "head_dim 320, accepted on a GPU"),
        (good[:0], ValueError, "n_head_kv >= 1"),
        (good.float().requires_grad_(), ValueError, "gradient"),
    ):
        with pytest.raises(error, match=pattern):
            Index.build(keys)
    with pytest.raises(ValueError, match="kind is 'ball', accepted for keys on a GPU is 'grid'"):
        Index.build(good, kind="ball")
    with pytest.raises(TypeError, match="copy must be True or False, not 1"):
        Index.build(good, copy=1)  # type: ignore[arg-type]
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"at \[1, 3\], accepted are finite"):
            index.search(np.where(np.arange(128).reshape(2, 64) == 67, np.float32(bad), queries), 1.0)
    with pytest.raises(ValueError, match="tau has a NaN"):
        index.search(queries, math.nan)
    with pytest.raises(ValueError, match="head_dim 63"):
        index.search(torch.to_gpu(queries[:, 1:]), 1.0)
    with pytest.raises(TypeError, match="values has dtype float32, accepted is the keys' float16"):
        index.attention(queries, good.float())
    with pytest.raises(ValueError, match=r"values has shape \(2, 99, 64\), accepted is a row for each"):
        index.attention(queries, good[:, 1:])
    # And what was refused leaves nothing behind.
    keys = good.cpu().numpy()
    search_and_check(torch, index, keys, queries, 1.0)


# Attention


def check_attention(
    output: NDArray,
    certificates: tuple[louver_llama.Certificate, ...],
    queries: NDArray,
    keys: NDArray,
    values: NDArray,
    epsilon: float | None = None,
    scale: float | None = None,
) -> None:
    keys, values = heads(keys), heads(values)
    dim = keys.shape[2]
    scale = dim**-0.5 if scale is None else scale
    n_gqa = len(queries) // len(keys)
    wanted = dense(queries, keys, values, np.ones(keys.shape[1], bool), scale)
    longest = np.linalg.norm(f64(values), axis=2).max()
    for i, certificate in enumerate(certificates):
        assert certificate.error_bound is not None
        assert certificate.n_keys == keys.shape[1]
        mine = keys[i // n_gqa]
        # A float32 score is off by this at most, and each weight by as much, relatively.
        score_error = (
            (2 * dim + 16)
            * 2.0**-24
            * np.linalg.norm(f64(queries[i]))
            * np.linalg.norm(f64(mine), axis=1).max()
            * scale
        )
        rounding = (2 * score_error + 1e-5) * longest
        assert (
            np.linalg.norm(output.reshape(wanted.shape)[i] - wanted[i]) <= certificate.error_bound + rounding
        )
        assert epsilon is None or certificate.delta <= epsilon
        # What is below tau is all that can be missing.
        reached = np.flatnonzero(f64(mine) @ f64(queries[i]) >= certificate.tau)
        live = np.ones(len(mine), bool)
        assert len(reached) <= certificate.n_selected or certificate.tau == -math.inf
        if epsilon == 0:
            assert dropped_mass(queries[i], mine, live, np.arange(len(mine)), scale) == certificate.delta == 0


def problem(
    rng: np.random.Generator,
    n: int,
    n_head_kv: int,
    n_gqa: int,
    dim: int,
    value_dim: int,
    dtype: str,
    spread: float = 2.0,
) -> tuple[NDArray, NDArray, NDArray]:
    queries = normal(rng, n_head_kv * n_gqa, dim) * np.float32(spread)
    keys = stored(normal(rng, n_head_kv, n, dim), dtype)
    return queries, keys, stored(normal(rng, n_head_kv, n, value_dim) + np.float32(0.5), dtype)


@gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (64, 128), (256, 8)]
)
def test_attention_dims(
    rng: np.random.Generator, torch: Library, dim: int, value_dim: int, dtype: str
) -> None:
    queries, keys, values = problem(rng, 1500, 2, 4, dim, value_dim, dtype)
    index = Index.build(torch.to_gpu(keys))
    for epsilon in (0.0, 0.01, 0.3):
        for compensate in (True, False):
            index._core.poison()  # type: ignore[attr-defined]
            output, certificates = index.attention(
                torch.to_gpu(queries), torch.to_gpu(values), Mass(epsilon), compensate=compensate
            )
            check_attention(torch.to_host(output), certificates, queries, keys, values, epsilon)
            assert not any(certificate.dense for certificate in certificates)


@gpu
@pytest.mark.parametrize(("n_head_kv", "n_gqa"), [(1, 1), (1, 5), (2, 1), (3, 9), (1, 17)])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 700])
def test_epsilon_0_is_dense(
    rng: np.random.Generator, torch: Library, n: int, n_head_kv: int, n_gqa: int
) -> None:
    queries, keys, values = problem(rng, n, n_head_kv, n_gqa, 64, 64, "float16")
    index = Index.build(torch.to_gpu(keys))
    output, certificates = index.attention(
        queries.reshape(n_head_kv, n_gqa, 64), torch.to_gpu(values), Mass(0)
    )
    assert torch.to_host(output).shape == (n_head_kv, n_gqa, 64)
    assert all(c.delta == c.error_bound == 0 and c.n_selected == n and not c.dense for c in certificates)
    check_attention(torch.to_host(output), certificates, queries, keys, values, 0)


@gpu
def test_the_bound_is_not_idle(rng: np.random.Generator, torch: Library) -> None:
    """The negative control: less than all is attended to, and an output that is off by more is found out."""
    queries, keys, values = problem(rng, 4000, 1, 4, 64, 64, "float16")
    index = Index.build(torch.to_gpu(keys[0]))
    output, certificates = index.attention(torch.to_gpu(queries), torch.to_gpu(values[0]), Mass(0.3))
    assert all(0 < certificate.delta <= 0.3 for certificate in certificates)
    assert all(certificate.n_selected < 4000 for certificate in certificates)
    away = torch.to_host(output) + np.float32(2 * max(c.error_bound or 0.0 for c in certificates) + 1)
    with pytest.raises(AssertionError):
        check_attention(away, certificates, queries, keys, values)
    # Calls leave nothing behind: the same again, after others, bit for bit.
    index.attention(queries[:1], torch.to_gpu(values[0] * 100), Mass(0.9))
    index.search(queries, 0.0)
    again, same = index.attention(torch.to_gpu(queries), torch.to_gpu(values[0]), Mass(0.3))
    assert np.array_equal(torch.to_host(again), torch.to_host(output))
    assert same == certificates


@gpu
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_what_is_not_finite_gives_what_dense_gives(
    rng: np.random.Generator, torch: Library, where: str, bad: float, epsilon: float
) -> None:
    queries, keys, values = problem(rng, 300, 2, 2, 64, 64, "float32", spread=0.5)
    (keys if where == "keys" else values)[0, 34, 2] = bad
    index = Index.build(torch.to_gpu(keys))
    output, certificates = index.attention(queries, torch.to_gpu(values), Mass(epsilon))
    wanted = dense(queries, keys, values, np.ones(300, bool), 0.125)
    np.testing.assert_allclose(torch.to_host(output)[:2], wanted[:2], rtol=1e-4, atol=1e-4)
    assert [certificate.dense for certificate in certificates] == [True, True, False, False]
    # The other KV head has nothing to do with it.
    check_attention(torch.to_host(output)[2:], certificates[2:], queries[2:], keys[1:], values[1:], epsilon)


@gpu
@pytest.mark.parametrize("scale", [1e-6, 0.02, 1.0, 5.0])
def test_scale(rng: np.random.Generator, torch: Library, scale: float) -> None:
    queries, keys, values = problem(rng, 700, 2, 4, 64, 64, "float16", spread=0.5)
    index = Index.build(torch.to_gpu(keys))
    output, certificates = index.attention(queries, torch.to_gpu(values), Mass(0.05), scale=scale)
    check_attention(torch.to_host(output), certificates, queries, keys, values, 0.05, scale)


@gpu
def test_huge_values(rng: np.random.Generator, torch: Library) -> None:
    """Finite all the same."""
    queries, keys, values = problem(rng, 700, 1, 4, 64, 64, "float32")
    values *= np.float32(1e35)
    index = Index.build(torch.to_gpu(keys))
    output, certificates = index.attention(queries, torch.to_gpu(values), Mass(0.1))
    assert np.isfinite(torch.to_host(output)).all()
    check_attention(torch.to_host(output), certificates, queries, keys, values, 0.1)


@gpu
def test_the_function(rng: np.random.Generator, library: Library) -> None:
    queries, keys, values = problem(rng, 700, 2, 4, 64, 64, "float16")
    index = Index.build(library.to_gpu(keys))
    assert isinstance(index, DeviceIndex)
    by_method, certificates = index.attention(
        queries, library.to_gpu(values), Mass(0.1), compensate=False, scale=0.1
    )
    output, same = louver_llama.attention(
        library.to_gpu(queries), index, library.to_gpu(values), Mass(0.1), compensate=False, scale=0.1
    )
    assert np.array_equal(library.to_host(output), library.to_host(by_method))
    assert same == certificates
    assert import_module("louver_llama.sparse").attention is louver_llama.attention
