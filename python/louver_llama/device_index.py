"""The index over keys in a GPU's memory: what ``Index.build`` returns for an array of CuPy, PyTorch or JAX on a GPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from importlib import import_module
from math import prod
from numbers import Integral
from typing import Any, Literal, NoReturn

import numpy as np
import numpy.typing as npt

from ._arrays import ACCEPTED, DTYPES, as_queries
from .index import Index, _oracle, _thresholds
from .matches import Certificate, Matches, SearchStats, Selection
from .oracles import Mass, Oracle

__all__ = ["DeviceArray", "DeviceIndex", "on_gpu"]

_CUDA_DEVICES = (2, 13)  # of DLPack: memory of CUDA, plain and managed
_LEGACY_STREAM = 1  # in DLPack and in __cuda_array_interface__; the one that the kernels run on
_TYPES = {"<f4": "f32", "<f2": "f16"}


Converter = Callable[["DeviceArray"], Any]


def on_gpu(given: Any) -> bool:
    """Whether it is an array in a CUDA device's memory, by DLPack or else by ``__cuda_array_interface__``."""
    if hasattr(given, "__dlpack_device__"):
        return int(given.__dlpack_device__()[0]) in _CUDA_DEVICES
    return hasattr(given, "__cuda_array_interface__")


class DeviceArray:
    """A result in a GPU's memory, for any library: it speaks DLPack and ``__cuda_array_interface__``, version 3.

    Results are this where the arrays that were given come from no library with a ``from_dlpack``; else they are that
    library's arrays. They are complete: nothing is left to wait for, whatever stream they are used on.
    """

    def __init__(self, array: Any, address: int, shape: tuple[int, ...], typestr: str) -> None:
        self._array = array
        self._address = address
        self.shape = shape
        self._typestr = typestr

    def __len__(self) -> int:
        return self.shape[0]

    def __dlpack__(self, **settings: Any) -> Any:
        return self._array.__dlpack__(**settings)

    def __dlpack_device__(self) -> tuple[int, int]:
        kind, device = self._array.__dlpack_device__()
        return int(kind), int(device)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self._typestr,
            "data": (self._address, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }


class DeviceIndex(Index):
    """Keys in a GPU's memory, all of them live, searched and attended to where they lie.

    Made by ``Index.build``. There are ``search``, ``attention`` by the ``Mass`` oracle, and the properties of ``Index``.
    What changes an index, ``select``, ``key``, ``save`` and ``load`` raise NotImplementedError.

    The kernels run on the legacy default stream. They wait for the streams that the given arrays name, as DLPack and
    ``__cuda_array_interface__`` want it, and a call returns when its result is complete. Calls from several threads take
    turns; the GIL is released meanwhile. What CUDA refuses raises RuntimeError, or MemoryError.
    """

    def __init__(self, inner: Any, convert: Converter | None) -> None:
        self._core = inner
        self._convert = convert

    @classmethod
    def over(cls, keys: Any, kind: str, copy: bool | None) -> DeviceIndex:
        """What ``Index.build`` returns for keys on a GPU; raises as it does."""
        array = _array("keys", keys)
        if kind != "grid":
            raise ValueError(f"kind is {kind!r}, accepted for keys on a GPU is 'grid'")
        _require_rows("keys", array)
        return cls(_core().Index.build(array, copy), _converter(keys))

    def search(
        self,
        queries: Any,
        tau: float | npt.ArrayLike,
        *,
        method: Literal["sum", "sweep", "filter"] = "sum",
        subspace_tau: npt.ArrayLike | None = None,
    ) -> Matches:
        """Every key with ``q.k >= tau``, and no other, as ``Index.search`` finds them.

        queries: as there, on the GPU or the host. tau: on the host.

        ``ids`` (int64) and ``scores`` (float64) are on the GPU, arrays of the library that the queries come from if they
        are on the GPU, else of the keys'; ``offsets`` is numpy's.
        """
        if method != "sum" or subspace_tau is not None:
            raise ValueError(
                f"method is {method!r}, accepted for an index on a GPU is 'sum', without subspace_tau"
            )
        array, shape = as_queries(_to_host("queries", queries), self.n_head_kv, self.dim)
        wanted = _thresholds("tau", tau, (len(array),))
        offsets, ids, scores, stats = self._on_gpu.search(array, wanted)
        n = (int(offsets[-1]),)
        return Matches(
            offsets,
            self._result(queries, ids, n, "<i8"),
            self._result(queries, scores, n, "<f8"),
            SearchStats(*stats),
            shape,
        )

    def attention(
        self,
        queries: Any,
        values: Any,
        oracle: Oracle | None = None,
        *,
        compensate: bool = True,
        scale: float | None = None,
    ) -> tuple[Any, tuple[Certificate, ...]]:
        """Softmax attention over the keys that the oracle keeps: ``louver_llama.attention`` with this index.

        queries: on the GPU or the host. values: on the GPU of the keys and of their dtype, (n_positions, value_dim) or
            (n_head_kv, n_positions, value_dim), value_dim a multiple of 8 up to 256; in any layout, though rows that are
            not aligned to 16 bytes are copied.
        oracle: ``Mass``, by default ``Mass(0.05)``.

        The output, float32, is on the GPU, an array of the library that the queries come from if they are on the GPU, else
        of the keys'. Scores are float32: that is the rounding which ``error_bound`` leaves out. ``n_selected`` counts
        what the query heads of a KV head attend to together, up to 8 of them.
        """
        if not isinstance(compensate, bool):
            raise TypeError(f"compensate must be True or False, not {compensate!r}")
        chosen = Mass() if oracle is None else oracle
        _oracle(chosen)
        if not isinstance(chosen, Mass):
            raise ValueError(f"oracle is {chosen!r}, accepted for an index on a GPU is Mass")
        if not on_gpu(values):
            raise ValueError(
                f"values is a {type(values).__name__}, accepted is an array on GPU {self.device}"
            )
        array, shape = as_queries(_to_host("queries", queries), self.n_head_kv, self.dim)
        rows = _array("values", values)
        _require_rows("values", rows)
        lead = (self.n_head_kv, self.n_positions)
        if tuple(rows.shape[:-1]) != lead and not (
            self.n_head_kv == 1 and tuple(rows.shape[:-1]) == lead[1:]
        ):
            raise ValueError(
                f"values has shape {tuple(rows.shape)}, accepted is a row for each of the index's "
                f"{self.n_head_kv} heads and {self.n_positions} positions"
            )
        if rows.dtype != self._core.dtype:
            raise TypeError(f"values has dtype {DTYPES[rows.dtype]}, accepted is the keys' {self.dtype}")
        output, found = self._on_gpu.attend(
            array, shape, rows, float(chosen.epsilon), self._scale(scale), compensate
        )
        certificates = (
            Certificate(
                tau, self.n_positions, n_bounded, n_scored, n_scored, n_bytes, delta, error_bound, dense
            )
            for tau, n_bounded, n_scored, n_bytes, delta, error_bound, dense in found
        )
        return self._result(queries, output, (*shape, rows.shape[-1]), "<f4"), tuple(certificates)

    @property
    def kind(self) -> str:
        """Which index: "grid"."""
        return "grid"

    @property
    def device(self) -> int:
        """The CUDA device that holds it."""
        return int(self._on_gpu.device)

    def __contains__(self, position: object) -> bool:
        """Whether the position is live, as all are."""
        return isinstance(position, Integral) and 0 <= int(position) < self.n_positions

    def to_dict(self) -> dict[str, Any]:
        """``stats`` and the device as plain numbers and strings, for JSON."""
        stats = self.stats
        memory = {**vars(stats.memory), "total": stats.memory.total}
        return {**vars(stats), "memory": memory, "options": {"device": self.device}}

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, device={self.device})"

    # What there is on the CPU alone.

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, n_threads: int = 0) -> Index:
        """Not on a GPU: raises NotImplementedError."""
        _refuse("load")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Not on a GPU: raises NotImplementedError."""
        _refuse("save")

    def append(self, keys: Any) -> range:
        """Not on a GPU: raises NotImplementedError."""
        _refuse("append")

    def update(self, positions: Iterable[int] | npt.NDArray[Any], keys: Any) -> None:
        """Not on a GPU: raises NotImplementedError."""
        _refuse("update")

    def remove(self, positions: Iterable[int] | npt.NDArray[Any]) -> None:
        """Not on a GPU: raises NotImplementedError."""
        _refuse("remove")

    def rebuild(self) -> None:
        """Not on a GPU: raises NotImplementedError."""
        _refuse("rebuild")

    def select(self, queries: Any, oracle: Oracle, *, scale: float | None = None) -> Selection:
        """Not on a GPU: raises NotImplementedError."""
        _refuse("select")

    def key(self, position: int) -> npt.NDArray[np.float32]:
        """Not on a GPU: raises NotImplementedError."""
        _refuse("key")

    @property
    def _on_gpu(self) -> Any:
        return self._core

    def _result(self, queries: Any, found: tuple[Any, int], shape: tuple[int, ...], typestr: str) -> Any:
        result = DeviceArray(*found, shape, typestr)
        convert = _converter(queries) if on_gpu(queries) else self._convert
        return result if convert is None else convert(result)


def _refuse(what: str) -> NoReturn:
    raise NotImplementedError(
        f"{what} is not there for an index on a GPU, which has search and attention; Index.build of keys on the host has it"
    )


def _core() -> Any:
    """The extension; ImportError where this build has none."""
    return import_module("._cuda", __package__)


def _array(name: str, given: Any) -> Any:
    """The extension's view of an array on a GPU; TypeError or ValueError if it is none that is accepted."""
    try:
        core = _core()
    except ModuleNotFoundError:
        where = "a GPU"
        if hasattr(given, "__dlpack_device__"):
            where = f"device {tuple(map(int, given.__dlpack_device__()))}, a GPU"
        raise ValueError(
            f"{name} is on {where}, accepted is host memory: this louver_llama was built without CUDA (it takes "
            "-DLOUVER_CUDA=ON)"
        ) from None
    try:
        if hasattr(given, "__dlpack_device__"):
            return core.Array.from_dlpack(given.__dlpack__(stream=_LEGACY_STREAM))
        return _from_interface(core, given)
    except (TypeError, ValueError, BufferError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name} is a {type(given).__name__} that is not accepted: {error}") from error


def _from_interface(core: Any, given: Any) -> Any:
    described = given.__cuda_array_interface__
    kind, shape, strides = described["typestr"], described["shape"], described.get("strides")
    if kind not in _TYPES:
        raise TypeError(f"its typestr is {kind!r}, accepted is {ACCEPTED} (bfloat16 by DLPack)")
    if described.get("mask") is not None:
        raise TypeError("it has a mask, accepted is an array without")
    if strides is None:
        item = np.dtype(kind).itemsize
        strides = [item * prod(shape[i + 1 :]) for i in range(len(shape))]
    address, _ = described["data"]
    return core.Array.from_interface(
        address or 0, _TYPES[kind], list(shape), list(strides), described.get("stream"), given
    )


def _to_host(name: str, given: Any) -> Any:
    """Queries on a GPU as numpy's; others as they are."""
    if not on_gpu(given):
        return given
    array = _array(name, given)
    found = array.to_host().reshape(array.shape)
    if array.dtype == "f16":
        return found.view(np.float16)
    if array.dtype == "bf16":
        return (found.astype(np.uint32) << 16).view(np.float32)
    return found


def _require_rows(name: str, array: Any) -> None:
    shape = tuple(array.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"{name} has shape {shape}, accepted is (n, dim) or (n_head_kv, n, dim)")
    if not 8 <= shape[-1] <= 256 or shape[-1] % 8 != 0:
        raise ValueError(f"{name} has head_dim {shape[-1]}, accepted on a GPU is a multiple of 8 up to 256")
    if len(shape) == 3 and shape[0] < 1:
        raise ValueError(f"{name} has shape {shape}, accepted is n_head_kv >= 1")


def _converter(given: Any) -> Converter | None:
    """``from_dlpack`` of the library that an array on a GPU comes from."""
    library = type(given).__module__.partition(".")[0]
    if library in ("jax", "jaxlib"):
        return _to_jax
    return getattr(sys.modules.get(library), "from_dlpack", None)


def _to_jax(result: DeviceArray) -> Any:
    jax = import_module("jax")
    # Or else int64 becomes int32, and float64 float32, without a word.
    newer = hasattr(jax, "enable_x64")  # and not a bool: that of a context manager is an error
    wide = jax.enable_x64 if newer else import_module("jax.experimental").enable_x64
    with wide(True):
        return jax.numpy.from_dlpack(result)
