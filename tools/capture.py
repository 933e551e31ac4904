"""Captures what attention reads in decode steps of any GGUF model, for work outside of the model.

    python tools/capture.py -m model.gguf -d 8192 -n 16 -o capture.npz

The cache is filled to the depth, then the next tokens of the text are decoded one at a time. The file is
numpy's, uncompressed; numpy.load reads one array at a time. {i} counts the layers that attend, from 0:

    meta          JSON: model, depth, text, cache types, RoPE, versions
    positions     (n_step,) int64, of the tokens that were decoded
    layers        (n_layer,) int64, the number in the model of the layer whose cache is read
    scale         (n_layer,) float32, of q.k
    reason        (n_layer,) str, why Louver does not serve the layer, or none
    type_k        (n_layer,) str, ggml's name of the type in the cache; type_v the same
    queries.{i}   (n_step, n_head, key_dim) float32, after RoPE, as the attention op receives them
    visible.{i}   (n_step, n_cell) bool, the cells that each step may attend to
    k.{i}, v.{i}  (n_cell, n_head_kv, key_dim or value_dim) float16 or float32, as stored, as the last step
                  sees them; for other types (n_cell, n_head_kv, bytes of a head's row) uint8

In a cache that nothing else was in, cell i holds position i, except in the small caches of sliding windows.
capture_file.py beside this reads the file, and decodes and converts all types.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from capture_file import Layer, as_kept, save
from louver_llama import Llama, LouverConfig
from louver_llama.cli_options import CACHE_TYPES, add_rope, rope_settings, threads
from louver_llama.machine import this_software
from louver_llama.models import default_model_path
from louver_llama.prefill import prefill
from louver_llama.prose import language_reference

CELLS_STEP = 256


def main() -> None:
    """Capture what the command line asks for."""
    options = command_line().parse_args()
    console = Console(stderr=True, highlight=False)
    try:
        capture(options, console)
    except (OSError, ValueError) as error:
        sys.exit(f"capture.py: {error}")


def command_line() -> argparse.ArgumentParser:
    """The options; they carry llama.cpp's names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", metavar="FNAME", help="GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FNAME", help="the .npz file")
    parser.add_argument(
        "-d", "--n-depth", type=int, default=8192, metavar="N", help="tokens before the steps"
    )
    parser.add_argument("-n", "--steps", type=int, default=16, metavar="N", help="decode steps (default: 16)")
    parser.add_argument("--text", metavar="FNAME", help="text to read (default: Python's language reference)")
    parser.add_argument("-t", "--threads", type=int, default=-1, metavar="N")
    parser.add_argument("-tb", "--threads-batch", type=int, default=-1, metavar="N")
    for flags, what in (("-ctk --cache-type-k", "keys"), ("-ctv --cache-type-v", "values")):
        parser.add_argument(*flags.split(), choices=CACHE_TYPES, default="f16", help=f"type of the {what}")
    parser.add_argument("--swa-full", action="store_true", help="full-size caches for sliding-window layers")
    add_rope(parser)
    return parser


def capture(options: argparse.Namespace, console: Console) -> None:
    """Fill the cache, decode, write the file."""
    if options.n_depth < 1 or options.steps < 1:
        raise ValueError("depth and steps are at least 1")
    options.output.touch()  # what cannot be written shall not come to light after a long run
    path = options.model or default_model_path()
    text = Path(options.text).read_text(encoding="utf-8") if options.text else language_reference()
    n_tokens = options.n_depth + options.steps
    n_threads, n_threads_batch = threads(options)
    llm = Llama(
        path,
        louver=LouverConfig(enabled=False),
        n_ctx=-(-n_tokens // CELLS_STEP) * CELLS_STEP,
        n_threads=n_threads,
        n_threads_batch=n_threads_batch,
        type_k=CACHE_TYPES[options.cache_type_k],
        type_v=CACHE_TYPES[options.cache_type_v],
        swa_full=options.swa_full,
        **rope_settings(options),
        verbose=False,
    )
    try:
        tokens = llm.tokenize(text.encode())[:n_tokens]
        if len(tokens) < n_tokens:
            raise ValueError(f"the text has {len(tokens)} tokens, and depth and steps need {n_tokens}")
        prefill(llm, tokens[: options.n_depth], console)
        layers = decode(llm, tokens[options.n_depth :], console)
    finally:
        llm.close()
    meta = {
        "model": Path(path).name,
        "depth": options.n_depth,
        "text": Path(options.text).name if options.text else "language reference",
        "type_k": options.cache_type_k,
        "type_v": options.cache_type_v,
        "rope": {name: value for name, value in vars(options).items() if name.startswith(("rope", "yarn"))},
        "software": str(this_software()),
    }
    save(options.output, meta, range(options.n_depth, n_tokens), layers)


def decode(llm: Llama, tokens: Sequence[int], console: Console) -> list[Layer]:
    """Decode ``tokens`` one at a time, and give what attention read; the cache as the last step sees it."""
    runtime = llm._runtime
    try:
        for i in track(
            range(len(tokens)), "steps", console=console, transient=True, disable=not console.is_terminal
        ):
            runtime.capture(queries=True, cache=i == len(tokens) - 1)
            llm.eval(tokens[i : i + 1])
    finally:
        runtime.capture(queries=False)
    layers = [layer_of(captured) for captured in runtime.captured()]
    if not layers:
        raise ValueError("no attention op was seen: the model attends without flash attention, or not at all")
    return layers


def layer_of(captured: dict[str, Any]) -> Layer:
    """Without the cells behind the last visible one."""
    visible = captured["visible"].astype(bool)
    n_cell = int(np.flatnonzero(visible.any(0))[-1]) + 1
    return Layer(
        number=captured["layer"],
        scale=captured["scale"],
        reason=captured["reason"],
        type_k=captured["type_k"],
        type_v=captured["type_v"],
        queries=captured["queries"],
        visible=visible[:, :n_cell],
        k=as_kept(captured["k"][:n_cell], captured["type_k"]),
        v=as_kept(captured["v"][:n_cell], captured["type_v"]),
    )


if __name__ == "__main__":
    main()
