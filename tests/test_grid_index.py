"""The grid index: what it stores bounds the keys and values; nothing stale or not finite is indexed."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from reference import BLOCK, Float, Stored, core, from_bits, indexed_cells, padded, repair_all, to_bits

ALL = 2**64 - 1
MAX_MISFITS = 4  # kMaxMisfits in grid_index.cpp: more than these, and a block is rebuilt


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2)


def normal(rng: np.random.Generator, *shape: int) -> Float:
    return rng.normal(size=shape).astype(np.float32)


def check_block(index: core.GridIndex, block: int, keys: Float, values: Float | None) -> None:
    """Everything that is promised of a block with keys (n, dim) and values (n, dim) as stored."""
    cells = np.flatnonzero(from_bits([index.indexed(block)])) + block * BLOCK
    if cells.size == 0:
        return
    bounds = index.bounds(block)
    exact = keys[cells].astype(np.float64)
    assert np.isfinite(exact).all()
    codes = index.codes(block)[cells % BLOCK].astype(np.float64) - 128
    center, step = index.center(block).astype(np.float64), index.step(block).astype(np.float64)
    # The product is exact in float64; the sum rounds by 2^-53.
    residual = np.linalg.norm(exact - (center + step * codes), axis=1)
    assert residual.max() <= bounds.residual_norm
    assert np.linalg.norm(codes, axis=1).max() <= bounds.code_norm
    assert np.linalg.norm(exact, axis=1).max() <= bounds.key_norm
    assert np.linalg.norm(center) <= bounds.center_norm
    if values is not None:
        assert np.isfinite(values[cells]).all()
        assert np.linalg.norm(values[cells].astype(np.float64), axis=1).max() <= bounds.value_norm
        assert np.linalg.norm(index.value_mean(block).astype(np.float64)) <= bounds.value_norm


def check(index: core.GridIndex, keys: Stored, values: Stored | None = None) -> None:
    k, v = keys.decoded()[:, 0], values.decoded()[:, 0] if values else None
    for block in range(index.n_blocks):
        check_block(index, block, k, v)


# Building


@pytest.mark.parametrize("dim", [1, 3, 16, 63, 64, 80, 96, 127, 128, 256, 1000, 1024])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 200])
def test_build_bounds_everything(rng: np.random.Generator, dim: int, n: int) -> None:
    keys, values = Stored.of(normal(rng, n, dim) + 3), Stored.of(normal(rng, n, dim))
    index = core.GridIndex(dim, dim, n)
    assert index.n_blocks == math.ceil(n / BLOCK) and index.built_blocks == 0 and index.bytes == 0
    assert repair_all(index, np.ones(n, bool), keys, values) == n
    assert indexed_cells(index)[:n].all() and index.indexed_cells == n
    assert index.built_blocks == index.n_blocks and index.bytes == index.n_blocks * index.block_bytes
    check(index, keys, values)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "q8_0"])
@pytest.mark.parametrize("gap", [0, 3])
def test_build_from_every_cache_type(rng: np.random.Generator, dtype: str, gap: int) -> None:
    n, n_head, dim = 130, 3, 96
    keys = Stored.of(normal(rng, n, n_head, dim), dtype, gap)
    values = Stored.of(normal(rng, n, n_head, 64), dtype, gap)
    for head in range(n_head):
        index = core.GridIndex(dim, 64, n)
        assert repair_all(index, np.ones(n, bool), keys, values, head) == n
        for block in range(index.n_blocks):
            check_block(index, block, keys.decoded()[:, head], values.decoded()[:, head])


def test_the_grid_is_fine_and_covers_the_keys(rng: np.random.Generator) -> None:
    keys = Stored.of(normal(rng, 64, 80))
    index = core.GridIndex(80, 0, 64)
    assert index.repair(0, ALL, keys.cache) == (64, True)
    x = keys.decoded()[:, 0]
    step = index.step(0)
    extent = x.max(0) - x.min(0)
    # Half the extent in 127 steps; bfloat16 rounds the centre, and the step upward.
    assert (step <= extent / 254 * 1.05).all()
    assert (np.abs(index.center(0) - (x.max(0) + x.min(0)) / 2) <= extent / 256).all()
    decoded = index.center(0) + step * (index.codes(0).astype(np.float32) - 128)
    assert (np.abs(decoded - x) <= step * 0.501).all()
    assert index.bounds(0).residual_norm <= np.linalg.norm(step) * 0.501


def test_mean_of_the_values(rng: np.random.Generator) -> None:
    n, dim = 100, 48
    keys, values = Stored.of(normal(rng, n, dim)), Stored.of(normal(rng, n, dim) + 1, "f16")
    wanted = rng.uniform(size=n) < 0.7
    index = core.GridIndex(dim, dim, n)
    repair_all(index, wanted, keys, values)
    exact = values.decoded()[:, 0].astype(float)
    for block in range(2):
        mine = wanted & (np.arange(n) // BLOCK == block)
        np.testing.assert_allclose(index.value_mean(block), exact[mine].mean(0), rtol=2**-8)
        assert index.bounds(block).value_norm == pytest.approx(
            np.linalg.norm(exact[mine], axis=1).max(), rel=1e-5
        )


def test_constant_channels(rng: np.random.Generator) -> None:
    x = normal(rng, 64, 32)
    x[:, 3], x[:, 7], x[:, 9] = 0, 1.5, np.pi  # pi is no bfloat16: the channel gets a step
    keys = Stored.of(x)
    index = core.GridIndex(32, 0, 64)
    assert index.repair(0, ALL >> 1, keys.cache) == (63, True)
    assert index.step(0)[3] == index.step(0)[7] == 0 and index.step(0)[9] > 0
    check(index, keys)
    # A key that differs there does not fit, however little.
    x[63] = x[62]
    x[63, 7] = np.nextafter(np.float32(1.5), np.float32(2))
    keys.write(63, 0, x[63])
    assert index.repair(0, ALL, keys.cache) == (0, False)
    keys.write(63, 0, x[62])
    assert index.repair(0, ALL, keys.cache) == (1, False)
    check(index, keys)


def test_the_ends_of_the_codes() -> None:
    x = np.zeros((64, 3), np.float32)
    x[0], x[1] = -127 / 128, 127 / 128  # 127 steps of 1 / 128 to each side
    ends = [-130, -129, -128.6, -128.4, -128, -127.5, 126.5, 127, 127.4, 127.6, 128, 129, 130]
    for at, level in enumerate(ends):
        x[2 + at, 1] = level / 128
    keys = Stored.of(x)
    index = core.GridIndex(3, 0, 64)
    assert index.repair(0, 0b11, keys.cache) == (2, True)
    assert index.step(0).tolist() == [1 / 128] * 3
    for at, level in enumerate(ends):
        fits = -128.5 <= level <= 127.5
        assert index.repair(0, 1 << (2 + at), keys.cache) == (fits, False)
        check(index, keys)


def test_all_keys_equal(rng: np.random.Generator) -> None:
    for x in (np.zeros(64), np.full(64, 3.0), normal(rng, 64), np.full(64, 1e-42), np.full(64, -3e38)):
        keys = Stored.of(np.repeat(x[None], 64, axis=0).astype(np.float32))
        index = core.GridIndex(64, 0, 64)
        index.repair(0, ALL, keys.cache)
        check(index, keys)


@pytest.mark.parametrize("size", [1e-45, 1e-42, 1e-38, 1e-30, 1e30, 1e37, 3e38])
def test_extreme_keys_are_bounded_or_left_out(rng: np.random.Generator, size: float) -> None:
    keys = Stored.of((rng.uniform(-1, 1, (128, 64)) * size).astype(np.float32))
    index = core.GridIndex(64, 0, 128)
    repair_all(index, np.ones(128, bool), keys, None)
    check(index, keys)
    if 1e-38 <= size <= 1e30:
        assert index.indexed_cells == 128


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_what_is_not_finite_is_never_indexed(rng: np.random.Generator, special: float, where: str) -> None:
    for dim, channel in ((64, 0), (64, 63), (3, 2), (127, 126)):
        k, v = normal(rng, 130, dim), normal(rng, 130, dim)
        for cell in (0, 63, 70, 129):
            (k if where == "keys" else v)[cell, channel] = special
        keys, values = Stored.of(k), Stored.of(v)
        index = core.GridIndex(dim, dim, 130)
        for _ in range(2):  # it stays out
            repair_all(index, np.ones(130, bool), keys, values)
            assert np.flatnonzero(~indexed_cells(index)[:130]).tolist() == [0, 63, 70, 129]
            check(index, keys, values)
        # Until it is rewritten.
        keys.write(70, 0, k[71])
        values.write(70, 0, v[71])
        index.invalidate(70, 1)
        assert repair_all(index, np.ones(130, bool), keys, values) == 1
        assert indexed_cells(index)[70]


def test_float16_infinity_is_never_indexed(rng: np.random.Generator) -> None:
    x = normal(rng, 64, 64)
    x[5, 5] = 1e5  # beyond float16
    keys = Stored.of(x, "f16")
    index = core.GridIndex(64, 0, 64)
    index.repair(0, ALL, keys.cache)
    assert index.indexed(0) == ALL & ~(1 << 5)


def test_a_block_of_nan(rng: np.random.Generator) -> None:
    keys = Stored.of(np.full((64, 16), np.nan, np.float32))
    index = core.GridIndex(16, 0, 64)
    assert index.repair(0, ALL, keys.cache) == (0, False)
    assert index.indexed(0) == 0 and index.built_blocks == 0


# Appending, rewriting


def test_append_in_place(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, (64, 64)).astype(np.float32)
    x[0], x[1] = -1, 1
    keys, values = Stored.of(x), Stored.of(normal(rng, 64, 64))
    index = core.GridIndex(64, 64, 64)
    assert index.repair(0, 0b1111, keys.cache, values.cache) == (4, True)
    center, step, codes = index.center(0), index.step(0), index.codes(0)[:4]
    for cell in range(4, 64):
        assert index.repair(0, (2 << cell) - 1, keys.cache, values.cache) == (1, False)
        check(index, keys, values)
    np.testing.assert_array_equal(index.center(0), center)
    np.testing.assert_array_equal(index.step(0), step)
    np.testing.assert_array_equal(index.codes(0)[:4], codes)
    assert index.repair(0, ALL, keys.cache, values.cache) == (0, False)


def test_misfits_wait_until_they_are_many(rng: np.random.Generator) -> None:
    x = normal(rng, 64, 32)
    x[:10] *= 10  # outside the grid of the others
    keys = Stored.of(x)
    index = core.GridIndex(32, 0, 64)
    index.repair(0, ALL << 10 & ALL, keys.cache)
    step = index.step(0)
    assert index.repair(0, ALL << (10 - MAX_MISFITS) & ALL, keys.cache) == (0, False)
    assert index.indexed(0) == ALL << 10 & ALL
    np.testing.assert_array_equal(index.step(0), step)
    check(index, keys)
    assert index.repair(0, ALL << (10 - MAX_MISFITS - 1) & ALL, keys.cache) == (59, True)
    assert (index.step(0) > step).all()
    check(index, keys)


def test_a_value_too_long_for_the_bound_raises_it(rng: np.random.Generator) -> None:
    x = normal(rng, 64, 16)
    v = normal(rng, 64, 16)
    keys, values = Stored.of(x), Stored.of(v)
    index = core.GridIndex(16, 16, 64)
    index.repair(0, ALL, keys.cache, values.cache)
    before = index.bounds(0).value_norm
    values.write(20, 0, v[20] * 100)
    index.invalidate(20, 1)
    assert index.repair(0, ALL, keys.cache, values.cache) == (1, False)
    assert index.bounds(0).value_norm > before
    check(index, keys, values)


def test_invalidate_clears_exactly_its_cells(rng: np.random.Generator) -> None:
    n = 300
    keys = Stored.of(normal(rng, n, 16))
    inside = [(0, 0), (0, 1), (63, 1), (63, 2), (64, 64), (10, 200), (0, n)]
    for first, count in (*inside, (250, 1000), (-5, 10), (n, 5)):
        index = core.GridIndex(16, 0, n)
        repair_all(index, np.ones(n, bool), keys, None)
        index.invalidate(first, count)
        expected = np.ones(n, bool)
        expected[max(first, 0) : max(first + count, 0)] = False
        np.testing.assert_array_equal(indexed_cells(index)[:n], expected)
        check(index, keys)


def test_rewriting_a_whole_block_builds_a_new_grid(rng: np.random.Generator) -> None:
    x = normal(rng, 64, 16)
    keys = Stored.of(x)
    index = core.GridIndex(16, 0, 64)
    index.repair(0, ALL, keys.cache)
    for cell in range(64):
        keys.write(cell, 0, x[cell] * 1e-3 + 50)
    index.invalidate(0, 64)
    assert index.repair(0, ALL, keys.cache) == (64, True)
    assert index.bounds(0).residual_norm < 1e-3 * 16
    assert index.built_blocks == 1
    check(index, keys)


def test_nothing_wanted_is_nothing_done(rng: np.random.Generator) -> None:
    keys = Stored.of(normal(rng, 64, 16))
    index = core.GridIndex(16, 0, 64)
    assert index.repair(0, 0, keys.cache) == (0, False)
    assert index.indexed_cells == index.built_blocks == 0


def test_blocks_do_not_touch_each_other(rng: np.random.Generator) -> None:
    keys, values = Stored.of(normal(rng, 192, 80)), Stored.of(normal(rng, 192, 48))
    index = core.GridIndex(80, 48, 192)
    repair_all(index, np.ones(192, bool), keys, values)

    def planes(block: int) -> list[Float]:
        return [index.codes(block), index.center(block), index.step(block), index.value_mean(block)]

    before = [planes(0), planes(2)]
    for cell in range(64, 128):
        keys.write(cell, 0, normal(rng, 80) * 100)
    index.invalidate(64, 64)
    assert index.repair(1, ALL, keys.cache, values.cache) == (64, True)
    for now, then in zip([planes(0), planes(2)], before, strict=True):
        for a, b in zip(now, then, strict=True):
            np.testing.assert_array_equal(a, b)
    check(index, keys, values)


# Size


@pytest.mark.parametrize(
    ("key_dim", "value_dim"), [(1, 0), (3, 5), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256)]
)
def test_memory_of_a_block(key_dim: int, value_dim: int) -> None:
    index = core.GridIndex(key_dim, value_dim, 1000)
    codes = math.ceil(key_dim / 4) * 4 * BLOCK
    grid = 2 * 2 * padded(key_dim)
    mean = 2 * padded(value_dim)
    norms, bits = 5 * 4, 8 + 8 + 1
    assert index.block_bytes == codes + grid + mean + norms + bits


def test_memory_beside_a_float16_cache() -> None:
    # docs/index.md: 70.6 bytes per cell and KV head at head dim 64.
    assert core.GridIndex(64, 64, 64).block_bytes / BLOCK == pytest.approx(70.6, abs=0.05)
    for dim in (64, 80, 96, 128, 256):
        assert core.GridIndex(dim, dim, 64).block_bytes / (BLOCK * 2 * 2 * dim) < 0.28


def test_dimensions_are_checked() -> None:
    for sizes in (
        (0, 0, 1),
        (1025, 0, 1),
        (-1, 0, 1),
        (1, -1, 1),
        (1, 1025, 1),
        (1, 1, -1000),
        (1, 1, 2**40),
    ):
        with pytest.raises(ValueError):
            core.GridIndex(*sizes)
    assert core.GridIndex(1, 0, 0).n_blocks == 0


def test_shapes_are_checked(rng: np.random.Generator) -> None:
    keys, values = Stored.of(normal(rng, 100, 2, 16)), Stored.of(normal(rng, 100, 2, 32))
    index = core.GridIndex(16, 32, 90)
    for arguments in (
        (2, 1, keys.cache, values.cache),
        (-1, 1, keys.cache, values.cache),
        (1, 1 << 26, keys.cache, values.cache),  # cell 90
        (0, 1, values.cache, values.cache),
        (0, 1, keys.cache, keys.cache),
        (0, 1, keys.cache),
        (0, 1, keys.cache, values.cache, 2),
        (0, 1, keys.cache, values.cache, -1),
    ):
        with pytest.raises(ValueError):
            index.repair(*arguments)
    for read in (index.indexed, index.codes, index.center, index.step, index.value_mean, index.bounds):
        for block in (-1, 2):
            with pytest.raises(ValueError):
                read(block)
    assert index.repair(1, 1 << 25, keys.cache, values.cache) == (1, True)


# Any sequence of events


class Life(RuleBasedStateMachine):
    """Random writes, invalidations and repairs, against a model that knows which cells may be indexed."""

    N = 150

    @initialize(
        dim=st.sampled_from([1, 3, 16, 33]),
        dtype=st.sampled_from(["f32", "f16", "bf16"]),
        seed=st.integers(0, 2**32 - 1),
    )
    def start(self, dim: int, dtype: str, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.keys = Stored.of(self.content(self.N, dim), dtype)
        self.values = Stored.of(self.content(self.N, dim), dtype)
        self.index = core.GridIndex(dim, dim, self.N)
        self.allowed = np.zeros(self.N, bool)  # repaired since it was last written

    def content(self, n: int, dim: int) -> Float:
        x = self.rng.normal(size=(n, dim)) * np.exp(self.rng.normal(size=(n, 1)))
        kind = self.rng.uniform(size=n)
        x[kind < 0.05] = 0
        x[kind > 0.98] *= 1e4
        x[(kind > 0.9) & (kind < 0.92)] *= 1e-30
        odd = (kind > 0.8) & (kind < 0.83)
        x[odd, self.rng.integers(0, dim, odd.sum())] = self.rng.choice([np.nan, np.inf, -np.inf], odd.sum())
        return x.astype(np.float32)

    @rule(first=st.integers(0, N - 1), count=st.integers(1, 80))
    def write(self, first: int, count: int) -> None:
        count = min(count, self.N - first)
        for cell, key, value in zip(
            range(first, first + count),
            self.content(count, self.keys.dim),
            self.content(count, self.keys.dim),
            strict=True,
        ):
            self.keys.write(cell, 0, key)
            self.values.write(cell, 0, value)
        self.index.invalidate(first, count)
        self.allowed[first : first + count] = False

    @rule(first=st.integers(0, N - 1), count=st.integers(1, 80))
    def invalidate_alone(self, first: int, count: int) -> None:
        self.index.invalidate(first, count)
        self.allowed[first : first + count] = False

    @rule(share=st.sampled_from([0.02, 0.3, 0.9, 1.0]))
    def repair(self, share: float) -> None:
        wanted = self.rng.uniform(size=self.N) < share
        before = indexed_cells(self.index)[: self.N]
        for block, bits in enumerate(to_bits(wanted)):
            had = self.index.indexed(block)
            encoded, rebuilt = self.index.repair(block, int(bits), self.keys.cache, self.values.cache)
            has = self.index.indexed(block)
            # A cell may be encoded into the old grid before there is a new one.
            assert encoded >= has.bit_count() if rebuilt else encoded == (has & ~had).bit_count()
        self.allowed |= wanted
        after = indexed_cells(self.index)[: self.N]
        # What was wanted and is finite is indexed, but for a few misfits a block; nothing gets lost.
        usable = np.isfinite(np.concatenate([x.decoded()[:, 0] for x in (self.keys, self.values)], 1)).all(1)
        left = wanted & usable & ~after
        for first, last in pairwise([0, 64, 128, self.N]):
            assert left[first:last].sum() <= MAX_MISFITS
        assert (after >= before).all()
        assert (after <= (before | wanted)).all()

    @invariant()
    def indexed_cells_are_described(self) -> None:
        if not hasattr(self, "index"):
            return
        assert not (indexed_cells(self.index)[: self.N] & ~self.allowed).any()
        assert not indexed_cells(self.index)[self.N :].any()
        check(self.index, self.keys, self.values)


Life.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestLife = Life.TestCase
