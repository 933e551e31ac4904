"""``louver-llama run``: text from a prompt, or a conversation."""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ._libraries import llama_cpp
from .chat import chat_tokens, is_end
from .cli_options import CACHE_TYPES, louver_config, offload, rope_settings, threads
from .llama import Llama
from .models import default_model_path
from .prefill import prefill
from .report import certificate_lines

_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\'": "'", r"\"": '"', r"\\": "\\"}


def run(options: argparse.Namespace) -> int:
    """Carry out the command; returns its exit status."""
    console = Console(stderr=True, highlight=False)
    prompt = _prompt(options)
    conversation = options.conversation or options.system_prompt is not None
    if prompt is None and not conversation:
        raise ValueError("there is no prompt: give -p PROMPT or -f FNAME, or -cnv for a conversation")
    sampling = _sampling(options)
    if options.stats is not None:
        Path(options.stats).touch()  # what cannot be written shall not come to light after a long run
    llm = _load(options, console)
    try:
        session = _Session(llm, options, sampling, console)
        if conversation:
            _converse(session, options, prompt)
        else:
            _complete(session, options, prompt or "")
        session.report()
        if options.stats is not None:
            Path(options.stats).write_text(json.dumps(llm.louver_stats(), indent=2) + "\n")
    finally:
        llm.close()
    return 0


@dataclass
class _Session:
    """Puts the model's answers on stdout as they come, and keeps the time."""

    llm: Llama
    options: argparse.Namespace
    sampling: dict[str, Any]
    console: Console
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def answer(self, tokens: list[int], heading: str = "") -> bytes:
        """Write ``heading`` and what the model says after ``tokens``; returns the latter."""
        n_tokens, seconds = prefill(self.llm, tokens, self.console)
        write(heading.encode())
        self.prefill_tokens += n_tokens
        self.prefill_seconds += seconds
        room = self.llm.n_ctx() - len(tokens)
        limit = room if self.options.predict < 0 else min(room, self.options.predict)
        text = b""
        start = None
        for token in itertools.islice(self.llm.generate(tokens, **self.sampling), limit):
            # The first token comes out of the prefill; a decode step lies before each of the others.
            if start is None:
                start = time.perf_counter()
            else:
                self.decode_tokens += 1
            if is_end(self.llm, token) and not self.options.ignore_eos:
                break
            piece = self.llm.detokenize([token])
            write(piece)
            text += piece
        if start is not None:
            self.decode_seconds += time.perf_counter() - start
        write(b"\n")
        return text

    def report(self) -> None:
        """Tell speed, paths and certificate on stderr."""
        speeds = [
            f"{name} {n_tokens:,} tokens, {n_tokens / seconds:.1f} tokens/s"
            for name, n_tokens, seconds in (
                ("prefill", self.prefill_tokens, self.prefill_seconds),
                ("decode", self.decode_tokens, self.decode_seconds),
            )
            if n_tokens
        ]
        for line in ("; ".join(speeds), *certificate_lines(self.llm.louver_stats(), self.llm.louver)):
            self.console.print(line, soft_wrap=True, style="dim")


def write(text: bytes) -> None:
    """Put ``text`` on stdout at once. Bytes, because a token may hold a part of a character."""
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()


def _complete(session: _Session, options: argparse.Namespace, prompt: str) -> None:
    tokens = session.llm.tokenize(prompt.encode(), special=True)
    if not tokens:
        raise ValueError("the prompt is empty")
    session.answer(tokens, prompt if options.display_prompt else "")


def _converse(session: _Session, options: argparse.Namespace, prompt: str | None) -> None:
    messages = []
    if options.system_prompt is not None:
        messages.append({"role": "system", "content": _unescaped(options.system_prompt, options)})
    while (turn := prompt if prompt is not None else _next_turn()) is not None:
        prompt = None
        messages.append({"role": "user", "content": turn})
        answer = session.answer(chat_tokens(session.llm, messages))
        messages.append({"role": "assistant", "content": answer.decode(errors="replace")})
        if options.single_turn:
            break


def _next_turn() -> str | None:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def _prompt(options: argparse.Namespace) -> str | None:
    parts = []
    if options.file is not None:
        # As in llama.cpp, one line break at the end belongs to the file, not to the prompt.
        parts.append(Path(options.file).read_text(encoding="utf-8", errors="replace").removesuffix("\n"))
    if options.prompt is not None:
        parts.append(_unescaped(options.prompt, options))
    return "\n\n".join(parts) if parts else None


def _unescaped(text: str, options: argparse.Namespace) -> str:
    if not options.escape:
        return text
    return re.sub(r"\\[nrt'\"\\]", lambda escape: _ESCAPES[escape[0]], text)


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    from llama_cpp.llama_grammar import LlamaGrammar

    grammar = (
        Path(options.grammar_file).read_text(encoding="utf-8") if options.grammar_file else options.grammar
    )
    return {
        "temp": options.temp,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "repeat_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "grammar": LlamaGrammar.from_string(grammar) if grammar else None,
    }


def _load(options: argparse.Namespace, console: Console) -> Llama:
    path = options.model
    if path is None:
        path = default_model_path()
        console.print(f"no -m given: using the default model {Path(path).name}", style="dim")
    n_threads, n_threads_batch = threads(options)
    return Llama(
        path,
        louver=louver_config(options),
        n_ctx=options.ctx_size,
        n_batch=options.batch_size,
        n_ubatch=options.ubatch_size,
        n_threads=n_threads,
        n_threads_batch=n_threads_batch,
        type_k=CACHE_TYPES[options.cache_type_k],
        type_v=CACHE_TYPES[options.cache_type_v],
        swa_full=options.swa_full,
        use_mmap=not options.no_mmap,
        use_mlock=options.mlock,
        seed=options.seed if options.seed >= 0 else llama_cpp.LLAMA_DEFAULT_SEED,
        **offload(options).settings,
        **rope_settings(options),
        verbose=options.verbose,
    )
