"""Float64 references for the tests of the core, and caches laid out as llama.cpp lays them out.

The core is taken from the extension directly: nothing here loads llama.cpp's Python side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from louver_llama import _core

core = _core.testing

ISAS: list[str] = _core.available_isas()
DTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
BLOCK = 64
UNIT = 2.0**-24  # half an ulp of 1 in float32
LOG2E = math.log2(math.e)

Float = NDArray[np.float32]
Double = NDArray[np.float64]
Bits = NDArray[np.uint64]


def padded(dim: int) -> int:
    return -(-dim // 16) * 16


def pad(x: Float) -> Float:
    """Rows of (n, dim) padded with zeros, as the kernels want them."""
    return np.pad(np.asarray(x, np.float32), ((0, 0), (0, padded(x.shape[1]) - x.shape[1])))


def to_bits(cells: NDArray[np.bool_]) -> Bits:
    """(n,) bool to (ceil(n / 64),) uint64."""
    whole = np.zeros(-(-len(cells) // BLOCK) * BLOCK, bool)
    whole[: len(cells)] = cells
    return np.packbits(whole, bitorder="little").view(np.uint64)


def from_bits(bits: Bits | Sequence[int]) -> NDArray[np.bool_]:
    """(n_blocks,) uint64 to (n_blocks * 64,) bool."""
    return np.unpackbits(np.asarray(bits, np.uint64).view(np.uint8), bitorder="little").astype(bool)


def store(x: Float, dtype: str) -> NDArray[np.uint8]:
    """(..., dim) float32 as the cache stores it: (..., bytes) uint8."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "f32":
        return x.view(np.uint8)
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint8)
    if dtype == "bf16":
        bits = x.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).view(np.uint8)
    most = {"q8_0": 127, "q4_0": 7}[dtype]
    groups = x.reshape(*x.shape[:-1], -1, 32)
    scale = (np.abs(groups).max(-1, keepdims=True) / most).astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        levels = np.nan_to_num(np.round(groups / scale.astype(np.float32)))
    levels = np.clip(levels, -most, most).astype(np.int8)
    if dtype == "q4_0":
        nibbles = (levels + 8).view(np.uint8)
        levels = (nibbles[..., :16] | nibbles[..., 16:] << 4).view(np.int8)
    packed = np.concatenate([scale.view(np.uint8), levels.view(np.uint8)], axis=-1)
    return packed.reshape(*x.shape[:-1], -1)


def load(data: NDArray[np.uint8], dtype: str) -> Float:
    """What a cache's bytes stand for, exactly: (..., bytes) uint8 to (..., dim) float32."""
    data = np.ascontiguousarray(data)
    if dtype == "f32":
        return data.view(np.float32)
    if dtype == "f16":
        return data.view(np.float16).astype(np.float32)
    if dtype == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    groups = data.reshape(*data.shape[:-1], -1, {"q8_0": 34, "q4_0": 18}[dtype])
    scale = np.ascontiguousarray(groups[..., :2]).view(np.float16).astype(np.float32)
    levels = np.ascontiguousarray(groups[..., 2:]).view(np.int8)
    if dtype == "q4_0":
        nibbles = levels.view(np.uint8)
        levels = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).view(np.int8) - np.int8(8)
    return (scale * levels).reshape(*data.shape[:-1], -1)


@dataclass
class Stored:
    """K or V of one layer. ``data`` is what the core reads: change it, and the core sees the change."""

    data: NDArray[np.uint8]  # (n_cells, n_head * bytes)
    dtype: str
    dim: int
    cache: core.Cache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = core.Cache(self.data, self.dtype, self.dim)

    @classmethod
    def of(cls, x: Float, dtype: str = "f32", gap: int = 0) -> Stored:
        """Of (n_cells, n_head, dim), or (n_cells, dim) for one head; rows lie ``gap`` bytes apart."""
        x = x[:, None] if x.ndim == 2 else x
        rows = store(x, dtype).reshape(len(x), -1)
        room = np.full((len(x), rows.shape[1] + gap), 0xFF, np.uint8)
        room[:, : rows.shape[1]] = rows
        return cls(room[:, : rows.shape[1]], dtype, x.shape[2])

    @property
    def n_cells(self) -> int:
        return len(self.data)

    def decoded(self) -> Float:
        """(n_cells, n_head, dim) float32: the stored numbers."""
        return load(self.data.reshape(len(self.data), self.cache.n_head, -1), self.dtype)

    def write(self, cell: int, head: int, x: Float) -> None:
        """Overwrite one cell of one head, as a SET_ROWS does."""
        width = self.data.shape[1] // self.cache.n_head
        self.data[cell, head * width : (head + 1) * width] = store(np.asarray(x, np.float32), self.dtype)


def repair_all(
    index: core.GridIndex, wanted: NDArray[np.bool_], keys: Stored, values: Stored | None, head: int = 0
) -> int:
    """Index the wanted cells of all blocks; returns how many were encoded."""
    encoded = 0
    for block, bits in enumerate(to_bits(wanted)):
        if bits:
            encoded += index.repair(block, int(bits), keys.cache, values.cache if values else None, head)[0]
    return encoded


def indexed_cells(index: core.GridIndex) -> NDArray[np.bool_]:
    return from_bits([index.indexed(b) for b in range(index.n_blocks)])


def exact_dots(query: Float, keys: Float) -> Double:
    """(n_query, n) exact q.k, rounded once: products of float32 are exact in float64, fsum rounds once."""
    products = query.astype(np.float64)[:, None] * keys.astype(np.float64)[None]
    return np.array([[math.fsum(row) for row in head] for head in products.tolist()]).reshape(
        len(query), len(keys)
    )


def norm_up(x: Float) -> Float:
    """(n, dim) to |x| rounded up, as a decode step does."""
    norm = np.linalg.norm(x.astype(np.float64), axis=-1).astype(np.float32)
    return norm * np.float32(core.NORM_INFLATION)


def softmax(scores: Double) -> Double:
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def dense(query: Float, keys: Float, values: Float, visible: NDArray[np.bool_], scale: float) -> Double:
    """Attention in float64. query (n_head, dim), keys and values (n_cells, n_head_kv, dim): (n_head, dim)."""
    n_gqa = len(query) // keys.shape[1]
    out = np.zeros((len(query), values.shape[2]))
    for h in range(len(query)):
        if visible.any():
            share = weights(query[h], keys[:, h // n_gqa], visible, scale)
            out[h] = share @ values[: len(visible), h // n_gqa][visible].astype(np.float64)
    return out


def weights(query: Float, keys: Float, visible: NDArray[np.bool_], scale: float) -> Double:
    """Softmax weights of the visible cells for one head, in float64."""
    n = len(visible)
    return softmax(keys[:n][visible].astype(np.float64) @ query.astype(np.float64) * scale)


@dataclass(frozen=True)
class Step:
    """What decode() found for one token."""

    outcome: str
    output: Float  # (n_head, value_dim)
    certificates: list[core.HeadCertificate]  # (n_head,)
    checked: core.CheckCounts  # of all tokens that shared the scan


@dataclass
class Layer:
    """A layer's cache with its indexes, and the queries of one token."""

    query: Float  # (n_head, key_dim)
    keys: Stored
    values: Stored
    scale: float
    visible: NDArray[np.bool_]
    index: list[core.GridIndex] = field(default_factory=list)

    @property
    def n_gqa(self) -> int:
        return len(self.query) // self.keys.cache.n_head

    def build(self, wanted: NDArray[np.bool_] | None = None) -> Layer:
        """Index ``wanted`` cells, or all visible ones."""
        if not self.index:
            self.index = [
                core.GridIndex(self.keys.dim, self.values.dim, self.keys.n_cells)
                for _ in range(self.keys.cache.n_head)
            ]
        for head, index in enumerate(self.index):
            repair_all(index, self.visible if wanted is None else wanted, self.keys, self.values, head)
        return self

    def invalidate(self, first: int, count: int) -> None:
        for index in self.index:
            index.invalidate(first, count)

    def decode(self, **settings: float | list[bool]) -> Step:
        return decode_together([self], **settings)[0]

    def dense(self) -> Double:
        return dense(self.query, self.keys.decoded(), self.values.decoded(), self.visible, self.scale)

    def heads(self) -> Iterator[tuple[int, Float, Float]]:
        """For each query head: its number, its keys and its values as stored, (n_kv, dim)."""
        keys, values = self.keys.decoded(), self.values.decoded()
        for h in range(len(self.query)):
            yield h, keys[: len(self.visible), h // self.n_gqa], values[: len(self.visible), h // self.n_gqa]


def decode_together(tokens: Sequence[Layer], **settings: float | list[bool]) -> list[Step]:
    """Tokens that differ in their queries and in what they see of one cache, by one scan."""
    layer, n_head = tokens[0], len(tokens[0].query)
    decoded = core.decode(
        np.stack([token.query for token in tokens]),
        layer.keys.cache,
        layer.values.cache,
        layer.index,
        np.stack([token.visible for token in tokens]),
        layer.scale,
        **settings,
    )
    output = decoded.output
    return [
        Step(decoded.outcome, output[t], decoded.certificates[t * n_head : (t + 1) * n_head], decoded.checked)
        for t in range(len(tokens))
    ]


def make_layer(
    rng: np.random.Generator,
    n_kv: int,
    *,
    n_head_kv: int = 2,
    n_gqa: int = 2,
    key_dim: int = 64,
    value_dim: int | None = None,
    dtypes: tuple[str, str] = ("f16", "f16"),
    spread: float = 4.0,
    visible: NDArray[np.bool_] | None = None,
    gap: int = 0,
) -> Layer:
    """Random K and V; ``spread`` is the standard deviation of the scores in nats: 4 is concentrated.

    Keys have a common offset and channels of different size, as real ones do.
    """
    value_dim = value_dim or key_dim
    offset = rng.normal(size=(n_head_kv, key_dim)) * 2
    size = np.exp(rng.normal(size=(n_head_kv, key_dim)) * 0.5)
    noise = rng.normal(size=(n_kv, n_head_kv, key_dim))
    query = rng.normal(size=(n_head_kv * n_gqa, key_dim))
    own_size = np.repeat(size, n_gqa, axis=0)
    query *= spread * math.sqrt(key_dim) / np.linalg.norm(query * own_size, axis=1, keepdims=True)
    return Layer(
        query=query.astype(np.float32),
        keys=Stored.of((offset + size * noise).astype(np.float32), dtypes[0], gap),
        values=Stored.of(rng.normal(size=(n_kv, n_head_kv, value_dim)).astype(np.float32), dtypes[1], gap),
        scale=1 / math.sqrt(key_dim),
        visible=np.ones(n_kv, bool) if visible is None else visible,
    )


def make_tokens(
    rng: np.random.Generator, visible: NDArray[np.bool_], *, n_gqa: int = 2, **layer: object
) -> list[Layer]:
    """Tokens of one layer: ``visible`` (n_token, n_kv). Indexed is what any of them sees."""
    n_token, n_kv = visible.shape
    whole = make_layer(rng, n_kv, n_gqa=n_gqa * n_token, **layer).build(visible.any(axis=0))
    queries = whole.query.reshape(-1, n_token, n_gqa, whole.keys.dim).swapaxes(0, 1)
    return [
        replace(whole, query=np.ascontiguousarray(query).reshape(-1, whole.keys.dim), visible=seen)
        for query, seen in zip(queries, visible, strict=True)
    ]
