"""Louver on a GPU inside llama.cpp: whole generations, checked by brute force and against stock on the same GPU.

What the kernels themselves compute is compared with float64 in cpp/tests and test_device_index; here it is that they
see the cache as it is at every step: through CUDA graphs, removals, shifts, restores and several sequences.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

import test_lifecycle
import test_shapes
import tiny_models
from engine import LIBRARY_FOLDER, Engine, Model, _core, llama_cpp
from louver_llama import Llama, LouverConfig
from louver_llama.cli import main
from test_lifecycle import REWRITES, Event, Life, append, distance, grow, run_story, tell
from test_shapes import DECODED, N_STEPS, PREFILL, PREFILLED, compare_with_stock, fill, random_tokens, run
from test_stock_identity import divergence, greedy
from tiny_models import N_LAYER, Heads

pytestmark = pytest.mark.gpu

SETTINGS = test_lifecycle.SETTINGS | {"min_context_gpu": 0}
EPSILON = SETTINGS["epsilon"]
N_HEAD = Heads().n_head
CACHES = ("f16", "bf16", "f32", "q8_0")
# Logits against stock's, root mean square over spread. Stock rounds queries, weights and sums to float16, or queries to
# 8 bits. With a third of its cells lost, a tiny model's logits differ by 0.38 to 0.74 (on the CPU).
TOLERANCE = {"f16": 0.1, "bf16": 0.1, "f32": 0.1, "q8_0": 0.2}


def on_gpu(path: Path | str) -> Model:
    """With all layers there."""
    return Model(path, n_gpu_layers=-1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with on_gpu(tiny_models.llama(tmp_path_factory.mktemp("cuda") / "model.gguf")) as loaded:
        yield loaded


@pytest.fixture(autouse=True)
def settings_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helpers of these modules run with them."""
    for module in (test_lifecycle, test_shapes):
        monkeypatch.setattr(module, "SETTINGS", module.SETTINGS | {"min_context_gpu": 0})
    monkeypatch.setattr(Model, "n_gpu_layers", -1)


def context_of(cache: str, unified: bool, n_seq: int = 2) -> dict[str, Any]:
    n_ctx = 512 if unified else 512 * n_seq
    return {"type_k": cache, "type_v": cache, "unified": unified, "n_seq_max": n_seq, "n_ctx": n_ctx}


def assert_nothing_missed(stats: dict) -> None:
    check = stats["check"]
    assert check["pairs"] == stats["keys_visible"] > 0
    assert [check[name] for name in ("misses", "bound_violations", "mass_violations")] == [0, 0, 0]
    assert stats["heads_in_full"] == 0


def assert_caught(stats: dict) -> None:
    assert stats["check"]["misses"] + stats["check"]["bound_violations"] > 0


# The index follows the cache.


def events() -> list[tuple[Event, str]]:
    shifts = (test_lifecycle.shift, test_lifecycle.shift_up, test_lifecycle.divide)
    # llama.cpp ends the process over a shift of a bf16 cache: it has no ROPE for that.
    return [(e, cache) for e in (append, *REWRITES) for cache in CACHES if cache != "bf16" or e not in shifts]


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize(("event", "cache"), events())
def test_event(model: Model, event: Event, cache: str, unified: bool) -> None:
    context = context_of(cache, unified)
    with Engine(model, runtime=False, **context) as stock:
        expected = tell(stock, event)
    with Engine(model, **SETTINGS, **context) as louver:
        logits = tell(louver, event)
        counts = louver.stats
    assert_nothing_missed(counts)
    assert counts["keys_scanned"] > 0 and counts["keys_attended"] < counts["keys_visible"]
    assert counts["attention"]["louver"] > 0 == counts["attention"]["dense"]
    assert set(counts["reasons"]["stock"]) <= {"prefill"}
    assert distance(logits, expected) < TOLERANCE[cache]


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize("event", REWRITES)
def test_event_with_a_stale_index_is_caught(model: Model, event: Event, cache: str, unified: bool) -> None:
    with Engine(model, **SETTINGS, **context_of(cache, unified)) as engine:
        tell(engine, event, stale=True)
        assert_caught(engine.stats)


@pytest.mark.parametrize("whole", [True, False], ids=["state", "sequence"])
@pytest.mark.parametrize("stale", [False, True], ids=["", "stale"])
def test_restore_into_another_context(model: Model, whole: bool, stale: bool) -> None:
    with Engine(model, **SETTINGS) as source, Engine(model, **SETTINGS) as target:
        source.extend(random_tokens(300))
        source.generate(random_tokens(3, seed=1))
        target.extend(random_tokens(310, seed=2))
        target.generate(random_tokens(3, seed=3))
        assert_nothing_missed(target.stats)
        target.runtime.reset_stats()
        target.runtime.set_stale(stale)
        if whole:
            target.restore(source.save())
        else:
            target.restore_sequence(source.save_sequence(0), 0)
        mine, yours = (engine.generate(random_tokens(5, seed=4)) for engine in (target, source))
        if stale:
            assert_caught(target.stats)
        else:
            assert_nothing_missed(target.stats)
            assert distance(mine, yours) < TOLERANCE["f16"]


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_life(model: Model, seed: int, unified: bool, cache: str) -> None:
    context = context_of(cache, unified, n_seq=3)
    with Engine(model, **SETTINGS, **context) as louver, Engine(model, runtime=False, **context) as stock:
        life = Life((louver, stock), unified, 512, np.random.default_rng(seed))
        life.live(60)
        counts = louver.stats
    assert_nothing_missed(counts)
    assert counts["check"]["pairs"] > 100_000
    assert life.worst < TOLERANCE[cache]
    assert len(life.happened) >= 8


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_random_life_with_a_stale_index_is_caught(model: Model, unified: bool) -> None:
    context = context_of("f16", unified, n_seq=3)
    with Engine(model, **SETTINGS, **context) as louver, Engine(model, runtime=False, **context) as stock:
        louver.runtime.set_stale(True)
        life = Life((louver, stock), unified, 512, np.random.default_rng(0))
        life.live(20)
        assert_caught(louver.stats)


# What is served, and what is left to stock.


def shapes() -> list[tuple[int, int, str, bool]]:
    """Every two of head size, group size and cache type meet."""
    return [
        (head_dim, group, cache, (i + j + k) % 4 == 0)
        for i, head_dim in enumerate(test_shapes.HEAD_DIMS)
        for j, group in enumerate(test_shapes.GROUPS)
        for k, cache in enumerate(CACHES)
        if (i + j + k) % 2 == 0
        if head_dim % 32 == 0 or cache != "q8_0"  # llama.cpp refuses the others
    ]


@pytest.mark.parametrize(("head_dim", "group", "cache", "unified"), shapes())
def test_served(tmp_path: Path, head_dim: int, group: int, cache: str, unified: bool) -> None:
    n_head_kv = 1 if group >= 7 else 2
    n_head = group * n_head_kv
    context = context_of(cache, unified)
    with on_gpu(tiny_models.llama(tmp_path / "m.gguf", Heads(head_dim, n_head, n_head_kv))) as model:
        with Engine(model, runtime=False, **context) as engine:
            fill(engine)
            stock = run(engine)
            # The control of the comparison: a third of the cells is lost.
            for seq, n in enumerate(PREFILL):
                engine.remove(seq, n // 3, 2 * n // 3)
            lost = run(engine)
        found = []
        with Engine(model, **SETTINGS, **context) as engine:
            fill(engine)
            for epsilon in (EPSILON, 0.0):
                engine.runtime.configure(epsilon=epsilon)
                engine.runtime.reset_stats()
                found.append((run(engine), engine.stats))
    (pruned, counts), (dense, dense_counts) = found
    n_query = 2 * N_STEPS * N_LAYER
    visible = N_LAYER * n_head * sum(n + step + 1 for n in PREFILL for step in range(N_STEPS))

    assert counts["attention"] == {"louver": n_query, "dense": 0, "stock": 0}
    assert counts["n_queries"] == n_query * n_head
    assert counts["keys_visible"] == visible
    assert_nothing_missed(counts)
    assert counts["keys_attended"] < visible
    assert 0 < counts["delta_max"] <= EPSILON
    certificates = [(entry["layer"], len(entry["heads"])) for entry in counts["last_step"]]
    assert sorted(certificates) == [(layer, n_head) for layer in range(N_LAYER) for _ in PREFILL]

    assert dense_counts["attention"] == {"louver": 0, "dense": n_query, "stock": 0}
    assert dense_counts["reasons"]["dense"] == {"epsilon_zero": n_query}
    assert dense_counts["keys_attended"] == dense_counts["keys_visible"] == visible
    assert dense_counts["delta_max"] == dense_counts["error_bound_max"] == 0

    assert distance(dense, stock) < TOLERANCE[cache] / 2
    assert distance(pruned, stock) < TOLERANCE[cache]
    assert distance(lost, stock) > TOLERANCE[cache]


@pytest.mark.parametrize(
    ("write", "reason", "context"),
    [
        (tiny_models.gpt_oss, "sinks", {}),
        (tiny_models.llama, "cache_type", {"type_k": "q4_0", "type_v": "q4_0"}),
        (tiny_models.llama, "cache_type", {"type_k": "f16", "type_v": "q8_0"}),
        (tiny_models.llama, "disabled", {"settings": {"enabled": False}}),
    ],
    ids=["sinks", "q4_0", "two_types", "disabled"],
)
def test_left_to_stock(tmp_path: Path, write: Callable, reason: str, context: dict) -> None:
    louver, stock, counts = compare_with_stock(write(tmp_path / "model.gguf"), **context)
    assert np.array_equal(louver, stock)
    assert counts["attention"] == {"louver": 0, "dense": 0, "stock": PREFILLED + DECODED}
    assert counts["reasons"]["stock"] == {reason: PREFILLED + DECODED}
    assert counts["index"]["cells"] == 0


def test_served_is_not_bit_identical(tmp_path: Path) -> None:
    """The control of the comparison above: the same model, and Louver serves it."""
    louver, stock, counts = compare_with_stock(tiny_models.llama(tmp_path / "model.gguf"))
    assert not np.array_equal(louver, stock)
    assert counts["attention"] == {"louver": DECODED, "dense": 0, "stock": PREFILLED}
    assert counts["reasons"]["stock"] == {"prefill": PREFILLED}


def test_sliding_window_is_left_to_stock(tmp_path: Path) -> None:
    """The first layer of two has a window of 64 cells, and a cache of its own."""
    path = tiny_models.gemma(tmp_path / "model.gguf", soft_cap=False, window=64)
    _, _, counts = compare_with_stock(path)
    assert counts["attention"] == {"louver": 4, "dense": 0, "stock": 2 * PREFILL[0] + 4}
    assert counts["reasons"]["stock"] == {"prefill": PREFILL[0], "sliding_window": PREFILL[0] + 4}
    assert_nothing_missed(counts)


def test_below_min_context_gpu_stock_attends(model: Model) -> None:
    """From 256 cells in use to the next multiple of 256 it is stock, bit for bit; from there on Louver."""
    settings = SETTINGS | {"min_context_gpu": 512}
    tokens = random_tokens(10, seed=1)
    with Engine(model, runtime=False) as stock, Engine(model, **settings) as louver:
        for engine in (stock, louver):
            engine.extend(random_tokens(250))
        louver.runtime.reset_stats()
        expected, logits = (engine.generate(tokens) for engine in (stock, louver))
        counts = louver.stats
    assert counts["attention"] == {"louver": 4 * N_LAYER, "dense": 0, "stock": 6 * N_LAYER}
    assert counts["reasons"]["stock"] == {"below_min_context": 6 * N_LAYER}
    assert np.array_equal(logits[:6], expected[:6])
    assert not np.array_equal(logits[6:], expected[6:])
    assert_nothing_missed(counts)


def test_a_context_that_cannot_be_deep_enough_gets_no_index(model: Model) -> None:
    with Engine(model, n_ctx=512, **SETTINGS | {"min_context_gpu": 513}) as engine:
        engine.extend(random_tokens(500))
        engine.generate(random_tokens(3))
        counts = engine.stats
    assert counts["reasons"]["stock"] == {"prefill": 500 * N_LAYER, "below_min_context": 3 * N_LAYER}
    assert counts["index"]["cells"] == counts["index"]["cells_encoded"] == 0


@pytest.mark.parametrize("n_tokens", [1, 2, 4, 5])
def test_several_tokens_at_once(model: Model, n_tokens: int) -> None:
    """Up to 4 tokens of a sequence are Louver's, each with the cells before it; more are prefill."""
    tokens = random_tokens(n_tokens, seed=1)
    positions = range(PREFILL[0], PREFILL[0] + n_tokens)
    logits = []
    with Engine(model, runtime=False) as stock, Engine(model, **SETTINGS) as louver:
        for engine in (stock, louver):
            engine.extend(random_tokens(PREFILL[0]))
        louver.runtime.reset_stats()
        logits = [engine.decode(tokens, positions, [0] * n_tokens) for engine in (stock, louver)]
        counts = louver.stats
    served = n_tokens <= 4
    path = "louver" if served else "stock"
    assert counts["attention"] == {"louver": 0, "dense": 0, "stock": 0} | {path: n_tokens * N_LAYER}
    assert np.array_equal(*logits) == (not served)
    assert distance(*logits) < TOLERANCE["f16"]
    if served:
        assert counts["keys_visible"] == N_LAYER * N_HEAD * sum(n + 1 for n in positions)
        assert_nothing_missed(counts)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("n_seq", [3, 5])
def test_several_sequences_in_a_batch(model: Model, n_seq: int, unified: bool) -> None:
    """Five tokens of one stream are too many, one of each of five streams are not."""
    context = context_of("f16", unified, n_seq) | {"n_ctx": 512 * n_seq}
    lengths = [100 + 30 * seq for seq in range(n_seq)]
    logits = []
    with Engine(model, runtime=False, **context) as stock, Engine(model, **SETTINGS, **context) as louver:
        for engine in (stock, louver):
            for seq, n in enumerate(lengths):
                engine.extend(random_tokens(n, seed=seq), seq)
        louver.runtime.reset_stats()
        logits = [engine.step(dict.fromkeys(range(n_seq), 7)) for engine in (stock, louver)]
        counts = louver.stats
    if unified and n_seq > 4:
        assert counts["reasons"]["stock"] == {"prefill": n_seq * N_LAYER}
        assert np.array_equal(*logits)
        return
    assert counts["attention"] == {"louver": n_seq * N_LAYER, "dense": 0, "stock": 0}
    seen = [entry["heads"][0]["n_visible"] for entry in counts["last_step"] if entry["layer"] == 0]
    assert seen == [n + 1 for n in lengths]
    assert_nothing_missed(counts)
    assert distance(*logits) < TOLERANCE["f16"]


def test_a_shared_prefix(model: Model) -> None:
    """In a unified cache a copied prefix is the same cells: nothing is encoded anew, both sequences see them."""
    context = context_of("f16", unified=True)
    with Engine(model, **SETTINGS, **context) as louver, Engine(model, runtime=False, **context) as stock:
        for engine in (louver, stock):
            engine.extend(random_tokens(256))
        encoded = louver.stats["index"]["cells_encoded"]
        for engine in (louver, stock):
            engine.copy(0, 1, 0, 192)
        logits = [grow(engine, 1) for engine in (louver, stock)]
        counts = louver.stats
    steps = len(logits[0]) // 2
    visible = sum(n + step + 1 for n in (256, 192) for step in range(steps))
    assert encoded == 256 * N_LAYER * Heads().n_head_kv
    assert counts["index"]["cells_encoded"] == encoded
    assert counts["keys_visible"] == visible * N_LAYER * N_HEAD
    assert_nothing_missed(counts)
    assert distance(*logits) < TOLERANCE["f16"]


# Settings, and the life of contexts.


def test_settings_change_between_steps(model: Model) -> None:
    random = np.random.default_rng(0)
    with Engine(model, **SETTINGS) as engine, Engine(model, runtime=False) as stock:
        for each in (engine, stock):
            each.extend(random_tokens(300))
        paths = set()
        for token in random_tokens(60, seed=1):
            settings = {
                "epsilon": float(random.choice([0.0, 0.001, 0.02, 0.1])),
                "compensate": bool(random.integers(2)),
                "enabled": bool(random.random() < 0.8),
                "min_context_gpu": int(random.choice([0, 512, 1024])),
                "sinks": int(random.choice([0, 4, 100])),
                "recent": int(random.choice([0, 1, 64, 1000])),
            }
            engine.runtime.configure(**settings)
            engine.runtime.reset_stats()
            logits = [each.step({0: token}) for each in (engine, stock)]
            counts = engine.stats
            if not settings["enabled"]:
                path, reason = "stock", "disabled"
            elif settings["min_context_gpu"] > 512:  # 300 to 360 cells in use count as 512
                path, reason = "stock", "below_min_context"
            elif settings["epsilon"] == 0:
                path, reason = "dense", "epsilon_zero"
            else:
                path, reason = "louver", ""
            paths.add(reason or path)
            assert counts["attention"] == {"louver": 0, "dense": 0, "stock": 0} | {path: N_LAYER}
            assert counts["reasons"].get(path, {}) == ({reason: N_LAYER} if reason else {})
            assert counts["delta_max"] <= settings["epsilon"]
            if path != "stock":
                assert_nothing_missed(counts)
            if path == "louver" and settings["recent"] >= engine.last() + 1:
                assert counts["keys_attended"] == counts["keys_visible"]
            assert distance(*logits) < TOLERANCE["f16"] + settings["epsilon"]
    assert paths == {"louver", "epsilon_zero", "disabled", "below_min_context"}


@pytest.mark.parametrize("stale", [False, True], ids=["", "stale"])
def test_cells_rewritten_while_disabled(model: Model, stale: bool) -> None:
    with Engine(model, **SETTINGS) as engine:
        engine.extend(random_tokens(200))
        engine.generate(random_tokens(5, seed=1))
        engine.runtime.configure(enabled=False)
        engine.runtime.set_stale(stale)
        engine.remove(0, 60)
        engine.extend(random_tokens(140, seed=2))
        engine.generate(random_tokens(5, seed=3))
        engine.runtime.configure(enabled=True)
        engine.runtime.reset_stats()
        engine.generate(random_tokens(4, seed=4))
        counts = engine.stats
    if stale:
        assert_caught(counts)
    else:
        assert_nothing_missed(counts)


def test_enabled_after_a_prefill_without(model: Model) -> None:
    with Engine(model, **SETTINGS, enabled=False) as engine, Engine(model, runtime=False) as stock:
        for each in (engine, stock):
            each.extend(random_tokens(200))
        assert np.array_equal(*(each.generate(random_tokens(5, seed=1)) for each in (engine, stock)))
        assert engine.stats["index"]["cells"] == 0
        engine.runtime.configure(enabled=True)
        engine.runtime.reset_stats()
        logits = [each.generate(random_tokens(5, seed=2)) for each in (engine, stock)]
        counts = engine.stats
    assert counts["attention"]["louver"] == 5 * N_LAYER
    assert counts["keys_attended"] < counts["keys_visible"]
    assert_nothing_missed(counts)
    assert distance(*logits) < TOLERANCE["f16"]


def test_two_contexts_interleaved(model: Model) -> None:
    """Each has its own index and counts."""
    seeds = (0, 100)
    with Engine(model, **SETTINGS) as first, Engine(model, **SETTINGS) as second:
        for engine, seed in zip((first, second), seeds, strict=True):
            engine.extend(random_tokens(200, seed=seed))
        for tokens in zip(*(random_tokens(40, seed=seed + 1) for seed in seeds), strict=True):
            for engine, token in zip((first, second), tokens, strict=True):
                engine.step({0: token})
        for engine in (first, second):
            assert engine.stats["attention"]["louver"] == 40 * N_LAYER
            assert engine.pairs == N_LAYER * N_HEAD * sum(range(201, 241))
            assert_nothing_missed(engine.stats)


def test_a_context_is_freed_while_another_lives(model: Model) -> None:
    """Its successors, likely at its addresses, start with an index of their own."""
    with Engine(model, **SETTINGS) as survivor:
        survivor.extend(random_tokens(200))
        reference = survivor.generate(random_tokens(5, seed=1))
        for round_ in range(6):
            with Engine(model, **SETTINGS) as engine:
                logits = run_story(engine, seed=1000 * round_)
                assert_nothing_missed(engine.stats)
                runtime, index = engine.runtime, engine.stats["index"]
            assert index["cells"] > 0 and index["bytes"] > 0
            # The runtime stays: an index that outlived its context would still be counted by it.
            freed = runtime.stats()["index"]
            assert freed["cells"] == freed["bytes"] == 0
            with Engine(model, runtime=False) as engine:
                assert distance(logits, run_story(engine, seed=1000 * round_)) < TOLERANCE["f16"]
            survivor.remove(0, 200)
            survivor.runtime.reset_stats()
            assert distance(survivor.generate(random_tokens(5, seed=1)), reference) < TOLERANCE["f16"]
            assert_nothing_missed(survivor.stats)


def test_a_runtime_goes_before_its_context(model: Model) -> None:
    """Then nobody owns the cache, until the next runtime finds it."""
    with Engine(model, **SETTINGS) as engine, Engine(model, runtime=False) as stock:
        for each in (engine, stock):
            each.extend(random_tokens(200))
        engine.generate(random_tokens(5, seed=1))
        engine.runtime = None
        for each in (engine, stock):
            each.remove(0, 200)
        first = [each.generate(random_tokens(5, seed=2)) for each in (engine, stock)]
        assert np.array_equal(*first)
        engine.runtime = _core.Runtime(**SETTINGS)
        second = [each.generate(random_tokens(5, seed=3)) for each in (engine, stock)]
        assert engine.stats["attention"] == {"louver": 5 * N_LAYER, "dense": 0, "stock": 0}
        assert_nothing_missed(engine.stats)
    assert distance(*second) < TOLERANCE["f16"]


def free_device_memory() -> int:
    ggml = ctypes.CDLL(str(LIBRARY_FOLDER / "libggml.so"))
    base = ctypes.CDLL(str(LIBRARY_FOLDER / "libggml-base.so"))
    ggml.ggml_backend_dev_by_type.restype = ctypes.c_void_p
    device = ggml.ggml_backend_dev_by_type(1)  # GGML_BACKEND_DEVICE_TYPE_GPU
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    base.ggml_backend_dev_memory(ctypes.c_void_p(device), ctypes.byref(free), ctypes.byref(total))
    assert 0 < free.value <= total.value
    return free.value


def test_contexts_that_are_gone_hold_no_memory(model: Model) -> None:
    def live() -> None:
        with Engine(model, **SETTINGS, n_ctx=4096) as engine:
            engine.extend(random_tokens(200))
            engine.generate(random_tokens(4, seed=1))

    live()
    before = free_device_memory()
    with Engine(model, **SETTINGS, n_ctx=65536):
        assert free_device_memory() < before - 2**24, "the control: what a context holds can be seen"
    for _ in range(40):
        live()
    assert free_device_memory() > before - 2**24


# CUDA graphs.

GENERATION = """
import json, sys
from engine import Engine, Model
from test_shapes import random_tokens

settings = json.loads(sys.argv[2])
with Model(sys.argv[1]) as model, Engine(model, **settings) as engine:
    engine.extend(random_tokens(250))
    engine.runtime.reset_stats()
    logits = engine.generate(random_tokens(150, seed=1))
    stats = engine.stats
    names = ("attention", "reasons", "n_queries", "keys_visible", "check")
    print(json.dumps({"counts": {name: stats[name] for name in names}, "logits": logits.tolist()}))
"""


def generation(path: Path, **environment: str) -> tuple[dict, np.ndarray]:
    process = subprocess.run(
        [sys.executable, "-c", GENERATION, str(path), json.dumps(SETTINGS)],
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    found = json.loads(process.stdout.splitlines()[-1])
    return found["counts"], np.array(found["logits"])


def test_with_and_without_cuda_graphs(tmp_path: Path) -> None:
    """Across the step where llama.cpp's graph grows from 256 cells to 512."""
    path = tiny_models.llama(tmp_path / "model.gguf")
    graphs, logits = generation(path)
    none, expected = generation(path, GGML_CUDA_DISABLE_GRAPHS="1")
    assert graphs == none
    assert graphs["attention"] == {"louver": 150 * N_LAYER, "dense": 0, "stock": 0}
    assert graphs["keys_visible"] == N_LAYER * N_HEAD * sum(range(251, 401))
    assert_nothing_missed({**graphs, "heads_in_full": 0})
    assert distance(logits, expected) < TOLERANCE["f16"] / 2


@pytest.mark.parametrize("epsilon", [EPSILON, 0.0])
def test_every_step_is_counted_once(model: Model, epsilon: float) -> None:
    """Also those that are replayed, whether or not somebody asks in between."""
    path = "louver" if epsilon else "dense"
    with Engine(model, **SETTINGS | {"epsilon": epsilon}) as engine:
        engine.extend(random_tokens(300))
        engine.runtime.reset_stats()
        for step, token in enumerate(random_tokens(40, seed=1), start=1):
            engine.step({0: token})
            assert engine.stats["attention"] == {"louver": 0, "dense": 0, "stock": 0} | {path: step * N_LAYER}
        assert engine.pairs == N_LAYER * N_HEAD * sum(range(301, 341))
        engine.runtime.reset_stats()
        engine.generate(random_tokens(100, seed=2))
        assert engine.stats["attention"][path] == 100 * N_LAYER
        assert engine.pairs == N_LAYER * N_HEAD * sum(range(341, 441))


def test_replayed_steps_of_stock_are_counted_too(model: Model) -> None:
    with Engine(model, **SETTINGS, enabled=False) as engine:
        engine.extend(random_tokens(300))
        engine.runtime.reset_stats()
        engine.generate(random_tokens(50, seed=1))
        assert engine.stats["reasons"]["stock"] == {"disabled": 50 * N_LAYER}


# The real model.

N_LAYER_REAL, N_HEAD_REAL = 30, 9
DEPTH = 4000


@pytest.fixture(scope="module")
def real(model_path: str) -> Iterator[Model]:
    with on_gpu(model_path) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def english(real: Model) -> list[int]:
    """The manual of Python, from the standard library."""
    return real.tokenize("\n".join(topics.values())[:60_000])


@pytest.mark.parametrize("cache", CACHES)
def test_real_generation_misses_nothing(real: Model, english: list[int], cache: str) -> None:
    n = 100
    with Engine(real, **SETTINGS | {"epsilon": 0.05}, n_ctx=4608, type_k=cache, type_v=cache) as engine:
        first = int(engine.extend(english[:DEPTH]).argmax())
        engine.runtime.reset_stats()
        tokens, _ = greedy(engine, first, n)
        counts = engine.stats
        assert len(set(tokens)) > n / 10  # a small model repeats itself
        assert counts["attention"] == {"louver": n * N_LAYER_REAL, "dense": 0, "stock": 0}
        assert counts["keys_visible"] == N_LAYER_REAL * N_HEAD_REAL * sum(range(DEPTH + 1, DEPTH + n + 1))
        assert_nothing_missed(counts)
        assert counts["keys_attended"] < 0.6 * counts["keys_visible"]
        assert 0 < counts["delta_max"] <= 0.05
        assert counts["index"]["share"] < 1.2

        # The control: cells are rewritten, and nobody tells the index.
        engine.runtime.reset_stats()
        engine.runtime.set_stale(True)
        engine.remove(0, DEPTH - 1000)
        engine.extend(english[DEPTH : DEPTH + 1000])
        engine.generate(tokens[:2])
        assert_caught(engine.stats)


def test_real_text_is_that_of_stock(real: Model, english: list[int]) -> None:
    """Along stock's greedy text: the same next tokens, but where stock itself can hardly decide."""
    n = 200
    with Engine(real, **SETTINGS | {"check": False}, enabled=False, n_ctx=4608) as engine:
        runtime = engine.runtime
        first = int(engine.extend(english[:DEPTH]).argmax())
        text, stock = greedy(engine, first, n)
        assert runtime.stats()["reasons"]["stock"] == {"disabled": N_LAYER_REAL * (DEPTH + n)}

        def follow(**settings: float | bool) -> np.ndarray:
            engine.remove(0, DEPTH)
            runtime.configure(**{"enabled": True, "compensate": True} | settings)
            runtime.reset_stats()
            return engine.generate([first, *text[:-1]])

        def agreement(logits: np.ndarray) -> float:
            return float((logits.argmax(axis=-1) == stock.argmax(axis=-1)).mean())

        again = follow(enabled=False)
        assert np.array_equal(again, stock)

        dense = follow(epsilon=0.0)
        assert runtime.stats()["attention"] == {"louver": 0, "dense": n * N_LAYER_REAL, "stock": 0}
        assert not np.array_equal(dense, stock)
        chosen, wanted = dense.argmax(axis=-1), stock.argmax(axis=-1)
        rows = np.flatnonzero(chosen != wanted)
        margins = stock[rows, wanted[rows]] - stock[rows, chosen[rows]]
        assert agreement(dense) >= 0.95 and (margins < 0.5).all(), margins

        pruned = follow(epsilon=0.05)
        assert runtime.stats()["attention"] == {"louver": n * N_LAYER_REAL, "dense": 0, "stock": 0}
        assert agreement(pruned) >= 0.9

        rough = follow(epsilon=0.9, compensate=False, sinks=0, recent=0)
        assert agreement(rough) < agreement(pruned)
        # Epsilon 0 is another rounding than stock's, and 0.05 adds less than that: 0.004 and 0.003 on the CPU, and rough 0.26.
        assert max(divergence(stock, dense), divergence(stock, pruned)) < 0.02 < divergence(stock, rough)


CONFIG = LouverConfig(min_context=0, min_context_gpu=0, sinks=2, recent=8, check=True)
PROMPT = "The history of the lighthouse begins long before the first tower of stone was built. " * 12
GREEDY = {"max_tokens": 24, "temperature": 0.0}


def loaded(model_path: str, **arguments: Any) -> closing[Llama]:
    settings = {"n_ctx": 1024, "n_gpu_layers": -1, "louver": CONFIG, "verbose": False, **arguments}
    return closing(Llama(model_path, **settings))


def text_of(completion: Any) -> str:
    return completion["choices"][0]["text"]


def test_llama(model_path: str, recwarn: pytest.WarningsRecorder) -> None:
    with loaded(model_path) as llm:
        n_prompt = len(llm.tokenize(PROMPT.encode()))
        completion = llm(PROMPT, **GREEDY)
        n_decoded = completion["usage"]["completion_tokens"] - 1
        stats = llm.louver_stats()
    assert not [warning for warning in recwarn if "n_gpu_layers" in str(warning.message)]
    assert n_decoded > 5
    n_layer = N_LAYER_REAL
    assert stats["attention"] == {"louver": n_decoded * n_layer, "dense": 0, "stock": n_prompt * n_layer}
    assert stats["reasons"]["stock"] == {"prefill": n_prompt * n_layer}
    assert_nothing_missed(stats)  # type: ignore[arg-type]
    assert llm.louver_stats()["index"]["bytes"] == 0


def test_louver_is_switched_off_within_a_stream(model_path: str) -> None:
    with loaded(model_path) as llm:
        for n, _ in enumerate(llm(PROMPT, stream=True, **GREEDY)):
            if n == 8:
                llm.reset_louver_stats()
                llm.louver = replace(CONFIG, enabled=False)
        stats = llm.louver_stats()
        assert stats["attention"]["louver"] == 0 < stats["attention"]["stock"]
        assert stats["reasons"]["stock"].keys() == {"disabled"}
        llm.louver = CONFIG
        llm.reset_louver_stats()
        llm(PROMPT, **GREEDY)
        assert llm.louver_stats()["reasons"]["stock"] == {}
        assert_nothing_missed(llm.louver_stats())  # type: ignore[arg-type]


def test_two_llamas_at_once(model_path: str) -> None:
    with loaded(model_path) as first, loaded(model_path, louver=replace(CONFIG, enabled=False)) as second:
        streams = [each(PROMPT, stream=True, **GREEDY) for each in (first, second)]
        for _ in zip(*streams, strict=False):
            pass
        assert second.louver_stats()["attention"]["louver"] == 0
        assert first.louver_stats()["attention"]["louver"] > 0
        assert_nothing_missed(first.louver_stats())  # type: ignore[arg-type]


def test_save_and_load_state(model_path: str) -> None:
    with loaded(model_path) as llm:
        llm.eval(llm.tokenize(PROMPT.encode()))
        state = llm.save_state()
        tokens = llm.input_ids[: llm.n_tokens].tolist()
        first = text_of(llm(tokens, **GREEDY))
        llm("Something else, long enough to overwrite cells that the index knows. " * 15, **GREEDY)
        llm.load_state(state)
        assert text_of(llm(tokens, **GREEDY)) == first
        assert_nothing_missed(llm.louver_stats())  # type: ignore[arg-type]


def test_layers_on_both_sides(model_path: str) -> None:
    """Of 30 layers some have their cache on the GPU, which is too short for an index there; the CPU serves the others."""
    with loaded(model_path, n_gpu_layers=10, louver=replace(CONFIG, min_context_gpu=2**31 - 1)) as llm:
        n_decoded = llm(PROMPT, **GREEDY)["usage"]["completion_tokens"] - 1
        stats = llm.louver_stats()
    below = stats["reasons"]["stock"]["below_min_context"]
    assert below in (9 * n_decoded, 10 * n_decoded)  # llama.cpp counts the output as a layer
    assert stats["attention"]["louver"] == N_LAYER_REAL * n_decoded - below
    assert_nothing_missed(stats)  # type: ignore[arg-type]


def test_cache_in_host_memory(model_path: str) -> None:
    """llama.cpp copies it to the GPU, where stock attends to the copy, and the stats say so."""
    with loaded(model_path, offload_kqv=False) as llm:
        n = len(llm.tokenize(PROMPT.encode())) + llm(PROMPT, **GREEDY)["usage"]["completion_tokens"] - 1
        stats = llm.louver_stats()
    assert stats["attention"] == {"louver": 0, "dense": 0, "stock": n * N_LAYER_REAL}
    assert stats["reasons"]["stock"] == {"host_cache": n * N_LAYER_REAL}


@pytest.mark.skipif(len(_core.devices()) < 2, reason="needs two GPUs")
def test_two_gpus(model_path: str) -> None:
    """By layers: the pinned llama.cpp refuses to split rows between CUDA devices."""
    mode = llama_cpp.LLAMA_SPLIT_MODE_LAYER
    with loaded(model_path, split_mode=mode, tensor_split=[1.0, 1.0]) as llm:
        n_decoded = llm(PROMPT, **GREEDY)["usage"]["completion_tokens"] - 1
        stats = llm.louver_stats()
    assert stats["attention"]["louver"] == N_LAYER_REAL * n_decoded
    assert_nothing_missed(stats)  # type: ignore[arg-type]


# The command.


def test_info(model_path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json", "-m", model_path, "-ngl", "all"]) == 0
    output, errors = capsys.readouterr()
    found = json.loads(output)
    assert errors == ""
    assert found["cuda"]["built_in"] is True
    names = [device["name"] for device in _core.devices()]
    assert [device["name"] for device in found["cuda"]["devices"]] == names
    assert any(device["louver_serves"] for device in found["cuda"]["devices"])
    assert found["model"]["n_gpu_layers"] == -1
    assert found["model"]["attention_layers"] == {"louver": N_LAYER_REAL, "stock": {}}


def test_run(model_path: str, tmp_path: Path) -> None:
    stats_file = tmp_path / "stats.json"
    options = ["-ngl", "99", "-c", "1024", "-n", "16", "--temp", "0", "--check", "--stats", str(stats_file)]
    command = [sys.executable, "-m", "louver_llama.cli", "run", "-m", model_path, "-p", PROMPT, *options]
    shallow = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert shallow.returncode == 0 and "warning" not in shallow.stderr
    assert "below_min_context" in shallow.stderr
    served = subprocess.run([*command, "--min-context-gpu", "0"], capture_output=True, text=True, timeout=300)
    assert served.returncode == 0 and "0 missed" in served.stderr
    assert json.loads(stats_file.read_text())["attention"]["louver"] > 0


def test_bench(model_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-m", model_path, "-d", "512", "-n", "8", "-r", "2", "--quality", "8", "-o", "json"]
    states = ["--state-dir", str(tmp_path)]
    rows = {}
    for layers in ("99", "0"):
        assert main(["bench", *options, *states, "-ngl", layers, "--min-context-gpu", "0"]) == 0
        rows[layers] = {row["contender"]: row for row in json.loads(capsys.readouterr().out)}
    assert len(list(tmp_path.iterdir())) == 2  # a cache that the CPU filled is not one that a GPU did
    for row in rows["99"].values():
        assert row["backends"] == "CUDA" and row["n_gpu_layers"] == 99 and row["split_mode"] == "layer"
        assert all(device["name"] in row["gpu_info"] for device in _core.devices())
    assert set(rows["99"]["louver"]["attention"]) == {"louver"}
    assert set(rows["99"]["dense"]["attention"]) == {"dense"}
    assert rows["99"]["stock"]["kl_mean"] == 0 < rows["99"]["louver"]["kl_mean"]
    assert rows["0"]["louver"]["n_gpu_layers"] == 0
