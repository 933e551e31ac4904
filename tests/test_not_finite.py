"""NaN and infinity in queries, keys and values: the output is what dense attention gives, which is stock's.

One token of the tiny model's vocabulary, ODD, has an embedding in a direction that no other token has and
that no layer writes to. Huge weights in that direction overflow only where that token is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from engine import Engine, Model
from tiny_models import N_LAYER

ODD = 99
SETTINGS = {"epsilon": 0.02, "min_context": 64, "check": True}
TEXT = np.random.default_rng(0).integers(0, ODD, 300).tolist()
Edit = Callable[[np.ndarray], None]


def only_odd_token_has_channel_0(embeddings: np.ndarray) -> None:
    embeddings[:, 0] = 0
    embeddings[ODD] = 0
    embeddings[ODD, 0] = 1


def keep_channel_0(matrix: np.ndarray) -> None:
    matrix[0] = 0


def weights(rows: slice | int, value: float) -> Edit:
    def edit(matrix: np.ndarray) -> None:
        matrix[rows, 0] = value

    return edit


def write(path: Path, tensor: str, edit: Edit, dtype: type = np.float32) -> Model:
    edits: dict[str, Edit] = {"token_embd.weight": only_odd_token_has_channel_0}
    for layer in range(N_LAYER):
        edits[f"blk.{layer}.attn_output.weight"] = keep_channel_0
        edits[f"blk.{layer}.ffn_down.weight"] = keep_channel_0
    edits[f"blk.0.{tensor}.weight"] = edit
    return Model(tiny_models.llama(path / "model.gguf", dtype=dtype, edit=edits))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)) / np.std(b))


@pytest.mark.parametrize("cache", ["f16", "bf16", "f32", "q8_0"])
@pytest.mark.parametrize("tensor", ["attn_q", "attn_k", "attn_v"])
@pytest.mark.parametrize("place", [50, 299, 303], ids=["middle", "last", "decoded"])
def test_overflow(tmp_path: Path, tensor: str, cache: str, place: int) -> None:
    """Where stock's logits are NaN, so are Louver's, and nowhere else."""
    tokens = [*TEXT, 1, 2, 3, 4, 5]
    tokens[place] = ODD
    logits = []
    with write(tmp_path, tensor, weights(slice(None), 1e38)) as model:
        for settings in ({"runtime": False}, SETTINGS, SETTINGS | {"epsilon": 0.0}):
            with Engine(model, type_k=cache, type_v=cache, **settings) as engine:
                engine.extend(tokens[:300])
                logits.append(engine.generate(tokens[300:]))
                if engine.runtime:
                    assert engine.violations == 0
                    assert engine.stats["reasons"]["stock"]["not_finite"] > 0
    stock = logits[0]
    finite = [i for i in range(5) if 300 + i < place] if place > 300 else []
    assert np.isfinite(stock).all(axis=-1).nonzero()[0].tolist() == finite
    for mine in logits[1:]:
        assert np.array_equal(np.isnan(mine), np.isnan(stock))
        assert not finite or distance(mine[finite], stock[finite]) < 0.05


def test_without_overflow(tmp_path: Path) -> None:
    """The control: the same model, but the odd token does not occur."""
    with write(tmp_path, "attn_k", weights(slice(None), 1e38)) as model, Engine(model, **SETTINGS) as engine:
        engine.extend(TEXT)
        assert np.isfinite(engine.generate([1, 2, 3])).all()
        assert engine.stats["attention"]["louver"] == 3 * N_LAYER
        assert engine.stats["reasons"]["stock"] == {"prefill": 300 * N_LAYER}


SLOWEST = [62, 126]  # a channel of each KV head that rotation hardly mixes with another


@pytest.mark.parametrize("seed", range(6))
def test_infinite_key_of_finite_attention(tmp_path: Path, seed: int) -> None:
    """One channel of a key overflows float16. Scores are infinite, of either sign, and outputs are finite."""
    logits = []
    served = 0
    with infinite_key(tmp_path, seed) as model:
        # Stock sums up values of this type in the plain way, which is finite.
        context = {"n_threads": 1, "type_v": "bf16"}
        for settings in ({"runtime": False}, SETTINGS, SETTINGS | {"epsilon": 0.0}):
            with Engine(model, **context, **settings) as engine:
                logits.append(after_infinite_key(engine, seed))
                if engine.runtime:
                    assert engine.violations == 0
                    assert engine.stats["reasons"]["stock"]["not_finite"] > 0
                    served += engine.stats["attention"]["louver"] + engine.stats["attention"]["dense"]
    stock, louver, dense = logits
    assert np.isfinite(stock).all()
    assert distance(louver, stock) < 0.03
    assert distance(dense, stock) < 0.01
    assert served > 0


def test_certificate_beside_an_infinite_key(tmp_path: Path) -> None:
    context = {"n_threads": 1, "type_v": "bf16"}
    with infinite_key(tmp_path, 4) as model, Engine(model, **context, **SETTINGS) as engine:
        after_infinite_key(engine, 4)
        assert engine.stats["delta_max"] <= SETTINGS["epsilon"]


def infinite_key(path: Path, seed: int) -> Model:
    value = float(np.random.default_rng(seed).choice([-6e4, 6e4]))
    return write(path, "attn_k", weights(SLOWEST, value), np.float16)


def after_infinite_key(engine: Engine, seed: int) -> np.ndarray:
    engine.extend(TEXT)
    return engine.generate([ODD, *np.random.default_rng(seed).integers(0, ODD, 8).tolist()])


def test_one_sequence_does_not_spoil_another(tmp_path: Path) -> None:
    """Nor do its cells after they have been reused."""
    after = []
    with write(tmp_path, "attn_k", weights(slice(None), 1e38)) as model:
        for settings in ({"runtime": False}, SETTINGS):
            # In small batches: stock's kernel for large ones lets a NaN through that the mask hides.
            with Engine(model, n_ctx=512, n_seq_max=2, n_batch=10, **settings) as engine:
                engine.extend(TEXT[:150], 0)
                engine.extend([ODD], 1)  # in the middle of what will be a block of the index
                engine.extend(TEXT[150:], 0)
                both = engine.step({0: 1, 1: 2})
                assert np.isfinite(both[0]).all()
                assert np.isnan(both[1]).all()
                if engine.runtime:
                    engine.runtime.reset_stats()
                    engine.step({0: 1, 1: 2})
                    assert engine.stats["reasons"]["stock"] == {"not_finite": 2 * N_LAYER}
                    engine.runtime.reset_stats()
                else:
                    engine.step({0: 1, 1: 2})
                first = engine.generate([3, 4], 0)  # sees none of the other's cells
                engine.remove(1)
                after.append(np.concatenate([first, engine.generate([5, 6, 7, 8], 0)]))
                if engine.runtime:
                    assert engine.stats["attention"] == {"louver": 6 * N_LAYER, "dense": 0, "stock": 0}
                    assert engine.violations == 0 < engine.pairs
    assert distance(after[1], after[0]) < 0.03
