"""Filling the cache, step by step, so that it can be watched."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ._libraries import llama_cpp
from .errors import PromptTooLongError
from .llama import Llama


def prefill(llm: Llama, tokens: Sequence[int], console: Console) -> tuple[int, float]:
    """Make ``tokens`` what the context holds, so that ``llm.generate(tokens)`` can go on from there.

    What the context already holds of them is kept. Where ``console`` is a terminal a progress bar runs on it,
    and leaves no trace.

    Returns how many tokens were evaluated, and the seconds that took. Raises PromptTooLongError, before
    anything is evaluated, if they leave no room for an answer.
    """
    if len(tokens) >= llm.n_ctx():
        raise PromptTooLongError(len(tokens), llm.n_ctx())
    kept = min(llm.longest_token_prefix(llm.input_ids[: llm.n_tokens].tolist(), tokens), len(tokens) - 1)
    # Not every kind of memory can forget its end; then all is evaluated anew.
    if kept > 0 and llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, kept, -1):
        llm.n_tokens = kept
    else:
        llm.reset()  # type: ignore[no-untyped-call]
    todo = len(tokens) - llm.n_tokens
    columns = (
        TextColumn("prefill"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    start = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("prefill", total=todo)
        while llm.n_tokens < len(tokens):
            step = tokens[llm.n_tokens : llm.n_tokens + llm.context_params.n_ubatch]
            llm.eval(step)
            progress.advance(bar, len(step))
    return todo, time.perf_counter() - start
