"""The cache of a benchmark: filled from depth to depth, and rewound to the depth between samples."""

from __future__ import annotations

from collections.abc import Sequence

from ._libraries import llama_cpp
from .bench_progress import Advance, Watch
from .bench_states import StateFolder
from .config import LouverConfig
from .llama import Llama

_SEQUENCE = 0
_SERVED_TOKENS = 16  # the most of a step that is not stock's, on the CPU; on a GPU it is 4


class FilledCache:
    """The context of ``llm``, holding the first ``depth`` of ``tokens``.

    n_threads: threads of filling.
    min_context_gpu: the contenders': cells from which a GPU's cache is to have an index.
    states: where filled caches are kept for the next run; None for nowhere.
    """

    def __init__(
        self,
        llm: Llama,
        tokens: Sequence[int],
        n_threads: int,
        min_context_gpu: int,
        states: StateFolder | None,
        watch: Watch,
    ) -> None:
        self.llm = llm
        self.tokens = tokens
        self.depth = 0
        self._n_threads = n_threads
        self._min_context_gpu = min_context_gpu
        self._states = states
        self._watch = watch

    def fill(self, depth: int) -> None:
        """Go on from the depth that was filled before, or take what an earlier run has kept."""
        if depth == self.depth:
            return
        with self._watch.stage(f"fill to {depth:,} tokens", depth) as advance:
            if self._states is None or not self._states.load(self.llm, self.tokens[:depth]):
                self.rewind()
                advance(self.depth)
                self._evaluate(depth, advance)
                if self._states is not None:
                    self._states.save(self.llm, self.tokens[:depth])
        self.depth = depth

    def rewind(self) -> None:
        """Forget what lies behind the depth. Settings and threads change only where all is filled anew."""
        if self._forget():
            self.llm.n_tokens = self.depth
            return
        # Not every kind of memory can forget its end, and a sliding window may have lost its begin. What was
        # kept in a file would come without an index, which the next sample would then have to build.
        self.llm.reset()  # type: ignore[no-untyped-call]
        self._evaluate(self.depth)

    def set_threads(self, n_threads: int) -> None:
        """Let both decode and batches run on ``n_threads``."""
        llama_cpp.llama_set_n_threads(self.llm.ctx, n_threads, n_threads)

    def _forget(self) -> bool:
        memory = llama_cpp.llama_get_memory(self.llm.ctx)
        if self.llm.n_tokens < self.depth or not llama_cpp.llama_memory_seq_rm(
            memory, _SEQUENCE, self.depth, -1
        ):
            return False
        window = llama_cpp.llama_model_n_swa(self.llm.model)
        first = llama_cpp.llama_memory_seq_pos_min(memory, _SEQUENCE)
        # -1 where nothing is left.
        return not window or self.depth == 0 or 0 <= first <= max(0, self.depth - window)

    def _evaluate(self, depth: int, advance: Advance | None = None) -> None:
        self.set_threads(self._n_threads)
        while self.llm.n_tokens < depth:
            end = min(self.llm.n_tokens + self.llm.context_params.n_ubatch, depth)
            step = self.tokens[self.llm.n_tokens : end]
            # Enabled, the index is built on the way; but stock is to attend, to short steps too.
            self.llm.louver = LouverConfig(
                enabled=len(step) > _SERVED_TOKENS, min_context_gpu=self._min_context_gpu
            )
            self.llm.eval(step)
            llama_cpp.llama_synchronize(self.llm.ctx)
            if advance is not None:
                advance(len(step))
