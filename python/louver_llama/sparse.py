"""Sparse attention from an index and values."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ._arrays import as_keys, as_queries
from .device_index import DeviceIndex
from .index import Index, _oracle, certificate
from .matches import Certificate
from .oracles import Mass, Oracle

__all__ = ["attention"]


def attention(
    queries: Any,
    index: Index,
    values: Any,
    oracle: Oracle | None = None,
    *,
    compensate: bool = True,
    scale: float | None = None,
) -> tuple[npt.NDArray[np.float32], tuple[Certificate, ...]]:
    """Softmax attention over the keys that the oracle keeps.

    queries: (dim,), (n_query, dim) or (n_head_kv, n_gqa, dim), dealt to the KV heads as in ``Index.search``.
    values: (n_positions, value_dim) or (n_head_kv, n_positions, value_dim), float32, float16 or bfloat16, in any
        layout; rows of removed positions are not read.
    oracle: ``Mass(0.05)`` by default.
    compensate: adds the other keys back as their approximate weight times the mean value of their block of 64.
    scale: what softmax multiplies q.k by; 1 / sqrt(dim) by default.

    Returns the output, float32, shaped as the queries with value_dim for dim, and a certificate for each query:
    ``delta`` bounds the softmax mass that was left out, ``error_bound`` the distance to dense attention's output.
    With a NaN or an infinity the output is what dense attention gives, and the certificate says ``dense``. All live
    values are read once, for the means and the error bound. An index on a GPU does as its ``attention`` says.

    Raises TypeError or ValueError, an empty index included.
    """
    if not isinstance(index, Index):
        raise TypeError(f"index must be a louver_llama.Index, not {index!r}")
    if isinstance(index, DeviceIndex):
        return index.attention(queries, values, oracle, compensate=compensate, scale=scale)
    if not isinstance(compensate, bool):
        raise TypeError(f"compensate must be True or False, not {compensate!r}")
    array, shape = as_queries(queries, index.n_head_kv, index.dim)
    view = as_keys("values", values, index.n_head_kv)
    if view.array.shape[1] != index.n_positions:
        raise ValueError(
            f"values has {view.array.shape[1]} rows, accepted is one for each of the index's {index.n_positions} positions"
        )
    chosen = _oracle(Mass() if oracle is None else oracle)
    output, bounds, dense, found = index._core.attend(
        array, view.array, view.dtype, chosen, index._scale(scale), compensate
    )
    certificates = (
        certificate(one, bound, bool(all_live))
        for one, bound, all_live in zip(found, bounds.tolist(), dense, strict=True)
    )
    return np.asarray(output).reshape(*shape, view.array.shape[2]), tuple(certificates)
