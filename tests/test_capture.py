"""What Runtime.capture() keeps is what the attention ops read, for every path, cache type and reason."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import engine as engine_module
import tiny_models
from engine import Engine, Model, Tap
from louver_llama._libraries import core

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from capture_file import decoded  # noqa: E402

DEPTH = 200
STEPS = 3
SETTINGS = {"min_context": 32, "sinks": 2, "recent": 8}


class Ops(Tap):
    """Keeps query, keys, values and output of every attention op, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[np.ndarray, ...]] = []

    def _recompute(self, op: engine_module._Tensor) -> None:
        def read(tensor: engine_module._Tensor) -> np.ndarray:
            source = tensor.src[0]
            cast = tensor.type == 1 and source and source.contents.type == 0
            return engine_module._read(source.contents if cast else tensor)[0]

        query, key, value = (read(op.src[i].contents) for i in range(3))
        self.seen.append((query[:, 0], key.swapaxes(0, 1), value.swapaxes(0, 1), read(op)[0]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capture")


@pytest.fixture(scope="module")
def llama(folder: Path) -> Path:
    return tiny_models.llama(folder / "llama.gguf")


def tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, tiny_models.N_VOCAB, n).tolist()


def captured_steps(engine: Engine, n_steps: int = STEPS) -> list[dict]:
    """Fill the cache, and capture some steps; the last one with its cache."""
    engine.extend(tokens(DEPTH))
    for step, token in enumerate(tokens(n_steps, seed=1)):
        engine.runtime.capture(queries=True, cache=step == n_steps - 1)
        engine.step({0: token})
    engine.runtime.capture(queries=False)
    return engine.runtime.captured()


def exact_attention(layer: dict, step: int) -> np.ndarray:
    k, v = (decoded(layer[name], layer[f"type_{name}"]).astype(np.float64) for name in "kv")
    n_gqa = layer["queries"].shape[1] // k.shape[1]
    k, v = (np.repeat(x, n_gqa, axis=1) for x in (k, v))
    scores = np.einsum("hd,nhd->hn", layer["queries"][step].astype(np.float64), k) * layer["scale"]
    scores[:, layer["visible"][step] == 0] = -np.inf
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hn,nhd->hd", weights / weights.sum(axis=1, keepdims=True), v)


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "q8_0"])
@pytest.mark.parametrize("settings", [{"epsilon": 0.0}, {"enabled": False}], ids=["dense", "stock"])
def test_captured_is_what_the_op_read(llama: Path, kind: str, settings: dict) -> None:
    tap = Ops()
    with (
        Model(llama) as model,
        Engine(model, type_k=kind, type_v=kind, tap=tap, **SETTINGS, **settings) as one,
    ):
        tap.listen()
        layers = captured_steps(one)
    assert [layer["layer"] for layer in layers] == list(range(tiny_models.N_LAYER))
    for number, layer in enumerate(layers):
        assert (layer["type_k"], layer["type_v"], layer["reason"]) == (kind, kind, "none")
        assert layer["queries"].shape == (STEPS, 4, 64)
        assert layer["visible"].sum(1).tolist() == [DEPTH + 1 + step for step in range(STEPS)]
        for step in range(STEPS):
            query, key, value, output = tap.seen[(step - STEPS) * tiny_models.N_LAYER + number]
            np.testing.assert_array_equal(layer["queries"][step], query)
        for name, last in (("k", key), ("v", value)):
            np.testing.assert_array_equal(decoded(layer[name], kind), last)
        tolerance = (
            1e-5 if "epsilon" in settings else 0.05
        )  # stock sums values in float16, and rounds queries
        np.testing.assert_allclose(exact_attention(layer, -1), output, atol=tolerance)


@pytest.mark.parametrize("epsilon", [0.02, 0.1])
def test_certificates_can_be_computed_again(llama: Path, epsilon: float) -> None:
    """The captured cache, indexed and attended to outside of llama.cpp, gives the same certificates."""
    with Model(llama) as model, Engine(model, epsilon=epsilon, n_threads=2, **SETTINGS) as one:
        layers = captured_steps(one, n_steps=1)
        last_step = one.stats["last_step"]
    bench = core.testing.AttentionBench()
    for layer in layers:
        bench.add_layer(
            layer["k"].reshape(len(layer["k"]), -1),
            layer["v"].reshape(len(layer["v"]), -1),
            layer["visible"][0].astype(bool),
            type_k="f16",
            type_v="f16",
            key_dim=64,
            value_dim=layer["value_dim"],
            n_head=4,
            n_head_kv=2,
            scale=layer["scale"],
        )
    queries = [layer["queries"][0] for layer in layers]
    found = bench.step(queries, epsilon=epsilon, sinks=2, recent=8, n_threads=2)
    heads = [head for layer in last_step for head in layer["heads"]]
    assert 0 < max(head["delta"] for head in heads) <= epsilon
    assert found["delta"].tolist() == [head["delta"] for head in heads]
    assert (found["attended"], found["visible"]) == tuple(
        sum(head[name] for head in heads) for name in ("n_attended", "n_visible")
    )
    for layer, output, certificates in zip(layers, found["output"], last_step, strict=True):
        bounds = np.array([head["error_bound"] for head in certificates["heads"]])
        assert (np.linalg.norm(output - exact_attention(layer, 0), axis=1) <= bounds + 1e-5).all()


def test_layers_that_louver_does_not_serve(folder: Path) -> None:
    models = {
        "gemma3": tiny_models.gemma(folder / "gemma3.gguf", soft_cap=False, window=64),
        "gemma2": tiny_models.gemma(folder / "gemma2.gguf", soft_cap=True, window=64),
        "bloom": tiny_models.bloom(folder / "bloom.gguf"),
        "gpt_oss": tiny_models.gpt_oss(folder / "gpt_oss.gguf"),
        "deepseek2": tiny_models.deepseek2(folder / "deepseek2.gguf"),
    }
    reasons = {}
    for name, path in models.items():
        with Model(path) as model, Engine(model, **SETTINGS) as one:
            layers = captured_steps(one, n_steps=1)
        assert [layer["layer"] for layer in layers] == list(range(tiny_models.N_LAYER))
        assert all(np.isfinite(layer["queries"]).all() for layer in layers)
        reasons[name] = [layer["reason"] for layer in layers]
    assert reasons == {
        "gemma3": ["sliding_window", "none"],
        "gemma2": ["soft_cap"] * 2,
        "bloom": ["alibi"] * 2,
        "gpt_oss": ["sinks"] * 2,
        "deepseek2": ["mla"] * 2,
    }


def test_only_decode_steps_while_it_is_on(llama: Path) -> None:
    with Model(llama) as model, Engine(model, **SETTINGS) as one:
        one.runtime.capture(queries=True)
        one.extend(tokens(DEPTH))
        assert one.runtime.captured() == []
        one.step({0: 5})
        one.runtime.capture(queries=False)
        one.step({0: 6})
        layers = one.runtime.captured()
        assert [layer["queries"].shape[0] for layer in layers] == [1, 1]
        assert [layer["k"].shape[0] for layer in layers] == [0, 0]
        assert one.runtime.captured() == []
