"""The options of ``louver-llama``. They carry llama.cpp's names wherever llama.cpp has the option."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

from .config import LouverConfig

CACHE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}  # ggml_type
SPLIT_MODES = {"none": 0, "layer": 1, "row": 2}  # llama_split_mode
ROPE_SCALINGS = {"none": 0, "linear": 1, "yarn": 2}  # llama_rope_scaling_type
CONTENDERS = ("stock", "dense", "louver")  # of the benchmark, in the order in which they take turns


def louver_config(options: argparse.Namespace) -> LouverConfig:
    """The settings that the command line gives."""
    given = {name: value for name, value in vars(options).items() if name in _SETTINGS}
    return LouverConfig(**given)


def threads(options: argparse.Namespace) -> tuple[int, int]:
    """What -t and -tb say; without them every processor that this process may use."""
    n_threads = options.threads if options.threads > 0 else len(os.sched_getaffinity(0))
    return n_threads, options.threads_batch if options.threads_batch > 0 else n_threads


@dataclass(frozen=True)
class Offload:
    """What goes to which GPU."""

    n_gpu_layers: int
    split_mode: str
    main_gpu: int
    tensor_split: list[float] | None

    @property
    def settings(self) -> dict[str, Any]:
        """The same as arguments of ``Llama``."""
        return {**vars(self), "split_mode": SPLIT_MODES[self.split_mode]}


def offload(options: argparse.Namespace) -> Offload:
    """What the options of GPUs say."""
    return Offload(options.n_gpu_layers, options.split_mode, options.main_gpu, options.tensor_split)


def rope_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What the RoPE options say, as arguments of ``Llama``."""
    return {
        "rope_scaling_type": ROPE_SCALINGS.get(options.rope_scaling, -1),
        "rope_freq_base": options.rope_freq_base,
        "rope_freq_scale": 1 / options.rope_scale if options.rope_scale else options.rope_freq_scale,
        "yarn_orig_ctx": options.yarn_orig_ctx,
        "yarn_ext_factor": options.yarn_ext_factor,
        "yarn_attn_factor": options.yarn_attn_factor,
        "yarn_beta_slow": options.yarn_beta_slow,
        "yarn_beta_fast": options.yarn_beta_fast,
    }


def add_info_options(info: argparse.ArgumentParser) -> None:
    """Give ``info`` its options."""
    info.add_argument("-m", "--model", metavar="FNAME", help="GGUF file to try: two decode steps are run")
    _add_offload(info)
    info.add_argument("--json", action="store_true", help="print JSON")


def add_demo_options(demo: argparse.ArgumentParser) -> None:
    """Give ``demo`` its options."""
    demo.add_argument("-m", "--model", metavar="FNAME", help="GGUF file (default: SmolLM2-135M-Instruct)")
    _add_threads(demo)
    _add_offload(demo)
    _add_louver(demo)


def add_run_options(run: argparse.ArgumentParser) -> None:
    """Give ``run`` its options."""
    _add_prompt(run)
    _add_context(run)
    _add_sampling(run)
    _add_offload(run)
    add_rope(run)
    _add_louver(run)
    run.add_argument("--no-louver", dest="enabled", action="store_false", help="stock attention only")
    run.add_argument(
        "--check", action="store_true", help="brute force beside every step, for the stats; slow"
    )
    run.add_argument("--stats", metavar="FNAME", help="write louver_stats() to this file, as JSON")


def add_bench_options(bench: argparse.ArgumentParser) -> None:
    """Give ``bench`` its options; N,... is a comma list, and every combination is measured."""
    _values(bench, "-m --model", str, None, "GGUF files (default: SmolLM2-135M-Instruct)", "FNAME,...")
    _values(bench, "-d --n-depth", _integer(0), [0, 2048, 8192], "tokens in the cache before a test")
    _values(bench, "-n --n-gen", _integer(0), [32], "tokens to decode, 0 for no such test")
    _values(bench, "-p --n-prompt", _integer(0), [0], "tokens to read in one batch, 0 for no such test")
    _values(bench, "-t --threads", _integer(1), None, "threads (default: all processors)")
    text = "types of the cached keys (default: f16)"
    _values(bench, "-ctk --cache-type-k", _one_of(CACHE_TYPES), ["f16"], text, "TYPE,...")
    text = "types of the cached values (default: each that of the keys)"
    _values(bench, "-ctv --cache-type-v", _one_of(CACHE_TYPES), None, text, "TYPE,...")
    _value(bench, "-r --repetitions", _integer(1), 3, "samples of each test and contender, taken in turn")
    _value(bench, "-b --batch-size", _integer(1), 2048, "logical batch")
    _value(bench, "-ub --ubatch-size", _integer(1), 512, "physical batch")
    bench.add_argument("--swa-full", action="store_true", help="full-size caches for sliding-window layers")
    text = "what is measured in turn (default: stock,dense,louver; louver once per epsilon)"
    _values(bench, "--contenders", _one_of(CONTENDERS), list(CONTENDERS), text, "NAME,...")
    bench.add_argument(
        "--quality",
        metavar="STEPS",
        type=_integer(1),
        nargs="?",
        const=64,
        help="also compare next-token distributions with those of stock on an F16 cache (STEPS: 64)",
    )
    bench.add_argument("--text", metavar="FNAME", help="text to read (default: Python's language reference)")
    bench.add_argument("--state-dir", metavar="DIR", help="keep filled caches here for the next run")
    formats = ("md", "csv", "json", "jsonl")
    bench.add_argument("-o", "--output", choices=formats, default="md", help="format (default: md)")
    bench.add_argument("--plot", metavar="FNAME.png", help="draw time per token against depth")
    bench.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="progress on stderr (default: where that is a terminal)",
    )
    _add_offload(bench)
    add_rope(bench)
    _add_louver(bench, epsilons=True)


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


def _add_offload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("GPU")
    _value(
        group, "-ngl --n-gpu-layers --gpu-layers", _layers, 0, "layers on the GPU, -1 or all for all of them"
    )
    text = "how several GPUs share the model (default: %(default)s)"
    group.add_argument("-sm", "--split-mode", choices=SPLIT_MODES, default="layer", help=text)
    text = "the GPUs' shares of it (default: by their free memory)"
    group.add_argument("-ts", "--tensor-split", metavar="N,...", type=_shares, help=text)
    _value(group, "-mg --main-gpu", _integer(0), 0, "the GPU of -sm none, and of the rest in -sm row")


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


def add_rope(run: argparse.ArgumentParser) -> None:
    """Give ``run`` the options of RoPE."""
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


def _add_louver(parser: argparse.ArgumentParser, *, epsilons: bool = False) -> None:
    group = parser.add_argument_group("Louver")
    default = LouverConfig()
    text = "bound on the softmax mass dropped; 0 is dense"
    if epsilons:
        _values(group, "--epsilon", float, [default.epsilon], text)
    else:
        _value(group, "--epsilon", float, default.epsilon, text)
    _value(group, "--min-context", int, default.min_context, "cells below which all are attended")
    text = "the same on a GPU, by stock's kernel"
    _value(group, "--min-context-gpu", int, default.min_context_gpu, text)
    _value(group, "--sinks", int, default.sinks, "first cells, always attended")
    _value(group, "--recent", int, default.recent, "newest cells, always attended")
    guarantees = ("certified", "estimated")
    group.add_argument("--guarantee", choices=guarantees, default=default.guarantee, help="of epsilon")
    text = "let no block's mean value stand in for its dropped keys"
    group.add_argument("--no-compensate", dest="compensate", action="store_false", help=text)


def _value(parser: Any, flags: str, kind: Callable[[str], object], default: object, text: str) -> None:
    help_text = f"{text} (default: %(default)s)"
    parser.add_argument(*flags.split(), metavar="N", type=kind, default=default, help=help_text)


def _values(
    parser: Any,
    flags: str,
    kind: Callable[[str], Any],
    default: list[Any] | None,
    text: str,
    metavar: str = "N,...",
) -> None:
    if "(default" not in text:
        text = f"{text} (default: {','.join(map(str, default or []))})"
    parser.add_argument(*flags.split(), metavar=metavar, type=_list(kind), default=default, help=text)


def _list(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    def values(text: str) -> list[Any]:
        try:
            return list(dict.fromkeys(kind(item) for item in text.split(",")))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be numbers with commas between, not {text!r}") from None

    return values


def _layers(text: str) -> int:
    try:
        value = -1 if text == "all" else int(text)
    except ValueError:
        value = -2
    if not -1 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"must be a number of layers, -1 or all, not {text!r}")
    return value


def _shares(text: str) -> list[float]:
    try:
        shares = [_number(0)(share) for share in re.split("[,/]", text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, not {text!r}") from None
    if not any(shares):
        raise argparse.ArgumentTypeError(f"must give one GPU at least a share above 0, not {text!r}")
    return shares


def _one_of(names: Iterable[str]) -> Callable[[str], str]:
    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(names)}, not {text!r}")
        return text

    return name


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
