"""``louver-llama bench``: what is asked for, checked before anything is measured."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ._libraries import llama_cpp
from .bench_plan import Contender, Plan, Test, Text
from .bench_plot import check_plot, plot
from .bench_progress import Watch
from .bench_report import Report
from .bench_run import measure
from .cli_options import offload, rope_settings
from .config import LouverConfig
from .machine import this_machine, this_software
from .model_file import check_model_file, explained_load
from .models import default_model_path
from .prose import language_reference


def bench(options: argparse.Namespace) -> int:
    """Carry out the command; returns its exit status."""
    console = Console(stderr=True, highlight=False)
    plan = _plan(options)
    for warning in _warnings(plan, options):
        console.print(f"louver-llama: warning: {warning}", soft_wrap=True)
    report = Report(options.output, sys.stdout)
    try:
        with (
            Watch(console, options.progress, plan.n_stages) as watch,
            closing(measure(plan, watch)) as records,
        ):
            for record in records:
                report.add(record)
    finally:  # also after Ctrl-C: what is complete is worth having
        report.close()
        if options.plot is not None and report.records:
            plot(report.records, options.plot)
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    tests = [Test(n, 0) for n in options.n_prompt if n] + [Test(0, n) for n in options.n_gen if n]
    if not tests:
        raise ValueError("there is nothing to measure: -n and -p are both 0")
    decodes = any(test.n_gen for test in tests)
    for option, given in (("--quality", options.quality), ("--plot", options.plot)):
        if given is not None and not decodes:
            raise ValueError(f"{option} is about decode steps: it needs -n N")
    if options.plot is not None:
        check_plot(options.plot)
    folder = None if options.state_dir is None else Path(options.state_dir)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise ValueError(f"--state-dir {folder}: this folder cannot be written to")
    plan = Plan(
        texts=_texts(options),
        caches=_caches(options),
        depths=sorted(options.n_depth),
        n_threads=options.threads or [len(os.sched_getaffinity(0))],
        tests=tests,
        contenders=_contenders(options),
        repetitions=options.repetitions,
        quality_steps=options.quality,
        n_batch=options.batch_size,
        n_ubatch=options.ubatch_size,
        swa_full=options.swa_full,
        rope=rope_settings(options),
        offload=offload(options),
        state_folder=folder,
        machine=this_machine(),
        software=this_software(),
        command=shlex.join(["louver-llama", *options.arguments]),
    )
    for text in plan.texts:
        if plan.depths[-1] + plan.n_behind > len(text.tokens):
            raise ValueError(
                f"{text.name} has {len(text.tokens)} tokens for {Path(text.model_path).name}, fewer "
                f"than the depth of {plan.depths[-1]} and {plan.n_behind} more: take a longer --text"
            )
    return plan


def _caches(options: argparse.Namespace) -> list[tuple[str, str]]:
    if options.cache_type_v is None:
        return [(cache, cache) for cache in options.cache_type_k]
    return [(keys, values) for keys in options.cache_type_k for values in options.cache_type_v]


def _contenders(options: argparse.Namespace) -> list[Contender]:
    louver = [
        LouverConfig(
            epsilon=epsilon,
            min_context=options.min_context,
            min_context_gpu=options.min_context_gpu,
            sinks=options.sinks,
            recent=options.recent,
            guarantee=options.guarantee,
            compensate=options.compensate,
        )
        for epsilon in options.epsilon
    ]
    stock, dense = replace(louver[0], enabled=False), replace(louver[0], epsilon=0.0)
    known = {
        "stock": [Contender("stock", stock)],
        "dense": [Contender("dense", dense)],
        "louver": [Contender("louver", config) for config in louver],
    }
    return [contender for name in options.contenders for contender in known[name]]


def _texts(options: argparse.Namespace) -> list[Text]:
    if options.text is None:
        name, text = "Python's language reference", language_reference()
    else:
        name, text = options.text, Path(options.text).read_text(encoding="utf-8", errors="replace")
    paths = options.model or [default_model_path()]
    return [_tokenized(path, name, text) for path in paths]


def _tokenized(path: str, name: str, text: str) -> Text:
    """``text`` in the model's tokens, with as much of the model loaded as that needs."""
    from llama_cpp._internals import LlamaModel

    check_model_file(path)
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    with explained_load(path), closing(LlamaModel(path_model=path, params=params, verbose=False)) as model:
        tokens = model.tokenize(text.encode(), add_bos=True, special=False)
        metadata = model.metadata()
    n_ctx_train = int(metadata.get(f"{metadata['general.architecture']}.context_length", 0))
    return Text(path, name, tokens, n_ctx_train)


def _warnings(plan: Plan, options: argparse.Namespace) -> Iterator[str]:
    if any((options.rope_scaling, options.rope_scale, options.rope_freq_base, options.rope_freq_scale)):
        return
    for text in plan.texts:
        if plan.depths[-1] + plan.n_behind > text.n_ctx_train:
            yield (
                f"{Path(text.model_path).name} was trained on {text.n_ctx_train:,} tokens; behind them it is "
                "as fast, but what it says is worth little unless --rope-scaling or the like extends that"
            )
