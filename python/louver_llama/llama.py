"""``Llama``: llama_cpp's, with Louver attention."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

from ._libraries import core, llama_cpp
from .config import LouverConfig
from .errors import PromptTooLongError
from .gpus import gpu_obstacle
from .model_file import check_model_file, explained_load
from .stats import LouverStats

_CELLS_STEP = 256
_TOO_LONG = re.compile(r"Requested tokens \((\d+)\) exceed context window of (\d+)")


class Llama(llama_cpp.Llama):
    """A ``llama_cpp.Llama`` whose decode steps attend through Louver.

    Everything of llama_cpp.Llama works as it does there. New are the argument ``louver``, the property of
    that name, ``louver_stats`` and ``reset_louver_stats``. ``flash_attn`` is on by default: Louver needs it.

    Whoever calls llama_cpp.llama_decode(llm.ctx, ...) directly attends through Louver too, once a decode by
    this object's own methods has shown it the cache.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        louver: LouverConfig | None = None,
        flash_attn: bool = True,
        n_ctx: int = 512,
        n_gpu_layers: int = 0,
        **kwargs: Any,
    ) -> None:
        """Load the model in the GGUF file ``model_path``.

        louver: Louver's settings; None for the defaults.
        flash_attn: False is accepted with ``LouverConfig(enabled=False)`` only.
        n_ctx: cells of the context, rounded up to a multiple of 256 as llama.cpp does; 0 for the model's own.
        n_gpu_layers: how many layers go to the GPU with their cache, -1 for all. Louver attends where the cache
            is. With ``offload_kqv=False`` it stays in host memory; llama.cpp copies it to the GPU for stock's attention.
        kwargs: all else that llama_cpp.Llama takes, as split_mode, main_gpu and tensor_split for several GPUs.

        Warns (RuntimeWarning) where ``n_gpu_layers`` asks for a GPU and none can be used: llama.cpp then runs the
        model on the CPU. Raises ModelFileError for a file that is not a whole GGUF model, ModelNotFoundError if there is none,
        and ValueError for settings that cannot work together.
        """
        self._stack = contextlib.ExitStack()  # close() needs it, even where we get no further
        path = os.fspath(model_path)
        self._flash_attn = flash_attn
        config = self._accepted(louver if louver is not None else LouverConfig())
        check_model_file(path)
        if n_gpu_layers != 0 and (obstacle := gpu_obstacle()) is not None:
            warning = f"n_gpu_layers={n_gpu_layers}: {obstacle}; the model runs on the CPU"
            warnings.warn(warning, RuntimeWarning, stacklevel=2)
        with explained_load(path):
            # llama_cpp sizes its arrays by what it was asked for, and fails when the larger context fills up.
            cells = -(-n_ctx // _CELLS_STEP) * _CELLS_STEP
            super().__init__(path, flash_attn=flash_attn, n_ctx=cells, n_gpu_layers=n_gpu_layers, **kwargs)
        self._louver = config
        self._runtime = core.Runtime(n_ctx=self.n_ctx(), **_runtime_settings(config))
        _decode_inside(self._runtime, self._ctx)

    @property
    def louver(self) -> LouverConfig:
        """Louver's settings. May be set between calls, and between the tokens of a stream."""
        return self._louver

    @louver.setter
    def louver(self, config: LouverConfig) -> None:
        self._louver = self._accepted(config)
        self._runtime.configure(**_runtime_settings(config))

    def louver_stats(self) -> LouverStats:
        """Counts since the last reset, the index's memory, and the certificates of the last step."""
        return cast(LouverStats, self._runtime.stats())

    def reset_louver_stats(self) -> None:
        """Start all counts anew."""
        self._runtime.reset_stats()

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate ``tokens`` behind those in the context. Raises PromptTooLongError if they do not fit."""
        if self.n_tokens + len(tokens) > self._n_ctx:
            raise PromptTooLongError(self.n_tokens + len(tokens), self._n_ctx)
        super().eval(tokens)

    def _accepted(self, config: LouverConfig) -> LouverConfig:
        if not isinstance(config, LouverConfig):
            raise TypeError(f"louver must be a LouverConfig, not {config!r}")
        if config.enabled and not self._flash_attn:
            raise ValueError(
                "flash_attn=False leaves no attention op for Louver to serve: without flash attention "
                "llama.cpp computes attention by separate matrix products. Leave flash_attn out, "
                "or pass louver=LouverConfig(enabled=False)"
            )
        return config

    def _init_sampler(self, *args: Any, **kwargs: Any) -> Any:
        # For a grammar that cannot be parsed llama_cpp would put a null pointer into the chain of samplers.
        grammar = kwargs.get("grammar")
        if grammar is not None:
            sampler = llama_cpp.llama_sampler_init_grammar(
                self._model.vocab, grammar._grammar.encode(), grammar._root.encode()
            )
            if not sampler:
                raise ValueError("the grammar cannot be parsed")
            llama_cpp.llama_sampler_free(sampler)
        return super()._init_sampler(*args, **kwargs)

    def _create_completion(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        try:
            yield from super()._create_completion(*args, **kwargs)
        except ValueError as error:
            if too_long := _TOO_LONG.fullmatch(str(error)):
                raise PromptTooLongError(int(too_long[1]), int(too_long[2])) from None
            raise

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "louver": self._louver}


def _runtime_settings(config: LouverConfig) -> dict[str, Any]:
    return {
        "epsilon": float(config.epsilon),
        "min_context": int(config.min_context),
        "min_context_gpu": int(config.min_context_gpu),
        "sinks": int(config.sinks),
        "recent": int(config.recent),
        "certified": config.guarantee == "certified",
        "compensate": config.compensate,
        "enabled": config.enabled,
        "check": config.check,
    }


def _decode_inside(runtime: Any, context: Any) -> None:
    """Make every decode of ``context`` run inside ``runtime``, so that its caches become the runtime's."""
    decode = context.decode

    def decode_inside(batch: Any) -> None:
        runtime.enter()
        try:
            decode(batch)
        finally:
            runtime.exit()

    context.decode = decode_inside
