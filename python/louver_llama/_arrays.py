"""Arrays from outside, read where they lie: numpy, the buffer protocol, DLPack; float32, float16, bfloat16."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ._index import bfloat16_bits

ACCEPTED = "float32, float16 or bfloat16"

_NAMES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
DTYPES = {core: numpy for numpy, core in _NAMES.items()}


class Keys(NamedTuple):
    """A (n_head_kv, n, dim) view; bfloat16 as uint16."""

    array: npt.NDArray[Any]
    dtype: str  # "f32", "f16", "bf16"


def as_numpy(name: str, given: Any) -> tuple[npt.NDArray[Any], str]:
    """A view of what was given, and its dtype's name; bfloat16 comes as uint16.

    Raises TypeError where it is no array of an accepted dtype, ValueError where it is not in host memory.
    """
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, accepted is one without a mask")
    if isinstance(given, np.ndarray):
        array = given
    elif hasattr(given, "__dlpack__"):
        array = _from_dlpack(name, given)
        if array.dtype == np.uint16 and "bfloat16" in str(getattr(given, "dtype", "")):
            return array, "bfloat16"
    else:
        try:
            array = np.asarray(memoryview(given))
        except TypeError:
            raise TypeError(
                f"{name} is a {type(given).__name__}, accepted is an array of {ACCEPTED} "
                "(numpy, buffer protocol or DLPack)"
            ) from None
    kind = array.dtype.name
    if kind not in _NAMES or not array.dtype.isnative:
        raise TypeError(
            f"{name} has dtype {array.dtype.str if kind in _NAMES else kind}, accepted is {ACCEPTED}"
        )
    if kind == "bfloat16":
        return array.view(np.uint16), kind
    return array, kind


def as_keys(name: str, given: Any, n_head_kv: int | None = None, dim: int | None = None) -> Keys:
    """Keys or values: (n, dim), or (n_head_kv, n, dim). Raises TypeError or ValueError as the others do."""
    array, kind = as_numpy(name, given)
    if array.ndim not in (2, 3):
        raise ValueError(f"{name} has shape {array.shape}, accepted is (n, dim) or (n_head_kv, n, dim)")
    if array.ndim == 2:
        array = array[np.newaxis]
    if n_head_kv is not None and array.shape[0] != n_head_kv:
        raise ValueError(
            f"{name} has {array.shape[0]} heads, accepted is the index's n_head_kv = {n_head_kv}"
        )
    if dim is not None and array.shape[2] != dim:
        raise ValueError(f"{name} has head_dim {array.shape[2]}, accepted is the index's {dim}")
    if not 1 <= array.shape[2] <= 1024:
        raise ValueError(f"{name} has head_dim {array.shape[2]}, accepted is 1 to 1024")
    if array.shape[0] < 1:
        raise ValueError(f"{name} has shape {array.shape}, accepted is n_head_kv >= 1")
    return Keys(array, _NAMES[kind])


def as_queries(given: Any, n_head_kv: int, dim: int) -> tuple[npt.NDArray[np.float32], tuple[int, ...]]:
    """Queries as contiguous float32 (n_query, dim), and the shape they came in less the last dimension.

    float16 and bfloat16 convert exactly. Raises TypeError or ValueError.
    """
    array, kind = as_numpy("queries", given)
    if array.ndim not in (1, 2, 3):
        raise ValueError(
            f"queries has shape {array.shape}, accepted is (dim,), (n_query, dim) or (n_head_kv, n_gqa, dim)"
        )
    if array.shape[-1] != dim:
        raise ValueError(f"queries has head_dim {array.shape[-1]}, accepted is the index's {dim}")
    if array.ndim == 3 and array.shape[0] != n_head_kv:
        raise ValueError(
            f"queries has shape {array.shape}, accepted is ({n_head_kv}, n_gqa, {dim}): one entry per KV head"
        )
    lead = array.shape[:-1]
    n_query = int(np.prod(lead, dtype=np.int64))
    if n_query % n_head_kv != 0:
        raise ValueError(
            f"queries are {n_query}, accepted is a multiple of the index's n_head_kv = {n_head_kv}"
        )
    if kind == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.ascontiguousarray(array.reshape(n_query, dim), dtype=np.float32), lead


def _from_dlpack(name: str, given: Any) -> npt.NDArray[Any]:
    device = getattr(given, "__dlpack_device__", lambda: (1, 0))()
    if int(device[0]) != 1:
        raise ValueError(
            f"{name} is on device {tuple(map(int, device))}, accepted is host memory (DLPack device type 1)"
        )
    try:
        return np.from_dlpack(given)
    except (BufferError, RuntimeError, TypeError):
        pass  # numpy's DLPack knows no bfloat16
    try:
        return np.asarray(bfloat16_bits(given))
    except TypeError:
        kind = getattr(given, "dtype", "an unknown dtype")
        raise TypeError(f"{name} is a {type(given).__name__} of {kind}, accepted is {ACCEPTED}") from None
