"""A thin driver of llama.cpp's C API with a Louver runtime around every decode, for tests.

``Engine`` is one context. ``Tap`` listens to the attention ops of its graphs and recomputes them.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

import numpy as np

from louver_llama._libraries import LIBRARY_FOLDER, llama_cpp
from louver_llama._libraries import core as _core

logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # llama.cpp's log goes there
llama_cpp.llama_backend_init()

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q5_0": 6, "q8_0": 8, "iq4_nl": 20, "bf16": 30}


class Model:
    """A GGUF file, loaded. Contexts share it."""

    n_gpu_layers = 0  # of models that are not told; llama.cpp's own default is all

    def __init__(self, path: Path | str, n_gpu_layers: int | None = None) -> None:
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = self.n_gpu_layers if n_gpu_layers is None else n_gpu_layers
        self.pointer = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.pointer, f"llama.cpp cannot load {path}"
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.pointer)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocabulary)

    def tokenize(self, text: str) -> list[int]:
        data = text.encode()
        tokens = (llama_cpp.llama_token * (len(data) + 1))()
        n = llama_cpp.llama_tokenize(self.vocabulary, data, len(data), tokens, len(tokens), False, False)
        return tokens[:n]

    def close(self) -> None:
        if self.pointer:
            llama_cpp.llama_model_free(self.pointer)
            self.pointer = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Engine:
    """A context of ``model`` and, unless ``runtime`` is False, a runtime with ``settings``."""

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 1024,
        n_seq_max: int = 1,
        unified: bool = True,
        type_k: str = "f16",
        type_v: str = "f16",
        n_threads: int = 2,
        n_batch: int = 512,
        flash_attn: bool = True,
        swa_full: bool = False,
        tap: Tap | None = None,
        runtime: bool | _core.Runtime = True,
        **settings: float | bool,
    ) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = n_batch
        params.n_seq_max = n_seq_max
        params.kv_unified = unified
        params.type_k = CACHE_TYPES[type_k]
        params.type_v = CACHE_TYPES[type_v]
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = int(flash_attn)
        params.swa_full = swa_full
        if tap is not None:
            params.cb_eval = tap.callback
        self.tap = tap  # keeps the callback alive
        self.model = model
        self.n_batch = n_batch
        # The runtime has to outlive the context.
        if runtime is True:
            self.runtime = _core.Runtime(n_ctx=n_ctx if unified else n_ctx // n_seq_max, **settings)
        else:
            self.runtime = runtime or None
        self.context = llama_cpp.llama_init_from_model(model.pointer, params)
        assert self.context, "llama.cpp cannot make this context"
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(n_batch, 0, max(n_seq_max, 1))

    def close(self) -> None:
        if self.context:
            llama_cpp.llama_batch_free(self.batch)
            llama_cpp.llama_free(self.context)
            self.context = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Decoding.

    @contextmanager
    def _scope(self) -> Iterator[None]:
        if self.runtime is None:
            yield
            return
        self.runtime.enter()
        try:
            yield
        finally:
            self.runtime.exit()

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        seq_ids: Sequence[int | Sequence[int]],
        *,
        only_last: bool = False,
    ) -> np.ndarray:
        """One llama_decode; returns the logits of every token or of the last, (n, n_vocab)."""
        assert len(tokens) == len(positions) == len(seq_ids) <= self.n_batch
        self.batch.n_tokens = len(tokens)
        for i, (token, position, ids) in enumerate(zip(tokens, positions, seq_ids, strict=True)):
            ids = [ids] if isinstance(ids, int) else ids
            self.batch.token[i] = token
            self.batch.pos[i] = position
            self.batch.n_seq_id[i] = len(ids)
            for j, seq in enumerate(ids):
                self.batch.seq_id[i][j] = seq
            self.batch.logits[i] = not only_last or i == len(tokens) - 1
        with self._scope():
            status = llama_cpp.llama_decode(self.context, self.batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")
        shape = (1 if only_last else len(tokens), self.model.n_vocab)
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits(self.context), shape=shape).copy()

    def extend(self, tokens: Sequence[int], seq: int = 0) -> np.ndarray:
        """Append to a sequence, in batches of n_batch; returns the logits of the last token."""
        for first in range(0, len(tokens), self.n_batch):
            part = tokens[first : first + self.n_batch]
            start = self.last(seq) + 1
            positions = range(start, start + len(part))
            logits = self.decode(part, positions, [seq] * len(part), only_last=True)
        return logits[-1]

    def step(self, tokens: dict[int, int]) -> np.ndarray:
        """Append one token to each of several sequences, in one batch; returns their logits."""
        return self.decode(list(tokens.values()), [self.last(seq) + 1 for seq in tokens], list(tokens))

    def generate(self, tokens: Sequence[int], seq: int = 0) -> np.ndarray:
        """Append token by token; returns all logits."""
        return np.stack([self.step({seq: token})[0] for token in tokens])

    # The cache.

    def first(self, seq: int = 0) -> int:
        return llama_cpp.llama_memory_seq_pos_min(self.memory, seq)

    def last(self, seq: int = 0) -> int:
        """The last position of a sequence, -1 if it is empty."""
        return llama_cpp.llama_memory_seq_pos_max(self.memory, seq)

    def remove(self, seq: int, first: int = -1, end: int = -1) -> None:
        assert llama_cpp.llama_memory_seq_rm(self.memory, seq, first, end)

    def copy(self, source: int, target: int, first: int = -1, end: int = -1) -> None:
        llama_cpp.llama_memory_seq_cp(self.memory, source, target, first, end)

    def keep(self, seq: int) -> None:
        llama_cpp.llama_memory_seq_keep(self.memory, seq)

    def shift(self, seq: int, first: int, end: int, delta: int) -> None:
        llama_cpp.llama_memory_seq_add(self.memory, seq, first, end, delta)

    def divide(self, seq: int, first: int, end: int, divisor: int) -> None:
        llama_cpp.llama_memory_seq_div(self.memory, seq, first, end, divisor)

    def clear(self, data: bool) -> None:
        llama_cpp.llama_memory_clear(self.memory, data)

    def save(self) -> ctypes.Array:
        state = (ctypes.c_uint8 * llama_cpp.llama_state_get_size(self.context))()
        assert llama_cpp.llama_state_get_data(self.context, state, len(state)) == len(state)
        return state

    def restore(self, state: ctypes.Array) -> None:
        assert llama_cpp.llama_state_set_data(self.context, state, len(state)) == len(state)

    def save_sequence(self, seq: int) -> ctypes.Array:
        state = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(self.context, seq))()
        assert llama_cpp.llama_state_seq_get_data(self.context, state, len(state), seq) == len(state)
        return state

    def restore_sequence(self, state: ctypes.Array, seq: int) -> None:
        assert llama_cpp.llama_state_seq_set_data(self.context, state, len(state), seq) == len(state)

    # Counts.

    @property
    def stats(self) -> dict:
        return self.runtime.stats()

    @property
    def violations(self) -> int:
        check = self.stats["check"]
        return check["misses"] + check["bound_violations"] + check["mass_violations"]

    @property
    def pairs(self) -> int:
        return self.stats["check"]["pairs"]


class _Tensor(ctypes.Structure):
    """ggml_tensor of the pinned ggml."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_float * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.POINTER(_Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


def _read(tensor: _Tensor) -> np.ndarray:
    """A tensor as float64, axes in ggml's order reversed."""
    bytes_per_row = {0: 4, 1: 2, 30: 2, 8: 34 / 32, 2: 18 / 32}[tensor.type] * tensor.ne[0]
    shape = tuple(reversed(tensor.ne))[:3] + (int(bytes_per_row),)
    strides = tuple(reversed(tensor.nb))[:3] + (1,)
    span = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(tensor.data))
    rows = np.ascontiguousarray(np.lib.stride_tricks.as_strided(memory, shape, strides))
    if tensor.type == 0:
        return rows.view(np.float32).astype(np.float64)
    if tensor.type == 1:
        return rows.view(np.float16).astype(np.float64)
    if tensor.type == 30:
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    blocks = rows.reshape(*shape[:3], -1, {8: 34, 2: 18}[tensor.type])
    scales = np.ascontiguousarray(blocks[..., :2]).view(np.float16).astype(np.float64)
    levels = blocks[..., 2:].view(np.int8)
    if tensor.type == 2:
        nibbles = blocks[..., 2:]
        levels = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).view(np.int8) - np.int8(8)
    return (scales * levels).reshape(*shape[:3], -1)


class Tap:
    """Recomputes attention in float64 from what lies in the cache, while it listens.

    ``errors`` has, for every attention op since ``listen``, |output - exact| per stream, token and head;
    ``longest_value`` is the largest |value| seen.
    """

    def __init__(self) -> None:
        self.listening = False
        self.errors: list[np.ndarray] = []
        self.longest_value = 0.0
        base = ctypes.CDLL(str(LIBRARY_FOLDER / "libggml-base.so"))
        base.ggml_op_name.restype = ctypes.c_char_p
        name = base.ggml_op_name

        def callback(pointer: int, ask: bool, _: object) -> bool:
            tensor = _Tensor.from_address(pointer)
            if not self.listening or name(tensor.op) != b"FLASH_ATTN_EXT":
                return not ask
            if not ask:
                self._recompute(tensor)
            return True

        self.callback = llama_cpp.ggml_backend_sched_eval_callback(callback)

    def listen(self) -> None:
        self.listening = True
        self.errors.clear()
        self.longest_value = 0.0

    def _recompute(self, op: _Tensor) -> None:
        def cache(tensor: _Tensor) -> np.ndarray:
            # llama.cpp casts a float32 cache to float16; what Louver serves is the cache.
            source = tensor.src[0]
            return _read(
                source.contents if tensor.type == 1 and source and source.contents.type == 0 else tensor
            )

        query = _read(op.src[0].contents)  # [stream][head][token][dim]
        key = cache(op.src[1].contents)  # [stream][kv_head][cell][dim]
        value = cache(op.src[2].contents)
        n_token = query.shape[2]
        mask = _read(op.src[3].contents)[:, :, :n_token]  # [stream][1][token][cell]
        groups = query.shape[1] // key.shape[1]
        key, value = (np.repeat(x, groups, axis=1) for x in (key, value))
        scores = query @ key.swapaxes(-1, -2) * op.op_params[0] + mask
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        exact = weights / weights.sum(axis=-1, keepdims=True) @ value
        output = _read(op).swapaxes(1, 2)  # [stream][token][head][dim] as it is stored
        self.errors.append(np.linalg.norm(output - exact, axis=-1).swapaxes(1, 2))
        self.longest_value = max(self.longest_value, float(np.linalg.norm(value, axis=-1).max()))
