"""The options of ``louver-llama``. They carry llama.cpp's names wherever llama.cpp has the option."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from .config import LouverConfig

CACHE_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "bf16": 30}  # ggml_type
ROPE_SCALINGS = {"none": 0, "linear": 1, "yarn": 2}  # llama_rope_scaling_type


def louver_config(options: argparse.Namespace) -> LouverConfig:
    """The settings that the command line gives."""
    given = {name: value for name, value in vars(options).items() if name in _SETTINGS}
    return LouverConfig(**given)


def threads(options: argparse.Namespace) -> tuple[int, int]:
    """What -t and -tb say; without them every processor that this process may use."""
    n_threads = options.threads if options.threads > 0 else len(os.sched_getaffinity(0))
    return n_threads, options.threads_batch if options.threads_batch > 0 else n_threads


def add_info_options(info: argparse.ArgumentParser) -> None:
    """Give ``info`` its options."""
    info.add_argument("-m", "--model", metavar="FNAME", help="GGUF file to try: two decode steps are run")
    info.add_argument("--json", action="store_true", help="print JSON")


def add_demo_options(demo: argparse.ArgumentParser) -> None:
    """Give ``demo`` its options."""
    demo.add_argument("-m", "--model", metavar="FNAME", help="GGUF file (default: SmolLM2-135M-Instruct)")
    _add_threads(demo)
    _add_louver(demo)


def add_run_options(run: argparse.ArgumentParser) -> None:
    """Give ``run`` its options."""
    _add_prompt(run)
    _add_context(run)
    _add_sampling(run)
    _add_rope(run)
    _add_louver(run)
    run.add_argument("--no-louver", dest="enabled", action="store_false", help="stock attention only")
    run.add_argument(
        "--check", action="store_true", help="brute force beside every step, for the stats; slow"
    )
    run.add_argument("--stats", metavar="FNAME", help="write louver_stats() to this file, as JSON")


def _add_prompt(run: argparse.ArgumentParser) -> None:
    switch = argparse.BooleanOptionalAction
    run.add_argument("-p", "--prompt", metavar="PROMPT", help="text to go on from")
    run.add_argument("-f", "--file", metavar="FNAME", help="file with such a text; -p comes after it")
    run.add_argument("-e", "--escape", action=switch, default=True, help=r"read \n, \t, ... in -p and -sys")
    run.add_argument("--display-prompt", action=switch, default=True, help="print the prompt too")
    run.add_argument(
        "-cnv", "--conversation", action="store_true", help="chat; further turns come from stdin"
    )
    run.add_argument("-sys", "--system-prompt", metavar="PROMPT", help="system prompt of a chat")
    run.add_argument("-st", "--single-turn", action="store_true", help="end the chat after one turn")
    _value(run, "-n --predict --n-predict", int, -1, "tokens to generate, -1 to the end")


def _add_context(run: argparse.ArgumentParser) -> None:
    run.add_argument("-m", "--model", metavar="FNAME", help="GGUF file (default: SmolLM2-135M-Instruct)")
    _value(run, "-c --ctx-size", _integer(0), 0, "cells of the context, 0 for the model's own")
    _value(run, "-b --batch-size", _integer(1), 2048, "logical batch")
    _value(run, "-ub --ubatch-size", _integer(1), 512, "physical batch")
    _add_threads(run)
    _value(run, "-ngl --n-gpu-layers", int, 0, "layers on the GPU")
    for flags, what in (("-ctk --cache-type-k", "keys"), ("-ctv --cache-type-v", "values")):
        run.add_argument(
            *flags.split(), choices=CACHE_TYPES, default="f16", help=f"type of the cached {what}"
        )
    run.add_argument("--swa-full", action="store_true", help="full-size caches for sliding-window layers")
    run.add_argument("--no-mmap", action="store_true", help="read the model instead of mapping it")
    run.add_argument("--mlock", action="store_true", help="keep the model in memory")
    run.add_argument("-v", "--verbose", action="store_true", help="llama.cpp's log on stderr")


def _add_threads(parser: argparse.ArgumentParser) -> None:
    _value(parser, "-t --threads", int, -1, "threads, -1 for all processors")
    _value(parser, "-tb --threads-batch", int, -1, "threads of the prefill, -1 for as many")


def _add_sampling(run: argparse.ArgumentParser) -> None:
    group = run.add_argument_group("sampling")
    _value(group, "-s --seed", int, -1, "seed, -1 for a random one")
    _value(group, "--temp --temperature", _number(0), 0.8, "temperature, 0 is greedy")
    _value(group, "--top-k", int, 40, "0 for all")
    _value(group, "--top-p", _number(0), 0.95, "1 for all")
    _value(group, "--min-p", _number(0), 0.05, "0 for all")
    _value(group, "--repeat-penalty", _number(0.01), 1.0, "1 for none")
    _value(group, "--presence-penalty", _number(), 0.0, "0 for none")
    _value(group, "--frequency-penalty", _number(), 0.0, "0 for none")
    group.add_argument("--ignore-eos", action="store_true", help="go on where the model would end")
    grammar = run.add_mutually_exclusive_group()
    grammar.add_argument("--grammar", metavar="GRAMMAR", help="GBNF grammar that the text has to follow")
    grammar.add_argument("--grammar-file", metavar="FNAME", help="file with such a grammar")


def _add_rope(run: argparse.ArgumentParser) -> None:
    group = run.add_argument_group("RoPE")
    group.add_argument("--rope-scaling", choices=ROPE_SCALINGS, help="(default: the model's)")
    _value(group, "--rope-scale", _number(0), 0.0, "extends the context by this factor, 0 for the model's")
    _value(group, "--rope-freq-base", _number(0), 0.0, "base frequency, 0 for the model's")
    _value(group, "--rope-freq-scale", _number(0), 0.0, "1 / rope scale, 0 for the model's")
    _value(group, "--yarn-orig-ctx", _integer(0), 0, "training context, 0 for the model's")
    _value(group, "--yarn-ext-factor", _number(), -1.0, "extrapolation, -1 for the model's")
    _value(group, "--yarn-attn-factor", _number(), 1.0, "magnitude of attention")
    _value(group, "--yarn-beta-slow", _number(), 1.0, "high correction dim")
    _value(group, "--yarn-beta-fast", _number(), 32.0, "low correction dim")


def _add_louver(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Louver")
    default = LouverConfig()
    _value(group, "--epsilon", float, default.epsilon, "bound on the softmax mass dropped; 0 is dense")
    _value(group, "--min-context", int, default.min_context, "cells below which stock attends")
    _value(group, "--sinks", int, default.sinks, "first cells, always attended")
    _value(group, "--recent", int, default.recent, "newest cells, always attended")
    guarantees = ("certified", "estimated")
    group.add_argument("--guarantee", choices=guarantees, default=default.guarantee, help="of epsilon")
    text = "let no block's mean value stand in for its dropped keys"
    group.add_argument("--no-compensate", dest="compensate", action="store_false", help=text)


def _value(parser: Any, flags: str, kind: Callable[[str], object], default: object, text: str) -> None:
    help_text = f"{text} (default: %(default)s)"
    parser.add_argument(*flags.split(), metavar="N", type=kind, default=default, help=help_text)


def _integer(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        value = int(text)
        if not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"must be an integer from {least}, not {text}")
        return value

    return integer


def _number(least: float = -math.inf) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = float(text)
        if not (math.isfinite(value) and value >= least):
            raise argparse.ArgumentTypeError(f"must be a number from {least}, not {text}")
        return value

    return number


_SETTINGS = {field.name for field in fields(LouverConfig)}
