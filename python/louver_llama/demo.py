"""``louver-llama demo``: a long text, a question, and the answer with stock llama.cpp and with Louver."""

from __future__ import annotations

import argparse
import itertools
import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .chat import chat_tokens, is_end
from .cli_options import louver_config, offload, threads
from .llama import Llama
from .models import default_model_path
from .prefill import prefill
from .prose import language_reference
from .report import certificate_lines, check_line

_TEXT_TOKENS = 7000
_ANSWER_TOKENS = 96
_ROUNDS = 2
_NEEDLE = (
    "A note from the editor: the password for the library of Alexandria is BLUE-HERON-42, "
    "and it must never be shared with sailors."
)
_QUESTION = (
    "What is the password for the library of Alexandria? "
    "Answer first, then explain why it should be kept secret."
)


@dataclass
class _Contender:
    """One way to attend, what it generated, and how long its decode steps took."""

    name: str
    enabled: bool
    tokens: list[int] = field(default_factory=list)
    n_steps: int = 0
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens a second; NaN if the answer ended at once."""
        return self.n_steps / self.seconds if self.n_steps else math.nan


def demo(options: argparse.Namespace) -> int:
    """Carry out the command; returns its exit status."""
    console = Console(highlight=False)
    path = options.model or default_model_path()
    config = louver_config(options)
    n_threads, n_threads_batch = threads(options)
    llm = Llama(
        path,
        louver=config,
        n_ctx=8192,
        n_threads=n_threads,
        n_threads_batch=n_threads_batch,
        **offload(options).settings,
        verbose=False,
    )
    try:
        tokens = chat_tokens(llm, [{"role": "user", "content": f"{_long_text(llm)}\n\n{_QUESTION}"}])
        console.print(
            f"[bold]{Path(path).name}[/] reads {len(tokens):,} tokens of Python's language reference, "
            f"and in their middle:\n[italic]{_NEEDLE}[/]\nThe question behind them:\n[italic]{_QUESTION}[/]\n"
        )
        n_tokens, seconds = prefill(llm, tokens, Console(stderr=True))
        console.print(
            f"prefill (by stock): {n_tokens:,} tokens in {seconds:.1f} s, {n_tokens / seconds:.0f} tokens/s"
        )

        stock, louver = _Contender("stock llama.cpp", False), _Contender("Louver", True)
        for contender in (stock, louver) * _ROUNDS:
            llm.louver = replace(config, enabled=contender.enabled)
            llm.reset_louver_stats()
            _generate(llm, tokens, contender)
        stats = llm.louver_stats()
        console.print(_table(stock, louver))
        for contender in (stock, louver):
            answer = llm.detokenize(contender.tokens).decode(errors="replace").strip()
            console.print(Panel(Text(answer), title=contender.name, title_align="left"))
        console.print(*certificate_lines(stats, config), sep="\n")

        llm.louver = replace(config, check=True)
        llm.reset_louver_stats()
        n_same = _follow(llm, tokens, stock.tokens)
        console.print(
            f"Once more with Louver, along stock's text: {n_same} of {len(stock.tokens)} next tokens are "
            f"the same.\n{check_line(llm.louver_stats())}"
        )
    finally:
        llm.close()
    return 0


def _long_text(llm: Llama) -> str:
    """Paragraphs of real English, with the needle in the middle of them."""
    paragraphs: list[str] = []
    room = _TEXT_TOKENS
    for paragraph in language_reference().split("\n\n"):
        room -= len(llm.tokenize(f"{paragraph}\n\n".encode(), add_bos=False))
        if room < 0:
            break
        paragraphs.append(paragraph)
    paragraphs.insert(len(paragraphs) // 2, _NEEDLE)
    return "\n\n".join(paragraphs)


def _generate(llm: Llama, tokens: list[int], contender: _Contender) -> None:
    """Generate greedily behind ``tokens``, which the cache holds; what it holds behind them is dropped."""
    generated, times = [], []
    for token in itertools.islice(llm.generate(tokens, temp=0.0), _ANSWER_TOKENS):
        times.append(time.perf_counter())
        if is_end(llm, token):
            break
        generated.append(token)
    contender.tokens = generated
    contender.n_steps += len(times) - 1
    contender.seconds += times[-1] - times[0]


def _follow(llm: Llama, tokens: list[int], answer: list[int]) -> int:
    """Of how many tokens of ``answer`` the model says the same, if all before them are given."""
    llm.n_tokens = len(tokens) - 1
    n_same = 0
    for given, expected in zip([tokens[-1], *answer], answer, strict=False):
        llm.eval([given])
        n_same += llm.sample(temp=0.0) == expected
    return n_same


def _table(stock: _Contender, louver: _Contender) -> Table:
    n_same = Llama.longest_token_prefix(stock.tokens, louver.tokens)
    n_tokens = max(len(stock.tokens), len(louver.tokens))
    table = Table("attention", "decode, tokens/s", "ratio", "same tokens before the first difference")
    table.add_row(stock.name, f"{stock.speed:.1f}", "1.00", "")
    table.add_row(
        louver.name,
        f"{louver.speed:.1f}",
        f"[bold]{louver.speed / stock.speed:.2f}[/]",
        f"{n_same} of {n_tokens} ({n_same / max(n_tokens, 1):.0%})",
    )
    return table
