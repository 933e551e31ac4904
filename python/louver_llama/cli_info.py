"""``louver-llama info``: what is installed, what this machine has, what Louver would do with a model."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from . import __version__
from ._libraries import LIBRARY_FOLDER, core, llama_cpp
from .cli_options import Offload, offload
from .config import LouverConfig
from .gpus import gpus
from .llama import Llama

SERVED = (
    "decode steps of up to 16 tokens, of one or several sequences, with flash attention",
    "caches of type f16, bf16, f32, q8_0 and q4_0; any head dim; any number of query heads per KV head",
)
LEFT_TO_STOCK = {
    "prefill": "batches of more than 16 tokens: stock's tiled kernel is made for them",
    "disabled": "LouverConfig(enabled=False), on the command line --no-louver",
    "sliding_window": "caches that hold a window only, which is short",
    "alibi": "the mask holds slopes, which the bounds do not cover",
    "soft_cap": "capped logits, which the bounds do not cover",
    "sinks": "learned attention sinks, which the certificate does not cover",
    "mla": "values that are a view of the keys",
    "n_kv_max": "models that bring their own sparse selection",
    "mask_values": "a mask of other values than 0 and -inf",
    "cache_type": "any other type of cache",
    "layout": "tensors that do not lie as llama.cpp's KV cache does",
    "work_buffer": "a work buffer too small for the scan",
    "not_finite": "a NaN, an infinity or an overflow among queries, keys, values or scores",
}

SERVED_ON_A_GPU = (
    "decode steps of up to 4 tokens per stream of the cache, from min_context_gpu cells in use on, with flash attention",
    "caches of type f16, bf16, f32 and q8_0, keys and values of the same; head dims of 8, 16, ... 256",
)
LEFT_TO_STOCK_ON_A_GPU = {
    **{
        reason: LEFT_TO_STOCK[reason]
        for reason in ("disabled", "sliding_window", "alibi", "soft_cap", "sinks", "mla", "n_kv_max")
    },
    "prefill": "batches of more than 4 tokens per stream of the cache, or of more than 64 in all",
    "below_min_context": "fewer cells in use than LouverConfig.min_context_gpu, on the command line --min-context-gpu",
    "cache_type": "any other type of cache",
    "head_dim": "any other head dim",
    "layout": "tensors that do not lie as llama.cpp's KV cache does on the GPU that attends",
    "device": "a GPU of a compute capability below 8.0, or without the shared memory for as many sequences and cells",
    "device_memory": "the index does not fit into what is left of the GPU's memory",
    "host_cache": "the cache is in host memory (offload_kqv=False), and llama.cpp copies it to the GPU for stock",
}


def info(options: argparse.Namespace) -> int:
    """Carry out the command; returns its exit status."""
    found: dict[str, Any] = {
        "louver_llama": __version__,
        "llama_cpp_python": llama_cpp.__version__,
        "pin": core.PIN,
        "loaded": core.loaded_libraries(),
        "library_folder": str(LIBRARY_FOLDER),
        "isa": {
            "in_use": core.isa(),
            "available": core.available_isas(),
            "LOUVER_ISA": os.environ.get("LOUVER_ISA"),
        },
        "cuda": _cuda(),
    }
    if options.model is None:
        found["louver_serves"] = SERVED
        found["stock_serves"] = LEFT_TO_STOCK
        found["cuda"] |= {"louver_serves": SERVED_ON_A_GPU, "stock_serves": LEFT_TO_STOCK_ON_A_GPU}
    else:
        found["model"] = _model(options.model, offload(options))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0


def _cuda() -> dict[str, Any]:
    return {
        "built_in": core.has_cuda(),
        "devices": [
            {
                "id": gpu.id,
                "name": gpu.name,
                "compute_capability": gpu.capability,
                "louver_serves": gpu.in_the_way is None,
                "in_the_way": gpu.in_the_way,
            }
            for gpu in gpus()
        ],
    }


def _model(path: str, where: Offload) -> dict[str, Any]:
    """The model's shape, and which path each of its layers takes, found by running two decode steps."""
    llm = _loaded(path, where, n_ctx=256)
    try:
        window = llama_cpp.llama_model_n_swa(llm.model)
        if window:
            # A window shows only in a context that is larger.
            llm.close()
            llm = _loaded(path, where, n_ctx=window + 1024)
        return {
            "file": path,
            **_shape(llm, window),
            "n_gpu_layers": where.n_gpu_layers,
            "attention_layers": _paths(llm),
        }
    finally:
        llm.close()


def _loaded(path: str, where: Offload, n_ctx: int) -> Llama:
    everywhere = LouverConfig(min_context=0, min_context_gpu=0)
    return Llama(path, louver=everywhere, n_ctx=n_ctx, swa_full=False, verbose=False, **where.settings)


def _shape(llm: Llama, window: int) -> dict[str, Any]:
    model = llm.model
    architecture = llm.metadata["general.architecture"]
    n_head = llama_cpp.llama_model_n_head(model)
    n_head_kv = llama_cpp.llama_model_n_head_kv(model)

    def hyperparameter(name: str) -> str | None:
        return llm.metadata.get(f"{architecture}.attention.{name}")

    head_dim = llama_cpp.llama_model_n_embd(model) // max(n_head, 1)
    return {
        "architecture": architecture,
        "n_layer": llama_cpp.llama_model_n_layer(model),
        "n_head": n_head,
        "n_head_kv": n_head_kv,
        "n_gqa": n_head // max(n_head_kv, 1),
        "head_dim_keys": int(hyperparameter("key_length") or head_dim),
        "head_dim_values": int(hyperparameter("value_length") or head_dim),
        "n_ctx_train": llama_cpp.llama_model_n_ctx_train(model),
        "sliding_window": window or None,
        "soft_cap": llm.metadata.get(f"{architecture}.attn_logit_softcapping"),
        "alibi": hyperparameter("max_alibi_bias"),
        "mla_rank": hyperparameter("kv_lora_rank"),
    }


def _paths(llm: Llama) -> dict[str, Any]:
    if not llama_cpp.llama_get_memory(llm.ctx):
        return {"louver": 0, "stock": "all: this model keeps no KV cache"}
    n_steps = 2
    for _ in range(n_steps):
        llm.eval([max(llm.token_bos(), 0)])
    stats = llm.louver_stats()
    why = LEFT_TO_STOCK | LEFT_TO_STOCK_ON_A_GPU
    return {
        "louver": stats["attention"]["louver"] // n_steps,
        "stock": {
            reason: {"layers": n // n_steps, "why": why[reason]}
            for reason, n in stats["reasons"]["stock"].items()
        },
    }


def _print(found: dict[str, Any], indent: str = "") -> None:
    for name, value in found.items():
        if isinstance(value, dict) and value:
            print(f"{indent}{name}:")
            _print(value, indent + "  ")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
            for item in value:
                _print({name: item}, indent)
        elif isinstance(value, (list, tuple)) and any(" " in item for item in value):
            print(f"{indent}{name}:", *value, sep=f"\n{indent}  ")
        else:
            print(f"{indent}{name}: {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(value) or "none"
    return "none" if value in (None, {}) else str(value)
