"""The file that tools/capture.py writes: its names, shapes and dtypes are in that tool's docstring."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, quants

AS_NUMPY = {"f32": np.float32, "f16": np.float16}  # of the other types the bytes are kept


@dataclass
class Layer:
    """What one layer's attention read, in the order of the file."""

    number: int
    scale: float
    reason: str
    type_k: str
    type_v: str
    queries: npt.NDArray[np.float32]  # (n_step, n_head, key_dim)
    visible: npt.NDArray[np.bool_]  # (n_step, n_cell)
    k: npt.NDArray[Any]  # (n_cell, n_head_kv, key_dim), or bytes of a head's row
    v: npt.NDArray[Any]

    @property
    def n_head(self) -> int:
        """Query heads."""
        return self.queries.shape[1]

    @property
    def n_head_kv(self) -> int:
        """Heads of keys and values."""
        return self.k.shape[1]

    @property
    def key_dim(self) -> int:
        """Elements of a query or a key."""
        return self.queries.shape[2]

    @property
    def value_dim(self) -> int:
        """Elements of a value."""
        return decoded(self.v[:1], self.type_v).shape[-1]


def save(path: Path, meta: dict[str, Any], positions: Sequence[int], layers: Sequence[Layer]) -> None:
    """Write the file, uncompressed, so that numpy reads a layer at a time."""
    arrays: dict[str, Any] = {
        "meta": np.array(json.dumps(meta)),
        "positions": np.array(positions, np.int64),
        "layers": np.array([layer.number for layer in layers], np.int64),
        "scale": np.array([layer.scale for layer in layers], np.float32),
        "reason": np.array([layer.reason for layer in layers]),
        "type_k": np.array([layer.type_k for layer in layers]),
        "type_v": np.array([layer.type_v for layer in layers]),
    }
    for i, layer in enumerate(layers):
        for name in ("queries", "visible", "k", "v"):
            arrays[f"{name}.{i}"] = getattr(layer, name)
    with path.open("wb") as file:
        np.savez(file, **arrays)


def load_meta(path: Path) -> dict[str, Any]:
    """What the file says of itself."""
    with np.load(path) as file:
        return json.loads(str(file["meta"]))


def load_layers(path: Path) -> Iterator[Layer]:
    """The layers, one after the other: together they may be large."""
    with np.load(path) as file:
        columns = (file[name].tolist() for name in ("layers", "scale", "reason", "type_k", "type_v"))
        for number, *rest in zip(*columns, strict=True):
            yield Layer(
                number, *rest, *(file[f"{name}.{number}"] for name in ("queries", "visible", "k", "v"))
            )


def library_keys(path: Path, n: int, dim: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Keys (n, dim) and queries (n_query, dim) for work with the index alone, from the layers of a capture in turn.

    Where a head has fewer than ``dim`` channels, several KV heads of the same cell and layer are joined, and as many query
    heads that read them; where it has more, the first ``dim`` are taken. Raises ValueError where there are fewer keys.
    """
    keys: list[npt.NDArray[np.float32]] = []
    queries: list[npt.NDArray[np.float32]] = []
    for layer in load_layers(path):
        joined = -(-dim // layer.key_dim)
        n_gqa = layer.n_head // layer.n_head_kv
        k = decoded(layer.k, layer.type_k)
        for first in range(0, layer.n_head_kv - joined + 1, joined):
            heads = range(first, first + joined)
            keys.append(np.concatenate([k[:, h] for h in heads], axis=1)[:, :dim])
            queries.append(np.concatenate([layer.queries[:, h * n_gqa] for h in heads], axis=1)[:, :dim])
        if sum(map(len, keys)) >= n:
            return np.ascontiguousarray(np.concatenate(keys)[:n]), np.concatenate(queries)
    raise ValueError(
        f"the capture has {sum(map(len, keys))} keys of {dim} channels, and {n} are wanted: capture more tokens"
    )


def random_layers(shape: Sequence[int], n_step: int = 8, seed: int = 0) -> Iterator[Layer]:
    """Gaussian queries, keys and values: (n_layer, n_head, n_head_kv, head_dim, n_kv)."""
    n_layer, n_head, n_head_kv, head_dim, n_kv = shape
    random = np.random.default_rng(seed)
    for number in range(n_layer):
        k, v = (random.standard_normal((n_kv, n_head_kv, head_dim), np.float32) for _ in range(2))
        yield Layer(
            number=number,
            scale=head_dim**-0.5,
            reason="none",
            type_k="f16",
            type_v="f16",
            queries=random.standard_normal((n_step, n_head, head_dim), np.float32),
            visible=np.ones((n_step, n_kv), bool),
            k=k.astype(np.float16),
            v=v.astype(np.float16),
        )


def as_kept(rows: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[Any]:
    """Bytes of heads' rows, (..., bytes), as the file keeps them."""
    return rows.view(AS_NUMPY[kind]) if kind in AS_NUMPY else rows


def decoded(rows: npt.NDArray[Any], kind: str) -> npt.NDArray[np.float32]:
    """Rows as the file keeps them, (..., key_dim) float32."""
    return quants.dequantize(rows, _ggml_type(kind))


def encoded(rows: npt.NDArray[Any], kind: str, wanted: str) -> npt.NDArray[np.uint8]:
    """Rows as the file keeps them, converted: (n_cell, bytes), the heads of a cell side by side."""
    if wanted != kind:
        rows = quants.quantize(decoded(rows, kind), _ggml_type(wanted))
    return np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1)


def _ggml_type(kind: str) -> GGMLQuantizationType:
    return GGMLQuantizationType[kind.upper()]
