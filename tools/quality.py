"""How far Louver's next-token distributions are from dense attention's, beside what a q8_0 cache costs.

Every contender reads the same text up to a depth, then the next tokens of it one at a time, whatever it would
have said itself (teacher forcing). At each step its distribution p is compared with the distribution r of
stock llama.cpp with an F16 cache, in the same run: KL(r || p) in nats, and whether the top token is the same.

    python tools/quality.py -d 8000 -n 256 --epsilon 0.02,0.05,0.1
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from louver_llama import Llama, LouverConfig, __version__
from louver_llama._libraries import core, llama_cpp
from louver_llama.cli_options import CACHE_TYPES, threads
from louver_llama.models import default_model_path
from louver_llama.prefill import prefill
from louver_llama.prose import language_reference

Logits = npt.NDArray[np.float32]
STOCK = LouverConfig(enabled=False)
CELLS_STEP = 256


@dataclass(frozen=True)
class Result:
    """One contender's figures; KL in nats, time in milliseconds."""

    name: str
    cache: str
    epsilon: float | None
    kl_mean: float
    kl_p95: float
    kl_max: float
    top1_agreement: float
    decode_ms_median: float
    keys_attended_share: float | None
    delta_mean: float | None


def main() -> None:
    """Run the comparison that the command line asks for."""
    options = parse()
    console = Console(stderr=True, highlight=False)
    path = options.model or default_model_path()
    text = Path(options.text).read_text(encoding="utf-8") if options.text else language_reference()
    results = list(compare(path, text, options, console))
    settings = {
        "model": Path(path).name,
        "depth": options.depth,
        "steps": options.steps,
        "threads": threads(options)[0],
        "isa": core.isa(),
        "versions": {"louver_llama": __version__, **core.PIN},
    }
    if options.json:
        json.dump({**settings, "results": [asdict(result) for result in results]}, sys.stdout, indent=2)
        print()
    else:
        Console(highlight=False).print(table(results, settings))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", metavar="FNAME", help="GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("-d", "--depth", type=int, default=8000, help="tokens before the first step")
    parser.add_argument("-n", "--steps", type=int, default=256, help="teacher-forced decode steps")
    parser.add_argument("--epsilon", default="0.05", help="comma list of epsilons for Louver")
    parser.add_argument("--text", metavar="FNAME", help="text to read (default: Python's language reference)")
    parser.add_argument("-t", "--threads", type=int, default=-1)
    parser.add_argument("-tb", "--threads-batch", type=int, default=-1)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser.parse_args()


def compare(path: str, text: str, options: argparse.Namespace, console: Console) -> Iterator[Result]:
    """Stock with an F16 cache first, the measure of all others."""
    epsilons = [float(epsilon) for epsilon in options.epsilon.split(",")]
    f16 = [("stock", STOCK), ("ours, dense", LouverConfig(epsilon=0.0))]
    f16 += [(f"Louver {epsilon:g}", LouverConfig(epsilon=epsilon)) for epsilon in epsilons]
    reference = None
    for cache, contenders in (("f16", f16), ("q8_0", [("stock", STOCK)])):
        llm = load(path, cache, options)
        tokens = llm.tokenize(text.encode())[: options.depth + options.steps]
        if len(tokens) < options.depth + options.steps:
            sys.exit(f"quality.py: the text has {len(tokens)} tokens, fewer than depth and steps together")
        prefill(llm, tokens[: options.depth], console)
        for name, config in contenders:
            llm.louver = config
            llm.reset_louver_stats()
            label = f"{name}, {cache}"
            logits, seconds = decode(llm, tokens, options.depth, label, console)
            reference = logits if reference is None else reference
            stats = llm.louver_stats()
            kl = divergences(reference, logits)
            yield Result(
                name=name,
                cache=cache,
                epsilon=config.epsilon if config.enabled else None,
                kl_mean=float(kl.mean()),
                kl_p95=float(np.quantile(kl, 0.95)),
                kl_max=float(kl.max()),
                top1_agreement=float((reference.argmax(1) == logits.argmax(1)).mean()),
                decode_ms_median=float(np.median(seconds)) * 1e3,
                keys_attended_share=stats["keys_attended"] / stats["keys_visible"]
                if stats["n_queries"]
                else None,
                delta_mean=stats["delta_mean"] if stats["n_queries"] else None,
            )
        llm.close()


def load(path: str, cache: str, options: argparse.Namespace) -> Llama:
    """A context with room for all, rounded up to llama.cpp's step, and with caches of type ``cache``."""
    n_threads, n_threads_batch = threads(options)
    return Llama(
        path,
        n_ctx=-(-(options.depth + options.steps) // CELLS_STEP) * CELLS_STEP,
        n_threads=n_threads,
        n_threads_batch=n_threads_batch,
        type_k=CACHE_TYPES[cache],
        type_v=CACHE_TYPES[cache],
        verbose=False,
    )


def decode(
    llm: Llama, tokens: Sequence[int], depth: int, label: str, console: Console
) -> tuple[Logits, list[float]]:
    """The logits after each of ``tokens[depth:]``, (steps, n_vocab), and the seconds of each step."""
    llm.n_tokens = depth  # eval() removes what lies behind
    logits = np.empty((len(tokens) - depth, llm.n_vocab()), np.float32)
    seconds = []
    steps = track(tokens[depth:], label, console=console, transient=True, disable=not console.is_terminal)
    for row, token in zip(logits, steps, strict=True):
        start = time.perf_counter()
        llm.eval([token])
        found = llama_cpp.llama_get_logits(llm.ctx)
        seconds.append(time.perf_counter() - start)
        row[:] = np.ctypeslib.as_array(found, shape=row.shape)
    return logits, seconds


def divergences(reference: Logits, logits: Logits) -> npt.NDArray[np.float64]:
    """KL(reference || logits) of each row, in nats."""
    rows = [
        np.exp(r) @ (r - p)
        for r, p in ((log_softmax(a), log_softmax(b)) for a, b in zip(reference, logits, strict=True))
    ]
    return np.array(rows)


def log_softmax(row: Logits) -> npt.NDArray[np.float64]:
    """In float64, because the divergences are small differences."""
    shifted = row.astype(np.float64) - row.max()
    return shifted - np.log(np.exp(shifted).sum())


def table(results: Sequence[Result], settings: dict[str, object]) -> Table:
    """The figures for a person."""
    rows = Table(
        Column("attention", no_wrap=True),
        *("cache", "mean KL", "95 % KL", "top-1", "decode, ms", "keys"),
        title=f"{settings['model']}, {settings['steps']} steps behind {settings['depth']} tokens, "
        f"{settings['threads']} threads, {settings['isa']}",
    )
    for result in results:
        share = result.keys_attended_share
        rows.add_row(
            result.name,
            result.cache,
            f"{result.kl_mean:.5f}",
            f"{result.kl_p95:.5f}",
            f"{result.top1_agreement:.1%}",
            f"{result.decode_ms_median:.2f}",
            "" if share is None else f"{share:.1%}",
        )
    return rows


if __name__ == "__main__":
    main()
