"""Which attention Louver serves, for every shape and cache type, and which it leaves to stock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import tiny_models
from engine import Engine, Model, Tap, _core
from tiny_models import N_LAYER, SHARPNESS, Heads

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 7, 8)
# Keys, values.
CACHES = ("f16 f16", "bf16 bf16", "f32 f32", "q8_0 q8_0", "q8_0 f16", "f16 bf16", "q4_0 q4_0", "q8_0 q4_0")
EPSILON = 0.02
N_STEPS = 3
PREFILL = (300, 150)  # tokens of the two sequences
SETTINGS = {"min_context": 64, "sinks": 2, "recent": 16, "check": True}

# How far stock's logits may be from those of exact attention, as a share of the logits' spread. Stock rounds
# Q to the type it multiplies K in, which moves a score by SHARPNESS times the rounding's relative size: half
# a unit of float16's 11 bits or bfloat16's 8, or of the 127 steps that the largest of 32 elements (2.5 times
# their spread) is divided into, over sqrt(3) each. Its float16 accumulator of V adds less. Twice is allowed.
ROUNDING = {"f16": 2.0**-11, "f32": 2.0**-11, "bf16": 2.0**-8, "q8_0": 2.5 / 127 / 2, "q4_0": 2.5 / 127 / 2}
# An attention output against float64, as a share of the longest value. Louver computes in float32 and is off
# by 1e-6 at most, stock by 1e-4 to 2e-2.
EXACT = 1e-5


def tolerance(type_k: str) -> float:
    return 2 * SHARPNESS * ROUNDING[type_k] / np.sqrt(3)


def cases() -> list[tuple[int, int, str, bool]]:
    """Every two of head size, group size, cache types and layout meet; not every combination of all four."""
    return [
        (head_dim, group, types, (i + j + k) % 4 == 0)
        for i, head_dim in enumerate(HEAD_DIMS)
        for j, group in enumerate(GROUPS)
        for k, types in enumerate(CACHES)
        if (i + j + k) % 2 == 0
        if head_dim % 32 == 0 or "q" not in types  # llama.cpp refuses the others
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Path]:
    """Write, once each, a model with the head size and the group size."""
    folder = tmp_path_factory.mktemp("shapes")

    def path(head_dim: int, group: int) -> Path:
        file = folder / f"{head_dim}x{group}.gguf"
        n_head_kv = 1 if group >= 7 else 2
        if not file.exists():
            tiny_models.llama(file, Heads(head_dim, group * n_head_kv, n_head_kv))
        return file

    return path


@pytest.fixture(scope="module")
def plain(tiny: Callable[[int, int], Path]) -> Iterator[Model]:
    with Model(tiny(64, 2)) as model:
        yield model


def random_tokens(n: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, tiny_models.N_VOCAB, n).tolist()


def fill(engine: Engine) -> None:
    for seq, n in enumerate(PREFILL):
        engine.extend(random_tokens(n, seed=seq), seq)


def run(engine: Engine, tap: Tap | None = None) -> np.ndarray:
    """Both sequences, step by step, on top of the prefill; the tap hears the last step."""
    for seq, n in enumerate(PREFILL):
        engine.remove(seq, n)
    logits = []
    for step, token in enumerate(random_tokens(N_STEPS, seed=9)):
        if tap is not None and step == N_STEPS - 1:
            tap.listen()
        logits.append(engine.step({0: token, 1: token + 1 if token < 99 else 0}))
    if tap is not None:
        tap.listening = False
    return np.stack(logits)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)) / np.std(b))


def error_bounds(engine: Engine) -> np.ndarray:
    """Of the last step's certificates, (layer, query, head): the order in which a tap hears them."""
    last = engine.stats["last_step"]
    bounds = [[head["error_bound"] for head in entry["heads"]] for entry in last]
    return np.array(bounds).reshape(N_LAYER, -1, len(bounds[0]))


@pytest.mark.parametrize(("head_dim", "group", "types", "unified"), cases())
def test_served(
    tiny: Callable[[int, int], Path], head_dim: int, group: int, types: str, unified: bool
) -> None:
    type_k, type_v = types.split()
    tap = Tap()
    context = {
        "n_ctx": 512 if unified else 1024,
        "n_seq_max": 2,
        "unified": unified,
        "type_k": type_k,
        "type_v": type_v,
        "n_threads": 1 + group % 3,
    }
    with Model(tiny(head_dim, group)) as model:
        with Engine(model, runtime=False, **context) as engine:
            fill(engine)
            stock = run(engine)
            # The control of the comparison: a third of the cells is lost.
            for seq, n in enumerate(PREFILL):
                engine.remove(seq, n // 3, 2 * n // 3)
            lost = run(engine)
        with Engine(model, tap=tap, **SETTINGS, **context) as engine:
            fill(engine)
            runtime = engine.runtime

            runtime.configure(epsilon=EPSILON)
            runtime.reset_stats()
            pruned = run(engine, tap)
            counts = engine.stats
            pruned_errors = np.stack([e.reshape(-1, e.shape[-1]) for e in tap.errors])
            bounds = error_bounds(engine)

            runtime.configure(epsilon=0)
            runtime.reset_stats()
            dense = run(engine, tap)
            dense_counts = engine.stats
            dense_errors = np.stack([e.reshape(-1, e.shape[-1]) for e in tap.errors])
    n_query = 2 * N_STEPS * N_LAYER
    n_head = bounds.shape[-1]
    visible = N_LAYER * n_head * sum(n + step + 1 for n in PREFILL for step in range(N_STEPS))
    assert counts["attention"] == {"louver": n_query, "dense": 0, "stock": 0}
    assert counts["n_queries"] == n_query * n_head
    assert counts["keys_visible"] == counts["check"]["pairs"] == visible
    assert counts["keys_attended"] < 0.98 * visible
    assert counts["check"]["misses"] == 0
    assert counts["check"]["bound_violations"] == 0
    assert counts["check"]["mass_violations"] == 0
    assert 0 < counts["delta_max"] <= EPSILON

    assert dense_counts["attention"] == {"louver": 0, "dense": n_query, "stock": 0}
    assert dense_counts["reasons"]["dense"] == {"epsilon_zero": n_query}
    assert dense_counts["keys_attended"] == dense_counts["keys_visible"] == visible

    exact = EXACT * tap.longest_value
    assert dense_errors.max() <= exact
    assert np.all(pruned_errors <= bounds + exact)
    # Something was lost: the bound was needed. (At 256 channels random keys hardly prune.)
    assert pruned_errors.max() > (exact if head_dim < 256 else dense_errors.max())

    assert distance(dense, stock) <= tolerance(type_k)
    assert distance(pruned, stock) <= tolerance(type_k) + EPSILON
    assert distance(lost, stock) > tolerance(type_k) + EPSILON


def compare_with_stock(
    path: Path, settings: dict[str, float] | None = None, **context: str | bool
) -> tuple[np.ndarray, np.ndarray, dict]:
    """Logits of Louver and of stock for the same 4 tokens, and Louver's counts, prefill included."""
    logits = []
    with Model(path) as model:
        for runtime, extra in ((False, {}), (True, SETTINGS | (settings or {}))):
            with Engine(model, runtime=runtime, n_batch=256, **extra, **context) as engine:
                engine.extend(random_tokens(PREFILL[0]))
                logits.append(engine.generate([1, 2, 3, 4]))
                if runtime:
                    counts = engine.stats
    return logits[1], logits[0], counts


PREFILLED = N_LAYER * PREFILL[0]
DECODED = N_LAYER * 4


@pytest.mark.parametrize(
    ("write", "reason", "context"),
    [
        (tiny_models.bloom, "alibi", {}),
        (lambda path: tiny_models.gemma(path, soft_cap=True, window=64), "soft_cap", {}),
        (tiny_models.gpt_oss, "sinks", {}),
        (tiny_models.deepseek2, "mla", {}),
        (tiny_models.llama, "cache_type", {"type_k": "q5_0"}),
        (tiny_models.llama, "cache_type", {"type_v": "iq4_nl"}),
        (tiny_models.llama, "disabled", {"settings": {"enabled": False}}),
    ],
    ids=["alibi", "soft_cap", "sinks", "mla", "q5_0_keys", "iq4_nl_values", "disabled"],
)
def test_left_to_stock(tmp_path: Path, write: Callable, reason: str, context: dict) -> None:
    louver, stock, counts = compare_with_stock(write(tmp_path / "model.gguf"), **context)
    assert np.array_equal(louver, stock)
    assert np.isfinite(stock).all()
    assert counts["attention"] == {"louver": 0, "dense": 0, "stock": PREFILLED + DECODED}
    assert counts["reasons"]["stock"] == {reason: PREFILLED + DECODED}


def test_served_is_not_bit_identical(tmp_path: Path) -> None:
    """The control of the comparison above: the same model, and Louver serves it."""
    louver, stock, counts = compare_with_stock(tiny_models.llama(tmp_path / "model.gguf"))
    assert not np.array_equal(louver, stock)
    assert counts["attention"] == {"louver": DECODED, "dense": 0, "stock": PREFILLED}
    assert counts["reasons"]["stock"] == {"prefill": PREFILLED}


def test_without_flash_attention(tmp_path: Path) -> None:
    louver, stock, counts = compare_with_stock(tiny_models.llama(tmp_path / "model.gguf"), flash_attn=False)
    assert np.array_equal(louver, stock)
    assert counts["attention"] == {"louver": 0, "dense": 0, "stock": 0}


@pytest.mark.parametrize(
    "heads",
    [Heads(2, 4, 2), Heads(6, 4, 4), Heads(32, 2, 2), Heads(40, 5, 1), Heads(72, 16, 1), Heads(112, 12, 3)],
    ids=lambda heads: f"{heads.head_dim}x{heads.n_head}over{heads.n_head_kv}",
)
def test_other_shapes_are_served(tmp_path: Path, heads: Heads) -> None:
    check_served(tiny_models.llama(tmp_path / "model.gguf", heads))


def test_values_of_another_size_than_keys_are_served(tmp_path: Path) -> None:
    check_served(tiny_models.deepseek2(tmp_path / "model.gguf", latent=False))


def check_served(path: Path) -> None:
    louver, stock, counts = compare_with_stock(path)
    assert counts["attention"] == {"louver": DECODED, "dense": 0, "stock": PREFILLED}
    assert sum(counts["check"].values()) == counts["check"]["pairs"] == counts["keys_visible"] > 0
    assert distance(louver, stock) <= tolerance("f16") + EPSILON


class Window:
    """Errors of both layers' attention at the last of several steps, and Louver's counts."""

    def __init__(
        self, model: Model, n_steps: int, runtime: bool | _core.Runtime, **context: bool | int
    ) -> None:
        tap = Tap()
        settings = SETTINGS if runtime is True else {}
        with Engine(model, runtime=runtime, n_batch=256, tap=tap, **settings, **context) as engine:
            engine.extend(random_tokens(PREFILL[0]))
            engine.generate(random_tokens(n_steps - 1, seed=1))
            tap.listen()
            engine.generate([1])
            self.errors = tap.errors
            self.exact = EXACT * tap.longest_value
            self.counts = engine.stats if runtime else {}


def test_sliding_window_is_left_to_stock(tmp_path: Path) -> None:
    """The first layer has a window of 64 cells, and a cache of its own: its output is bit for bit stock's."""
    with Model(tiny_models.gemma(tmp_path / "model.gguf", soft_cap=False, window=64)) as model:
        stock, louver = (Window(model, 4, runtime) for runtime in (False, True))
    # The first layer's inputs are the same in both, so equal errors are equal outputs.
    assert np.array_equal(stock.errors[0], louver.errors[0])
    assert not np.array_equal(stock.errors[1], louver.errors[1])
    prefill = PREFILL[0]
    assert louver.counts["attention"] == {"louver": 4, "dense": 0, "stock": 2 * prefill + 4}
    assert louver.counts["reasons"]["stock"] == {"prefill": prefill, "sliding_window": prefill + 4}


@pytest.mark.parametrize("full", [True, False], ids=["full_cache", "unknown_cache"])
def test_sliding_window_as_a_mask(tmp_path: Path, full: bool) -> None:
    """A window in a full cache, or in one of unknown size that wraps around, is a mask like any other."""
    n_steps = 4 if full else 400
    runtime = True if full else _core.Runtime(**SETTINGS)  # which is not told the context's size
    with Model(tiny_models.gemma(tmp_path / "model.gguf", soft_cap=False, window=128)) as model:
        window = Window(model, n_steps, runtime, swa_full=full)
    counts = window.counts
    assert counts["attention"] == {"louver": 2 * n_steps, "dense": 0, "stock": 2 * PREFILL[0]}
    n_head = Heads().n_head
    visible = sum(128 + PREFILL[0] + step + 1 for step in range(n_steps)) * n_head
    assert sum(counts["check"].values()) == counts["check"]["pairs"] == counts["keys_visible"] == visible
    for errors, entry in zip(window.errors, counts["last_step"], strict=True):
        bounds = [head["error_bound"] for head in entry["heads"]]
        assert np.all(errors.reshape(-1) <= np.array(bounds) + window.exact)


def test_short_contexts_are_attended_whole(plain: Model) -> None:
    """Below min_context our own dense kernel runs, and from there on Louver."""
    tap = Tap()
    with Engine(plain, tap=tap, **SETTINGS | {"min_context": PREFILL[0] + 3}) as engine:
        engine.extend(random_tokens(PREFILL[0]))
        tap.listen()
        engine.generate([1, 2])
        errors = np.stack(tap.errors)
        short = engine.stats
        engine.generate([3, 4])
        counts = engine.stats
    assert errors.max() <= EXACT * tap.longest_value
    assert short["attention"] == {"louver": 0, "dense": 2 * N_LAYER, "stock": PREFILLED}
    assert (
        short["keys_attended"] == short["keys_visible"] == 2 * (PREFILL[0] + 1.5) * N_LAYER * Heads().n_head
    )
    assert (short["keys_scanned"], short["delta_max"], short["error_bound_max"]) == (0, 0, 0)
    assert all(entry["path"] == "dense" for entry in short["last_step"])
    assert counts["attention"] == {"louver": 2 * N_LAYER, "dense": 2 * N_LAYER, "stock": PREFILLED}
    assert counts["reasons"] == {
        "dense": {"below_min_context": 2 * N_LAYER},
        "stock": {"prefill": PREFILLED},
    }


@pytest.mark.parametrize("n_tokens", [1, 2, 5, 16, 17])
def test_several_tokens_at_once(tmp_path: Path, n_tokens: int) -> None:
    """Up to 16 tokens of a sequence are Louver's, each with the cells before it; more are prefill."""
    context = random_tokens(PREFILL[0])
    tokens = random_tokens(n_tokens, seed=1)
    logits = []
    with Model(tiny_models.llama(tmp_path / "model.gguf")) as model:
        for settings in ({"runtime": False}, {"epsilon": 0.0}, {"epsilon": EPSILON}):
            with Engine(model, **({} if "runtime" in settings else SETTINGS), **settings) as engine:
                engine.extend(context)
                if engine.runtime:
                    engine.runtime.reset_stats()
                start = len(context)
                logits.append(engine.decode(tokens, range(start, start + n_tokens), [0] * n_tokens))
                if engine.runtime:
                    counts = engine.stats
    stock, dense, pruned = logits
    served = n_tokens <= 16
    assert counts["attention"]["louver"] == (n_tokens * N_LAYER if served else 0)
    assert counts["attention"]["stock"] == (0 if served else n_tokens * N_LAYER)
    assert np.array_equal(pruned, stock) == (not served)
    assert distance(dense, stock) <= tolerance("f16")
    assert distance(pruned, stock) <= tolerance("f16") + EPSILON
    if served:
        assert counts["check"]["pairs"] == N_LAYER * 4 * sum(PREFILL[0] + i + 1 for i in range(n_tokens))
        assert sum(counts["check"].values()) == counts["check"]["pairs"]


def test_prefill_in_small_batches(tmp_path: Path) -> None:
    """Of 8 tokens each: Louver's from the first token on, with every query seeing the cells before it."""
    tokens = random_tokens(200)
    with Model(tiny_models.llama(tmp_path / "model.gguf")) as model:
        with Engine(model, n_batch=8, **SETTINGS | {"min_context": 1}) as engine:
            louver = engine.extend(tokens)
            counts = engine.stats
        with Engine(model, n_batch=8, runtime=False) as engine:
            stock = engine.extend(tokens)
    assert counts["attention"] == {"louver": 200 * N_LAYER, "dense": 0, "stock": 0}
    assert counts["check"]["pairs"] == N_LAYER * Heads().n_head * sum(range(1, 201))
    assert sum(counts["check"].values()) == counts["check"]["pairs"]
    assert distance(louver, stock) <= tolerance("f16") + EPSILON


@dataclass
class Batch:
    """One decode of several tokens: against float64, and what was counted."""

    errors: np.ndarray  # (layer, query, head)
    bounds: np.ndarray
    exact: float
    counts: dict
    visible: dict[tuple[int, int], int]  # (stream, token): cells it sees

    @classmethod
    def of(
        cls, model: Model, setup: Callable[[Engine], None], seqs: list[int], **context: bool | float
    ) -> Batch:
        tap = Tap()
        with Engine(model, tap=tap, **SETTINGS | {"epsilon": EPSILON} | context) as engine:
            setup(engine)
            engine.runtime.reset_stats()
            tap.listen()
            ahead = dict.fromkeys(seqs, 0)
            positions = []
            for seq in seqs:
                ahead[seq] += 1
                positions.append(engine.last(seq) + ahead[seq])
            engine.decode(random_tokens(len(seqs), seed=7), positions, seqs)
            counts = engine.stats
            errors = np.stack([e.reshape(-1, e.shape[-1]) for e in tap.errors])
            bounds = error_bounds(engine)
        visible = {(e["stream"], e["token"]): e["heads"][0]["n_visible"] for e in counts["last_step"]}
        return cls(errors, bounds, EXACT * tap.longest_value, counts, visible)

    def check(self) -> None:
        assert np.all(self.errors <= self.bounds + self.exact)
        assert self.errors.max() > self.exact  # something was lost: the bounds were needed
        check = self.counts["check"]
        assert sum(check.values()) == check["pairs"] > 0
        assert 0 < self.counts["delta_max"] <= EPSILON
        assert self.counts["reasons"]["stock"] == {}


def lengths(*n: int) -> Callable[[Engine], None]:
    """Sequences of so many tokens."""

    def setup(engine: Engine) -> None:
        for seq, length in enumerate(n):
            engine.extend(random_tokens(length, seed=seq), seq)

    return setup


def test_speculative_batch(plain: Model) -> None:
    """Five tokens at the end of a context, each after the one before."""
    batch = Batch.of(plain, lengths(300), [0] * 5)
    batch.check()
    assert batch.counts["attention"] == {"louver": 5 * N_LAYER, "dense": 0, "stock": 0}
    assert batch.visible == {(0, token): 301 + token for token in range(5)}


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_three_sequences_in_a_batch(plain: Model, unified: bool) -> None:
    """They see nothing in common."""
    context = {"n_seq_max": 3, "unified": unified, "n_ctx": 1024 if unified else 3 * 512}
    batch = Batch.of(plain, lengths(300, 150, 220), [0, 1, 2], **context)
    batch.check()
    assert batch.counts["attention"] == {"louver": 3 * N_LAYER, "dense": 0, "stock": 0}
    assert list(batch.visible.values()) == [301, 151, 221]


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_several_tokens_of_several_sequences(plain: Model, unified: bool) -> None:
    """Speculation for three sequences at once; in turn, so that neighbours in the batch see nothing alike."""
    context = {"n_seq_max": 3, "unified": unified, "n_ctx": 1024 if unified else 3 * 512}
    for seqs in ([0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2, 0, 1, 2, 0, 1, 2]):
        batch = Batch.of(plain, lengths(300, 150, 220), seqs, **context)
        batch.check()
        assert batch.counts["attention"] == {"louver": 9 * N_LAYER, "dense": 0, "stock": 0}
        seen = [301, 302, 303, 151, 152, 153, 221, 222, 223]
        assert sorted(batch.visible.values()) == sorted(seen)


def test_sequences_with_a_common_prefix(plain: Model) -> None:
    """Their cells are the same but for the last ones: one scan serves all."""

    def setup(engine: Engine) -> None:
        engine.extend(random_tokens(250))
        for seq in (1, 2):
            engine.copy(0, seq)
            engine.extend(random_tokens(20 * seq, seed=seq), seq)

    batch = Batch.of(plain, setup, [0, 1, 2], n_seq_max=3)
    batch.check()
    assert list(batch.visible.values()) == [251, 271, 291]


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_short_and_long_sequences_in_a_batch(plain: Model, unified: bool) -> None:
    """Each is attended as it would be alone."""
    context = {"n_seq_max": 4, "unified": unified, "n_ctx": 1024 if unified else 4 * 512}
    batch = Batch.of(plain, lengths(300, 40, 220, 20), [0, 1, 2, 3], **context)
    batch.check()
    assert batch.counts["attention"] == {"louver": 2 * N_LAYER, "dense": 2 * N_LAYER, "stock": 0}
    assert batch.counts["reasons"]["dense"] == {"below_min_context": 2 * N_LAYER}
    paths = [entry["path"] for entry in batch.counts["last_step"]]
    assert paths == ["louver", "dense", "louver", "dense"] * N_LAYER
    assert batch.counts["check"]["pairs"] == (301 + 221) * N_LAYER * Heads().n_head
    assert batch.errors[:, [1, 3]].max() <= batch.exact
    assert not batch.bounds[:, [1, 3]].any()


# KV heads whose attention is uniform are not scanned for a while.


UNIFORM = {"epsilon": 0.05, "min_context": 64, "sinks": 2, "recent": 8}
STEPS_WITHOUT_SCAN = 31


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(tiny_models.llama(tmp_path_factory.mktemp("uniform") / "model.gguf", sharpness=0.1)) as model:
        yield model


def scanned(engine: Engine) -> list[bool]:
    """Whether the last step scanned, for each layer, query and head."""
    heads = [head for entry in engine.stats["last_step"] for head in entry["heads"]]
    for head in heads:
        if head["n_scanned"] == 0:
            assert head["n_attended"] == head["n_visible"]
            assert (head["delta"], head["error_bound"], head["tau"]) == (0, 0, -np.inf)
    return [head["n_scanned"] > 0 for head in heads]


def test_uniform_heads_are_not_scanned(uniform: Model) -> None:
    n_head = N_LAYER * Heads().n_head
    tap = Tap()
    tokens = random_tokens(STEPS_WITHOUT_SCAN + 3, seed=1)
    with Engine(uniform, tap=tap, **UNIFORM) as engine:
        engine.extend(random_tokens(300))
        logits = []
        for step, token in enumerate(tokens):
            tap.listen()
            logits.append(engine.step({0: token})[0])
            assert scanned(engine) == [step % (STEPS_WITHOUT_SCAN + 1) == 0] * n_head
            assert step in (0, STEPS_WITHOUT_SCAN + 1) or np.max(tap.errors) <= EXACT * tap.longest_value
        counts = engine.stats
        assert counts["heads_uniform"] == n_head * (STEPS_WITHOUT_SCAN + 1)
        assert counts["attention"]["louver"] == N_LAYER * len(tokens)

        # Another epsilon, or the check, wants a scan.
        engine.runtime.configure(epsilon=0.1)
        engine.step({0: 1})
        assert all(scanned(engine))
        engine.step({0: 1})
        assert not any(scanned(engine))
        engine.runtime.configure(check=True)
        for _ in range(2):
            engine.step({0: 1})
            assert all(scanned(engine))
        assert engine.violations == 0 < engine.pairs
    with Engine(uniform, **UNIFORM | {"epsilon": 0.0}) as engine:
        engine.extend(random_tokens(300))
        dense = engine.generate(tokens)
        assert engine.stats["heads_uniform"] == 0
    assert distance(np.stack(logits), dense) <= tolerance("f16") + UNIFORM["epsilon"]


def test_uniform_heads_are_scanned_under_check(uniform: Model) -> None:
    with Engine(uniform, **UNIFORM, check=True) as engine:
        engine.extend(random_tokens(300))
        for token in random_tokens(4, seed=1):
            engine.step({0: token})
            assert all(scanned(engine))
        assert engine.stats["heads_uniform"] == 0
        assert engine.violations == 0


def test_concentrated_heads_are_scanned(plain: Model) -> None:
    with Engine(plain, **UNIFORM) as engine:
        engine.extend(random_tokens(400))
        for token in random_tokens(4, seed=1):
            engine.step({0: token})
            assert all(scanned(engine))
        assert engine.stats["heads_uniform"] == 0


@pytest.mark.parametrize("n_tokens", [2, 5, 16])
def test_uniform_heads_in_steps_of_several_tokens(uniform: Model, n_tokens: int) -> None:
    """A step counts once, however many tokens it has."""
    n_head = N_LAYER * Heads().n_head * n_tokens
    with Engine(uniform, n_seq_max=2, n_ctx=2048, **UNIFORM) as engine:
        engine.extend(random_tokens(300))
        engine.runtime.reset_stats()
        without_scan = 0
        for step in range(2 * STEPS_WITHOUT_SCAN + 4):
            start = engine.last() + 1
            engine.decode(random_tokens(n_tokens, step), range(start, start + n_tokens), [0] * n_tokens)
            engine.remove(0, start)
            assert scanned(engine) == [step % (STEPS_WITHOUT_SCAN + 1) == 0] * n_head
            without_scan += step % (STEPS_WITHOUT_SCAN + 1) != 0
        assert engine.stats["heads_uniform"] == n_head * without_scan


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_more_sequences_than_tokens_of_a_batch(tmp_path: Path, unified: bool) -> None:
    """20 sequences: 20 tokens of one stream are too many, one of each of 20 streams are not."""
    context = {"n_seq_max": 20, "unified": unified, "n_ctx": 20 * 256}
    logits = []
    with Model(tiny_models.llama(tmp_path / "model.gguf")) as model:
        for runtime in (False, True):
            with Engine(model, runtime=runtime, **context, **(SETTINGS if runtime else {})) as engine:
                for seq in range(20):
                    engine.extend(random_tokens(70 + seq, seed=seq), seq)
                if runtime:
                    engine.runtime.reset_stats()
                logits.append(engine.step(dict.fromkeys(range(20), 5)))
                if runtime:
                    counts = engine.stats
    stock, louver = logits
    if unified:
        assert counts["reasons"]["stock"] == {"prefill": 20 * N_LAYER}
        assert np.array_equal(louver, stock)
    else:
        assert counts["attention"] == {"louver": 20 * N_LAYER, "dense": 0, "stock": 0}
        assert counts["check"]["pairs"] == N_LAYER * Heads().n_head * sum(range(71, 91))
        assert sum(counts["check"].values()) == counts["check"]["pairs"]
        assert distance(louver, stock) <= tolerance("f16") + EPSILON


def test_a_cache_without_a_runtime_is_stocks(tmp_path: Path) -> None:
    """Nobody's cache stays nobody's, also while a runtime of another context is alive."""
    with Model(tiny_models.llama(tmp_path / "model.gguf")) as model:
        with Engine(model, **SETTINGS) as owned, Engine(model, runtime=False) as free:
            for engine in (owned, free):
                engine.extend(random_tokens(PREFILL[0]))
            served, stock = (engine.generate([1, 2, 3]) for engine in (owned, free))
            assert owned.stats["attention"]["louver"] == 3 * N_LAYER
        with Engine(model, runtime=False) as alone:
            alone.extend(random_tokens(PREFILL[0]))
            assert np.array_equal(alone.generate([1, 2, 3]), stock)
    assert not np.array_equal(served, stock)
