"""The index follows the cache through its whole life: every step is checked by brute force and against stock.

The check (DecodeSettings::check) compares every visible key with what the index said of it, so an index that
describes keys which are no longer there is caught; the tests show that by making it stale on purpose.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import pytest

import tiny_models
from engine import Engine, Model, _core
from tiny_models import N_LAYER

SETTINGS = {"epsilon": 0.02, "min_context": 64, "sinks": 2, "recent": 8, "check": True}
N_HEAD = tiny_models.Heads().n_head
# Logits against stock's, root mean square over spread: epsilon and what stock itself loses by rounding Q (see
# test_shapes), on a cache that differs by as much from the second layer on. Measured are 0.012 and 0.10 at
# most; logits of another context differ by 1.4.
TOLERANCE = {"f16": 0.03, "f32": 0.03, "q8_0": 0.2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with Model(tiny_models.llama(tmp_path_factory.mktemp("lifecycle") / "model.gguf")) as loaded:
        yield loaded


def text(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, tiny_models.N_VOCAB, n).tolist()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a - b) ** 2)) / np.std(b))


def grow(engine: Engine, seed: int) -> np.ndarray:
    """A few steps of every sequence that has cells, in one batch each; returns all logits."""
    alive = [seq for seq in range(2) if engine.last(seq) >= 0]
    steps = [engine.step({seq: token + seq for seq in alive}) for token in text(seed, 6) if token < 99]
    return np.concatenate(steps)


# Events. Each is a generator that yields right before it rewrites cells whose keys the index knows.

Event = Callable[[Engine], Iterator[None]]


def append(engine: Engine) -> Iterator[None]:
    yield
    grow(engine, 10)


def remove_middle(engine: Engine) -> Iterator[None]:
    yield
    engine.remove(0, 60, 130)
    engine.extend(text(11, 90), 0)


def remove_tail(engine: Engine) -> Iterator[None]:
    yield
    engine.remove(0, 80)
    engine.extend(text(12, 100), 0)


def remove_tail_token_by_token(engine: Engine) -> Iterator[None]:
    yield
    engine.remove(0, 80)
    engine.generate(text(12, 40), 0)


def remove_sequence(engine: Engine) -> Iterator[None]:
    yield
    engine.remove(1)
    engine.extend(text(13, 120), 1)


def copy_sequence(engine: Engine) -> Iterator[None]:
    yield
    engine.remove(1)
    engine.copy(0, 1)
    grow(engine, 14)
    engine.generate(text(15, 30), 1)


def keep_sequence(engine: Engine) -> Iterator[None]:
    yield
    engine.keep(0)
    engine.remove(1)  # in a cache per sequence keep() leaves it alone
    engine.extend(text(16, 120), 1)


def shift(engine: Engine) -> Iterator[None]:
    yield
    engine.remove(0, 20, 70)
    engine.shift(0, 70, -1, -50)


def shift_up(engine: Engine) -> Iterator[None]:
    yield
    engine.shift(0, -1, -1, 9)


def divide(engine: Engine) -> Iterator[None]:
    yield
    engine.divide(0, -1, -1, 2)


def clear_data(engine: Engine) -> Iterator[None]:
    yield
    engine.clear(True)
    engine.extend(text(17, 200), 0)
    engine.extend(text(18, 100), 1)


def clear_cells(engine: Engine) -> Iterator[None]:
    yield
    engine.clear(False)
    engine.extend(text(17, 200), 0)
    engine.extend(text(18, 100), 1)


def restore(engine: Engine) -> Iterator[None]:
    state = engine.save()
    for _ in clear_cells(engine):
        pass
    grow(engine, 19)
    yield
    engine.restore(state)


def restore_sequence(engine: Engine) -> Iterator[None]:
    state = engine.save_sequence(0)
    for _ in remove_tail(engine):
        pass
    grow(engine, 20)
    yield
    engine.restore_sequence(state, 0)


def restore_as_another(engine: Engine) -> Iterator[None]:
    state = engine.save_sequence(0)
    grow(engine, 21)
    yield
    engine.restore_sequence(state, 1)


REWRITES = [
    remove_middle,
    remove_tail,
    remove_tail_token_by_token,
    remove_sequence,
    copy_sequence,
    keep_sequence,
    shift,
    shift_up,
    divide,
    clear_data,
    clear_cells,
    restore,
    restore_sequence,
    restore_as_another,
]


def tell(engine: Engine, event: Event, *, stale: bool = False) -> np.ndarray:
    """Two sequences, the event, and what they generate after it."""
    engine.extend(text(0, 200), 0)
    engine.extend(text(1, 130), 1)
    grow(engine, 2)
    for _ in event(engine):
        if engine.runtime:
            assert engine.pairs > 0
            assert engine.violations == 0
            engine.runtime.reset_stats()
            engine.runtime.set_stale(stale)
    return grow(engine, 3)


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("cache", ["f16", "q8_0", "f32"])
@pytest.mark.parametrize("event", [append, *REWRITES])
def test_event(model: Model, event: Event, cache: str, unified: bool) -> None:
    context = {"type_k": cache, "type_v": cache, "unified": unified, "n_seq_max": 2}
    context["n_ctx"] = 512 if unified else 1024
    with Engine(model, runtime=False, **context) as stock:
        expected = tell(stock, event)
    with Engine(model, **SETTINGS, **context) as louver:
        logits = tell(louver, event)
        counts = louver.stats
    assert counts["check"]["pairs"] == counts["keys_visible"] > 5000
    assert counts["check"]["misses"] == 0
    assert counts["check"]["bound_violations"] == 0
    assert counts["check"]["mass_violations"] == 0
    assert counts["keys_attended"] < 0.9 * counts["keys_visible"]
    assert set(counts["reasons"]["stock"]) <= {"prefill"}
    assert distance(logits, expected) < TOLERANCE[cache]


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize("event", REWRITES)
def test_event_with_a_stale_index_is_caught(model: Model, event: Event, cache: str, unified: bool) -> None:
    context = {"type_k": cache, "type_v": cache, "unified": unified, "n_seq_max": 2}
    context["n_ctx"] = 512 if unified else 1024
    with Engine(model, **SETTINGS, **context) as engine:
        tell(engine, event, stale=True)
        check = engine.stats["check"]
    assert check["misses"] + check["bound_violations"] > 0


def test_partial_copy_shares_cells(model: Model) -> None:
    """In a unified cache a copied prefix is the same cells: nothing is written, both sequences see them."""
    logits = []
    with Engine(model, **SETTINGS, n_seq_max=2, n_ctx=512) as louver:
        with Engine(model, runtime=False, n_seq_max=2, n_ctx=512) as stock:
            for engine in (louver, stock):
                engine.extend(text(0, 200), 0)
                engine.copy(0, 1, 0, 150)
                if engine is louver:
                    encoded = louver.stats["index"]["cells_encoded"]
                logits.append(grow(engine, 1))
        assert louver.violations == 0
        assert louver.stats["index"]["cells_encoded"] == encoded > 0
        steps = len(logits[0]) // 2
        visible = sum(n + step + 1 for n in (200, 150) for step in range(steps))
        assert louver.stats["keys_visible"] == louver.pairs == visible * N_LAYER * N_HEAD
    assert distance(*logits) < TOLERANCE["f16"]


# Several contexts.


@pytest.mark.parametrize("whole", [True, False], ids=["state", "sequence"])
@pytest.mark.parametrize("stale", [False, True], ids=["", "stale"])
def test_restore_into_another_context(model: Model, whole: bool, stale: bool) -> None:
    with ExitStack() as stack:
        source, target = (stack.enter_context(Engine(model, **SETTINGS)) for _ in range(2))
        source.extend(text(0, 300))
        source.generate(text(1, 3))
        target.extend(text(2, 310))
        target.generate(text(3, 3))
        assert target.pairs > 0
        target.runtime.set_stale(stale)
        if whole:
            target.restore(source.save())
        else:
            target.restore_sequence(source.save_sequence(0), 0)
        mine, yours = (engine.generate(text(4, 5)) for engine in (target, source))
        check = target.stats["check"]
    if stale:
        assert check["misses"] + check["bound_violations"] > 0
    else:
        assert sum(check.values()) == check["pairs"]
        assert distance(mine, yours) < 0.02  # the same cells; the grids of the two indexes differ


def run_story(engine: Engine, seed: int, steps: int = 40) -> np.ndarray:
    """A generation with a removal and a shift in it."""
    engine.extend(text(seed, 200))
    logits = [engine.generate(text(seed + 1, steps))]
    engine.remove(0, 30, 60)
    engine.shift(0, 60, -1, -30)
    logits.append(engine.generate(text(seed + 2, steps)))
    engine.remove(0, 150)
    engine.extend(text(seed + 3, 60))
    logits.append(engine.generate(text(seed + 4, steps)))
    return np.concatenate(logits)


def test_two_contexts_interleaved(model: Model) -> None:
    with ExitStack() as stack:
        alone = [run_story(stack.enter_context(Engine(model, **SETTINGS)), seed) for seed in (0, 100)]
        engines = [stack.enter_context(Engine(model, **SETTINGS)) for _ in range(2)]
        together: list[list[np.ndarray]] = [[], []]
        for i, engine in enumerate(engines):
            engine.extend(text(100 * i, 200))
        for tokens in zip(text(1, 40), text(101, 40), strict=True):
            for i, engine in enumerate(engines):
                together[i].append(engine.step({0: tokens[i]})[0])
        for i, engine in enumerate(engines):
            assert np.array_equal(np.stack(together[i]), alone[i][:40])
            assert engine.violations == 0
            assert engine.pairs == N_LAYER * N_HEAD * sum(range(201, 241))


def test_two_contexts_in_two_threads(model: Model) -> None:
    seeds = (0, 100)
    with ExitStack() as stack:
        engines = [stack.enter_context(Engine(model, **SETTINGS)) for _ in range(4)]
        alone = [run_story(engine, seed) for engine, seed in zip(engines[:2], seeds, strict=True)]
        together: list[np.ndarray | None] = [None, None]

        def work(i: int) -> None:
            together[i] = run_story(engines[2 + i], seeds[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(2):
            assert np.array_equal(together[i], alone[i])
            assert engines[2 + i].violations == 0
            assert engines[2 + i].stats == engines[i].stats
        assert not np.array_equal(alone[0], alone[1])


def test_a_context_is_freed_while_another_lives(model: Model) -> None:
    """Its successors, likely at its addresses, start with an index of their own."""
    with Engine(model, **SETTINGS) as survivor:
        survivor.extend(text(0, 200))
        reference = survivor.generate(text(1, 5))
        for round_ in range(6):
            # The runtime stays: an index that outlived its context would still be counted by it.
            with Engine(model, **SETTINGS) as engine:
                logits = run_story(engine, seed=1000 * round_)
                assert engine.violations == 0
                runtime, cells = engine.runtime, engine.stats["index"]["cells"]
            assert cells > 0
            assert runtime.stats()["index"]["cells"] == 0
            with Engine(model, runtime=False) as engine:
                assert distance(logits, run_story(engine, seed=1000 * round_)) < TOLERANCE["f16"]
            survivor.remove(0, 200)
            survivor.runtime.reset_stats()
            assert np.array_equal(survivor.generate(text(1, 5)), reference)
            assert survivor.violations == 0 < survivor.pairs


def test_a_runtime_goes_before_its_context(model: Model) -> None:
    """Then nobody owns the cache, until the next runtime finds it."""
    with Engine(model, **SETTINGS) as engine, Engine(model, runtime=False) as stock:
        for each in (engine, stock):
            each.extend(text(0, 200))
        engine.generate(text(1, 5))
        engine.runtime = None
        for each in (engine, stock):
            each.remove(0, 200)
        first = [each.generate(text(2, 5)) for each in (engine, stock)]
        assert np.array_equal(*first)
        engine.runtime = _core.Runtime(**SETTINGS)
        second = [each.generate(text(3, 5)) for each in (engine, stock)]
        assert engine.stats["attention"] == {"louver": 5 * N_LAYER, "dense": 0, "stock": 0}
        assert engine.violations == 0 < engine.pairs
        assert not np.array_equal(*second)
        assert distance(*second) < TOLERANCE["f16"]


# Settings.


def test_enabled_after_a_prefill_without(model: Model) -> None:
    with Engine(model, **SETTINGS) as engine, Engine(model, runtime=False) as stock:
        engine.runtime.configure(enabled=False)
        for each in (engine, stock):
            each.extend(text(0, 200))
        before = [each.generate(text(1, 5)) for each in (engine, stock)]
        assert np.array_equal(*before)
        assert engine.stats["index"]["cells"] == 0
        engine.runtime.configure(enabled=True)
        engine.runtime.reset_stats()
        after = [each.generate(text(2, 5)) for each in (engine, stock)]
        assert engine.stats["attention"]["louver"] == 5 * N_LAYER
        assert engine.violations == 0 < engine.pairs
        assert engine.stats["keys_attended"] < 0.9 * engine.stats["keys_visible"]
        assert distance(*after) < TOLERANCE["f16"]


@pytest.mark.parametrize("stale", [False, True], ids=["", "stale"])
def test_cells_rewritten_while_disabled(model: Model, stale: bool) -> None:
    with Engine(model, **SETTINGS) as engine:
        engine.extend(text(0, 200))
        engine.generate(text(1, 5))
        engine.runtime.configure(enabled=False)
        engine.runtime.set_stale(stale)
        engine.remove(0, 60)
        engine.extend(text(2, 140))
        engine.generate(text(3, 5))
        engine.runtime.configure(enabled=True)
        engine.runtime.reset_stats()
        engine.generate(text(4, 5))
        check = engine.stats["check"]
    assert check["pairs"] > 0
    assert (check["misses"] + check["bound_violations"] > 0) == stale
    assert stale or check["mass_violations"] == 0


def test_settings_change_between_steps(model: Model) -> None:
    random = np.random.default_rng(0)
    with Engine(model, **SETTINGS) as engine, Engine(model, runtime=False) as stock:
        for each in (engine, stock):
            each.extend(text(0, 300))
        paths = set()
        for token in text(1, 60):
            settings = {
                "epsilon": float(random.choice([0.0, 0.001, 0.02, 0.1])),
                "compensate": bool(random.integers(2)),
                "enabled": bool(random.random() < 0.9),
                "min_context": int(random.choice([1, 64, 320])),
                "sinks": int(random.choice([0, 4, 100])),
                "recent": int(random.choice([0, 1, 64, 1000])),
            }
            engine.runtime.configure(**settings)
            assert engine.runtime.config() == engine.runtime.config() | settings
            engine.runtime.reset_stats()
            logits = [each.step({0: token}) for each in (engine, stock)]
            counts = engine.stats
            n_visible = engine.last() + 1
            dense = "below_min_context" if n_visible < settings["min_context"] else "epsilon_zero"
            pruned = n_visible >= settings["min_context"] and settings["epsilon"] > 0
            path = "stock" if not settings["enabled"] else "louver" if pruned else "dense"
            paths.add(dense if path == "dense" else path)
            assert counts["attention"] == {"louver": 0, "dense": 0, "stock": 0} | {path: N_LAYER}
            assert engine.violations == 0
            assert counts["delta_max"] <= settings["epsilon"]
            assert (counts["check"]["pairs"] > 0) == (path == "louver")
            assert counts["reasons"]["dense"] == ({dense: N_LAYER} if path == "dense" else {})
            if path == "louver" and settings["recent"] >= n_visible:
                assert counts["keys_attended"] == counts["keys_visible"]
            assert distance(*logits) < TOLERANCE["f16"] + settings["epsilon"]
        assert paths == {"louver", "below_min_context", "epsilon_zero", "stock"}


# A random life.


@dataclass
class Cell:
    position: int
    seqs: set[int]


@dataclass
class Life:
    """Random events in Louver's engine and in stock's, and a model of the cells: what a query may see."""

    engines: tuple[Engine, Engine]  # Louver's first
    unified: bool
    capacity: int  # cells of a stream
    random: np.random.Generator
    cells: list[Cell] = field(default_factory=list)
    n_seq: int = 3
    worst: float = 0.0
    visible: int = 0  # (cell, query) pairs in decode so far
    saved: list[tuple] = field(default_factory=list)
    happened: set[str] = field(default_factory=set)

    def of(self, seq: int) -> list[Cell]:
        return [cell for cell in self.cells if seq in cell.seqs]

    def last(self, seq: int) -> int:
        return max((cell.position for cell in self.of(seq)), default=-1)

    def room(self, seq: int) -> int:
        return self.capacity - len(self.cells if self.unified else self.of(seq))

    def alive(self) -> list[int]:
        return [seq for seq in range(self.n_seq) if self.of(seq)]

    def tokens(self, n: int) -> list[int]:
        return self.random.integers(0, tiny_models.N_VOCAB, n).tolist()

    def span(self, seq: int) -> tuple[int, int]:
        low, high = sorted(self.random.integers(0, self.last(seq) + 2, 2).tolist())
        return low, high + 1

    def do(self, name: str, *arguments: object) -> None:
        for engine in self.engines:
            getattr(engine, name)(*arguments)

    def compare(self, louver: np.ndarray, stock: np.ndarray) -> None:
        self.worst = max(self.worst, distance(louver, stock))

    # Events: each returns False if it cannot happen now.

    def generate(self) -> bool:
        """A few steps of some of the sequences, one batch each."""
        seqs = [seq for seq in self.alive() if self.random.random() < 0.8]
        for _ in range(4):
            if not seqs or any(self.room(seq) < len(seqs) for seq in seqs):
                return False
            step = dict(zip(seqs, self.tokens(len(seqs)), strict=True))
            self.cells += [Cell(self.last(seq) + 1, {seq}) for seq in seqs]
            counts = [len(self.of(seq)) for seq in seqs]
            if max(counts) >= SETTINGS["min_context"]:
                # Short sequences beside a long one are served, densely and unchecked.
                self.visible += sum(n for n in counts if n >= SETTINGS["min_context"])
            self.compare(*(engine.step(step) for engine in self.engines))
        return True

    def prefill(self) -> bool:
        seq = int(self.random.integers(self.n_seq))
        n = int(self.random.integers(17, 90))
        if self.room(seq) < n:
            return False
        start = self.last(seq) + 1
        self.cells += [Cell(start + i, {seq}) for i in range(n)]
        tokens = self.tokens(n)
        self.compare(*(engine.extend(tokens, seq) for engine in self.engines))
        return True

    def remove(self) -> bool:
        seq = int(self.random.choice(self.alive()))
        first, end = self.span(seq)
        if self.random.random() < 0.5:
            end = self.last(seq) + 1
        self.do("remove", seq, first, end)
        for cell in self.of(seq):
            if first <= cell.position < end:
                cell.seqs.discard(seq)
        self._drop_empty()
        return True

    def copy(self) -> bool:
        source = int(self.random.choice(self.alive()))
        target = (source + 1) % self.n_seq
        self.do("remove", target)
        for cell in self.of(target):
            cell.seqs.discard(target)
        self._drop_empty()
        first, end = self.span(source) if self.unified else (-1, -1)
        self.do("copy", source, target, first, end)
        for cell in self.of(source):
            if not self.unified:
                self.cells.append(Cell(cell.position, {target}))
            elif first <= cell.position < end:
                cell.seqs.add(target)
        return True

    def keep(self) -> bool:
        seq = int(self.random.choice(self.alive()))
        if not self.unified or len(self.of(seq)) < 64:
            return False
        self.do("keep", seq)
        for cell in self.cells:
            cell.seqs &= {seq}
        self._drop_empty()
        return True

    def shift(self) -> bool:
        seq = int(self.random.choice(self.alive()))
        first, end = self.span(seq)
        delta = int(self.random.integers(-30, 31))
        self.do("shift", seq, first, end, delta)
        for cell in self.of(seq):
            if first <= cell.position < end:
                cell.position += delta
        self.cells = [cell for cell in self.cells if cell.position >= 0]
        return True

    def divide(self) -> bool:
        seq = int(self.random.choice(self.alive()))
        first, end = self.span(seq)
        self.do("divide", seq, first, end, 2)
        for cell in self.of(seq):
            if first <= cell.position < end:
                cell.position //= 2
        return True

    def clear(self) -> bool:
        if self.random.random() < 0.7:
            return False
        self.do("clear", bool(self.random.integers(2)))
        self.cells.clear()
        return True

    def save(self) -> bool:
        states = [engine.save() for engine in self.engines]
        self.saved.append((states, None, [Cell(c.position, set(c.seqs)) for c in self.cells]))
        return True

    def save_sequence(self) -> bool:
        seq = int(self.random.choice(self.alive()))
        states = [engine.save_sequence(seq) for engine in self.engines]
        self.saved.append((states, seq, [Cell(c.position, {seq}) for c in self.of(seq)]))
        return True

    def restore(self) -> bool:
        if not self.saved:
            return False
        states, seq, cells = self.saved.pop(int(self.random.integers(len(self.saved))))
        if seq is None:
            for engine, state in zip(self.engines, states, strict=True):
                engine.restore(state)
            self.cells = cells
            return True
        target = int(self.random.integers(self.n_seq))
        for cell in self.of(target):
            cell.seqs.discard(target)
        self._drop_empty()
        self.do("remove", target)
        if self.room(target) < len(cells):
            return False
        for engine, state in zip(self.engines, states, strict=True):
            engine.restore_sequence(state, target)
        self.cells += [Cell(cell.position, {target}) for cell in cells]
        return True

    def _drop_empty(self) -> None:
        self.cells = [cell for cell in self.cells if cell.seqs]

    def live(self, n_events: int) -> None:
        events = ["prefill", "remove", "copy", "keep", "shift", "divide", "clear"]
        events += ["save", "save_sequence", "restore", "restore"]
        for _ in range(n_events):
            event = str(self.random.choice(events)) if self.alive() else "prefill"
            if getattr(self, event)():
                self.happened.add(event)
            self.generate()
            for seq in range(self.n_seq):  # the model of the cells is right
                assert [engine.last(seq) for engine in self.engines] == [self.last(seq)] * 2


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_life(model: Model, seed: int, unified: bool, cache: str) -> None:
    capacity = 512
    context = {"type_k": cache, "type_v": cache, "unified": unified, "n_seq_max": 3}
    context["n_ctx"] = capacity if unified else 3 * capacity
    with Engine(model, **SETTINGS, **context) as louver, Engine(model, runtime=False, **context) as stock:
        life = Life((louver, stock), unified, capacity, np.random.default_rng(seed))
        life.live(60)
        check = louver.stats["check"]
        assert check["pairs"] == life.visible * N_LAYER * N_HEAD > 100_000
        assert check["misses"] == 0
        assert check["bound_violations"] == 0
        assert check["mass_violations"] == 0
        assert life.worst < TOLERANCE[cache]
        assert len(life.happened) >= 8


@pytest.mark.parametrize("unified", [True, False], ids=["unified", "streams"])
def test_random_life_with_a_stale_index_is_caught(model: Model, unified: bool) -> None:
    context = {"unified": unified, "n_seq_max": 3, "n_ctx": 512 if unified else 1536}
    with Engine(model, **SETTINGS, **context) as louver, Engine(model, runtime=False, **context) as stock:
        louver.runtime.set_stale(True)
        life = Life((louver, stock), unified, 512, np.random.default_rng(0))
        life.live(20)
        check = louver.stats["check"]
        assert check["misses"] + check["bound_violations"] > 100
        assert life.worst > TOLERANCE["f16"]
