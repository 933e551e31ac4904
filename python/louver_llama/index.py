"""The index as a library: keys in, every key with q.k >= tau out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from . import _index as core
from ._arrays import DTYPES, Keys, as_keys, as_queries
from .matches import Certificate, Matches, SearchStats, Selection
from .oracles import Oracle

__all__ = ["Index", "IndexStats", "MemoryUsage"]

_MAX_INT = 2**31 - 1


@dataclass(frozen=True)
class MemoryUsage:
    """Bytes: of the keys (0 while the caller's are borrowed), of the index over them, of the rest."""

    keys: int
    index: int
    other: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.keys + self.index + self.other


@dataclass(frozen=True)
class IndexStats:
    """What an index holds. ``index_share`` is the index's bytes beside those of its positions' keys."""

    kind: str
    dtype: str
    n_head_kv: int
    dim: int
    n_positions: int
    n_live: int
    is_borrowed: bool
    memory: MemoryUsage
    index_share: float


class Index:
    """Keys of one or several KV heads, searched for every key with ``q.k >= tau``. None is ever missed.

    Positions number the keys in the order they were appended, the same in every head; a removed position stays
    empty until ``update`` writes it. Made by ``build`` or ``load``. Methods may be called from several threads:
    searches run side by side, a change waits for them; the GIL is released meanwhile. Whatever raises leaves the
    index as it was.
    """

    def __init__(self, inner: core.Index) -> None:
        self._core = inner

    @classmethod
    def build(
        cls,
        keys: Any,
        kind: Literal["grid", "ball"] = "grid",
        *,
        copy: bool | None = None,
        n_threads: int = 0,
        n_subspaces: int | None = None,
        group_size: int = 4,
        grouping: Literal["tree", "kmeans"] = "tree",
        enclosure: Literal["ball", "box"] = "ball",
        merge_at: int = 1024,
        seed: int = 0,
    ) -> Index:
        """An index over keys of shape (n, dim) or (n_head_kv, n, dim); n may be 0, dim is 1 to 1024.

        keys: float32, float16 or bfloat16, in any layout: numpy (bfloat16 by ``ml_dtypes``), the buffer protocol, DLPack.
            On a GPU (CuPy, PyTorch, JAX; DLPack or ``__cuda_array_interface__``) the index is a
            ``louver_llama.device_index.DeviceIndex``: of kind "grid", dim a multiple of 8 up to 256.
        kind: "grid", the engine's index, or "ball", the one of arXiv 2605.06763.
        copy: False reads the caller's memory instead of copying it, until the first change to the index; it must not
            change meanwhile, and the last dimension has to be contiguous. By default True; on a GPU, where rows have to be
            aligned to 16 bytes, only if they are not.
        n_threads: threads of every call; 0 takes all cores.
        n_subspaces, group_size, grouping, enclosure, merge_at, seed: of kind "ball": slices of the channels (by
            default 16, or dim if that is less), keys of a group, "tree" (balanced) or "kmeans", "ball" or "box" around a
            group, how many new or rewritten keys are grouped at once, and the seed of kmeans.

        Raises TypeError or ValueError, naming what was given and what is accepted.
        """
        from .device_index import DeviceIndex, on_gpu  # which derives from this class

        if not isinstance(copy, (bool, NoneType)):
            raise TypeError(f"copy must be True or False, not {copy!r}")
        if on_gpu(keys):
            return DeviceIndex.over(keys, kind, copy)
        view = as_keys("keys", keys)
        for name, word in (("kind", kind), ("grouping", grouping), ("enclosure", enclosure)):
            if not isinstance(word, str):
                raise TypeError(f"{name} must be a string, not {word!r}")
        if n_subspaces is None:
            n_subspaces = min(16, view.array.shape[2])
        options = core.IndexOptions(
            kind,
            _integer("n_threads", n_threads, 0, 1024),
            _integer("n_subspaces", n_subspaces, 1, view.array.shape[2]),
            _integer("group_size", group_size, 1, _MAX_INT),
            grouping,
            enclosure,
            _integer("merge_at", merge_at, 1, _MAX_INT),
            _integer("seed", seed, 0, 2**64 - 1),
        )
        return cls(core.Index.build(view.array, view.dtype, options, copy is not False))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, n_threads: int = 0) -> Index:
        """The index that ``save`` wrote.

        Raises FileNotFoundError, or an IndexFileError: NotAnIndexError, IndexVersionError, TruncatedIndexError,
        CorruptIndexError, IndexSystemError. A file, however wrong, cannot make a search miss a key: it holds keys, and
        the bounds are made anew (docs/format.md).
        """
        name = _path(path)
        Path(os.fsdecode(name)).stat()  # Python's own error where there is none
        return cls(core.Index.load(name, _integer("n_threads", n_threads, 0, 1024)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the index to a file; one that is there is replaced as a whole. Raises IndexSystemError."""
        self._core.save(_path(path))

    def append(self, keys: Any) -> range:
        """Adds keys, (n, dim) or (n_head_kv, n, dim), of the index's dtype; returns their positions."""
        view = self._keys(keys)
        first = self._core.append(view.array, view.dtype)
        return range(first, first + view.array.shape[1])

    def update(self, positions: Iterable[int] | npt.NDArray[Any], keys: Any) -> None:
        """Writes other keys at positions, each named once: (n, dim) or (n_head_kv, n, dim). Removed ones live again."""
        at = _positions(positions)
        view = self._keys(keys)
        if view.array.shape[1] != len(at):
            raise ValueError(
                f"keys has {view.array.shape[1]} keys, accepted is one for each of {len(at)} positions"
            )
        self._core.update(at, view.array, view.dtype)

    def remove(self, positions: Iterable[int] | npt.NDArray[Any]) -> None:
        """Takes live positions, each named once, out of all results. Other positions keep their numbers."""
        self._core.remove(_positions(positions))

    def rebuild(self) -> None:
        """Makes all bounds anew: tighter after many updates and removals."""
        self._core.rebuild()

    def search(
        self,
        queries: Any,
        tau: float | npt.ArrayLike,
        *,
        method: Literal["sum", "sweep", "filter"] = "sum",
        subspace_tau: npt.ArrayLike | None = None,
    ) -> Matches:
        """Every live key with ``q.k >= tau``, and no other: decided as in real arithmetic on the stored numbers.

        queries: (dim,), (n_query, dim) or (n_head_kv, n_gqa, dim), float32, float16 or bfloat16, finite. They are
            dealt to the KV heads as attention does: each KV head has the next n_query / n_head_kv of them.
        tau: a number for all, or one for each query; infinities are fine, NaN is not.
        method: of kind "ball": "sum" bounds every key by the sum of its subspaces' bounds, "sweep" is the threshold
            algorithm, exact as well; "filter" also asks for ``q_s.k_s >= subspace_tau[..., s]`` in every subspace s.
        subspace_tau: (n_subspaces,) or (n_query, n_subspaces), with "filter" only.

        A key with a NaN or an infinity is in every result. An empty index has no matches.
        """
        array, shape = as_queries(queries, self.n_head_kv, self.dim)
        n = len(array)
        if not isinstance(method, str):
            raise TypeError(f"method must be a string, not {method!r}")
        if self.kind == "grid" and method in ("sweep", "filter"):
            raise ValueError(f"method is {method!r}, accepted for an index of kind 'grid' is 'sum'")
        offsets, ids, scores, stats = self._core.search(
            array, _thresholds("tau", tau, (n,)), method, self._subspace_tau(subspace_tau, method, n)
        )
        return Matches(offsets, ids, scores, SearchStats(*stats), shape)

    def select(self, queries: Any, oracle: Oracle, *, scale: float | None = None) -> Selection:
        """The keys that the oracle keeps, and for each query a certificate of what the others weigh.

        queries: as for ``search``. scale: what softmax multiplies q.k by; 1 / sqrt(dim) by default.
        Raises ValueError for an empty index: there is no mass to bound.
        """
        array, shape = as_queries(queries, self.n_head_kv, self.dim)
        (offsets, ids, scores, stats), found = self._core.select(array, _oracle(oracle), self._scale(scale))
        matches = Matches(offsets, ids, scores, SearchStats(*stats), shape)
        return Selection(matches, tuple(certificate(one) for one in found))

    def key(self, position: int) -> npt.NDArray[np.float32]:
        """The key at a position as float32: (dim,), or (n_head_kv, dim) with several heads. A removed one still stands."""
        at = _integer("position", position, 0, self.n_positions - 1)
        keys = self._core.key(at)
        return np.asarray(keys[0] if self.n_head_kv == 1 else keys)

    @property
    def kind(self) -> str:
        """Which index: "grid" or "ball"."""
        return self._core.options.kind

    @property
    def dtype(self) -> str:
        """Of the keys: "float32", "float16" or "bfloat16"."""
        return DTYPES[self._core.dtype]

    @property
    def n_head_kv(self) -> int:
        """KV heads."""
        return self._core.n_head_kv

    @property
    def dim(self) -> int:
        """Channels of a key."""
        return self._core.dim

    @property
    def n_positions(self) -> int:
        """Positions given out, live or removed."""
        return self._core.n_positions

    def __len__(self) -> int:
        return self._core.n_live

    def __contains__(self, position: object) -> bool:
        """Whether the position is live."""
        if not isinstance(position, Integral) or not 0 <= int(position) < self.n_positions:
            return False
        return self._core.is_live(int(position))

    @property
    def memory_usage(self) -> MemoryUsage:
        """Bytes in use."""
        return MemoryUsage(*self._core.memory_usage())

    @property
    def stats(self) -> IndexStats:
        """What the index holds."""
        memory = self.memory_usage
        n_positions = self.n_positions
        key_bytes = n_positions * self.n_head_kv * self.dim * (4 if self.dtype == "float32" else 2)
        return IndexStats(
            kind=self.kind,
            dtype=self.dtype,
            n_head_kv=self.n_head_kv,
            dim=self.dim,
            n_positions=n_positions,
            n_live=len(self),
            is_borrowed=self._core.is_borrowed,
            memory=memory,
            index_share=memory.index / key_bytes if key_bytes else 0.0,
        )

    def to_dict(self) -> dict[str, Any]:
        """``stats`` and the options as plain numbers and strings, for JSON."""
        stats = self.stats
        found = {name: value for name, value in vars(stats).items() if name != "memory"}
        found["memory"] = {**vars(stats.memory), "total": stats.memory.total}
        names = ["n_threads"]
        if self.kind == "ball":
            names += ["n_subspaces", "group_size", "grouping", "enclosure", "merge_at", "seed"]
        found["options"] = {name: getattr(self._core.options, name) for name in names}
        return found

    def __repr__(self) -> str:
        return (
            f"Index(kind={self.kind!r}, dtype={self.dtype!r}, n_head_kv={self.n_head_kv}, dim={self.dim}, "
            f"n_positions={self.n_positions}, live={len(self)})"
        )

    def _keys(self, keys: Any) -> Keys:
        view = as_keys("keys", keys, self.n_head_kv, self.dim)
        if view.dtype != self._core.dtype:
            raise TypeError(f"keys has dtype {DTYPES[view.dtype]}, accepted is the index's {self.dtype}")
        return view

    def _scale(self, scale: float | None) -> float:
        if scale is None:
            return float(self.dim**-0.5)
        if isinstance(scale, bool) or not isinstance(scale, Real):
            raise TypeError(f"scale must be a number > 0, not {scale!r}")
        if not 0 < scale < 1e30:
            raise ValueError(f"scale must be a number above 0 and below 1e30, not {scale!r}")
        return float(scale)

    def _subspace_tau(
        self, given: npt.ArrayLike | None, method: str, n: int
    ) -> npt.NDArray[np.float64] | None:
        if (given is not None) != (method == "filter"):
            wanted = "given with" if method == "filter" else "for"
            raise ValueError(f"subspace_tau must be {wanted} method 'filter' only, the method is {method!r}")
        return (
            None if given is None else _thresholds("subspace_tau", given, (n, self._core.options.n_subspaces))
        )


def certificate(
    found: core.SelectionCertificate, error_bound: float | None = None, dense: bool = False
) -> Certificate:
    """The core's certificate as Python's."""
    return Certificate(
        tau=found.tau,
        n_keys=found.n_keys,
        n_bounded=found.n_bounded,
        n_scored=found.n_scored,
        n_selected=found.n_selected,
        bytes_read=found.bytes_read,
        delta=found.delta,
        error_bound=error_bound,
        dense=dense,
    )


def _oracle(given: Any) -> core.Oracle:
    if not isinstance(given, Oracle) or not hasattr(given, "kind"):
        raise TypeError(f"oracle must be one of louver_llama.oracles, not {given!r}")
    return given._to_core()


def _integer(name: str, value: Any, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer in [{least}, {most}], not {value!r}")
    if not least <= int(value) <= most:
        raise ValueError(f"{name} must be an integer in [{least}, {most}], not {value!r}")
    return int(value)


def _path(given: Any) -> bytes:
    name = os.fsencode(given)
    if b"\0" in name:
        raise ValueError(f"path has a null byte: {given!r}")
    return name


def _positions(given: Iterable[int] | npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    wanted = "integers in [0, n_positions)"
    try:
        listed = given if isinstance(given, np.ndarray) else list(given)
    except TypeError:
        raise TypeError(f"positions must be a sequence of {wanted}, not {given!r}") from None
    if not isinstance(listed, np.ndarray):
        for position in listed:
            if isinstance(position, (bool, np.bool_)) or not isinstance(position, Integral):
                raise TypeError(f"positions must be {wanted}, not {position!r}")
            if not 0 <= int(position) < 2**63:
                raise ValueError(f"positions must be {wanted}, not {position!r}")
        return np.array(listed, dtype=np.int64)
    if listed.ndim != 1:
        raise ValueError(f"positions has shape {listed.shape}, accepted is (n,)")
    if listed.dtype.kind not in "iu":
        raise TypeError(f"positions has dtype {listed.dtype}, accepted are {wanted}")
    if listed.dtype == np.uint64 and listed.size and listed.max() >= 2**63:
        raise ValueError(f"positions must be {wanted}, not {listed.max()}")
    return np.ascontiguousarray(listed, dtype=np.int64)


def _thresholds(name: str, given: npt.ArrayLike, shape: tuple[int, ...]) -> npt.NDArray[np.float64]:
    try:
        exact = np.asarray(given)
    except ValueError:
        exact = np.empty(0, dtype=object)
    if exact.dtype.kind not in "iuf":
        raise TypeError(f"{name} must be numbers that float64 can hold, not {given!r}")
    array = exact.astype(np.float64)
    if np.isnan(array).any():
        raise ValueError(f"{name} has a NaN, accepted is a number or an infinity")
    if exact.dtype.kind in "iu":
        rounds = exact.size > 0 and max(abs(int(exact.max())), abs(int(exact.min()))) > 2**53
    else:
        rounds = bool((array.astype(exact.dtype) != exact).any())
    if rounds:
        raise ValueError(
            f"{name} has a number that float64 cannot hold, and rounding it would change the range"
        )
    try:
        return np.ascontiguousarray(np.broadcast_to(array, shape))
    except ValueError:
        raise ValueError(f"{name} has shape {array.shape}, accepted is what broadcasts to {shape}") from None
