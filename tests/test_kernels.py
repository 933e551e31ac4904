"""Every instruction set against float64 and against scalar, and the scan's bounds against exact scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from page_end import at_page_end
from reference import (
    BLOCK,
    DTYPES,
    ISAS,
    LOG2E,
    UNIT,
    Bits,
    Double,
    Float,
    Stored,
    core,
    exact_dots,
    from_bits,
    load,
    norm_up,
    pad,
    repair_all,
    store,
    to_bits,
)

ALL_ISAS = ("avx512", "avx2", "scalar")  # best first
DIMS = (1, 3, 16, 40, 63, 64, 65, 80, 96, 128, 255, 256)
MANY_DIMS = (320, 1024)  # integer dot products in several parts
COUNTS = (0, 1, 3, 4, 15, 16, 17, 63, 64, 65)
N_QUERIES = tuple(range(1, 10))
SPECIAL = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38], np.float32)

each_isa = pytest.mark.parametrize(
    "isa",
    [
        pytest.param(isa, marks=pytest.mark.skipif(isa not in ISAS, reason=f"this machine has no {isa}"))
        for isa in ALL_ISAS
    ],
)
each_dim = pytest.mark.parametrize("dim", DIMS)
each_row_type = pytest.mark.parametrize(
    ("dtype", "dim"),
    [(t, dim) for t in DTYPES for dim in (*DIMS, *MANY_DIMS) if dim % 32 == 0 or t not in ("q8_0", "q4_0")],
)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def unaligned(x: Float) -> Float:
    """A copy that starts 4 bytes after a multiple of 64."""
    room = np.empty(x.size + 17, np.float32)
    first = 1 + -room.ctypes.data % 64 // 4
    room[first : first + x.size] = x.ravel()
    return room[first : first + x.size].reshape(x.shape)


def some_cells(rng: np.random.Generator, n_cells: int, n: int) -> NDArray[np.int32]:
    return rng.integers(0, n_cells, n).astype(np.int32)


def test_isas_are_listed_best_first() -> None:
    assert tuple(ISAS) == tuple(isa for isa in ALL_ISAS if isa in ISAS)
    assert ISAS[-1] == "scalar"
    with pytest.raises(ValueError, match="sse9"):
        core.largest("sse9", np.zeros(1, np.float32))


# Rows of the cache


@each_isa
@each_row_type
@pytest.mark.parametrize("gap", [0, 1, 6, 64])
def test_rows_to_f32_is_exact(rng: np.random.Generator, isa: str, dtype: str, dim: int, gap: int) -> None:
    x = rng.normal(size=(70, 2, dim)).astype(np.float32)
    if dtype in ("f32", "f16", "bf16"):
        x[0, :, : SPECIAL.size] = SPECIAL[:dim]
    x[1] *= 1e-6  # subnormal float16
    rows = Stored.of(x, dtype, gap)
    for head in range(2):
        expected = pad(rows.decoded()[:, head])
        np.testing.assert_array_equal(core.rows_to_f32(isa, rows.cache, head), expected)
        for n in COUNTS:
            cells = some_cells(rng, 70, n)
            np.testing.assert_array_equal(core.rows_to_f32(isa, rows.cache, head, cells), expected[cells])


@each_isa
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_every_half_is_converted_exactly(isa: str, dtype: str) -> None:
    data = np.arange(65536, dtype=np.uint16).reshape(512, 128).view(np.uint8)
    converted = core.rows_to_f32(isa, core.Cache(data, dtype, 128))
    np.testing.assert_array_equal(converted, load(data, dtype))


@each_isa
@pytest.mark.parametrize(("dtype", "levels"), [("q8_0", 32), ("q4_0", 16)])
def test_every_level_is_converted_exactly(isa: str, dtype: str, levels: int) -> None:
    groups = 256 // levels
    data = np.empty((64, groups, 2 + levels), np.uint8)
    data[:, :, :2] = np.linspace(-4, 4, 64).astype(np.float16).view(np.uint8).reshape(64, 1, 2)
    data[:, :, 2:] = np.arange(256, dtype=np.uint8).reshape(groups, levels)
    data = data.reshape(64, -1)
    cache = core.Cache(data, dtype, 32 * groups)
    np.testing.assert_array_equal(core.rows_to_f32(isa, cache), load(data, dtype))


def test_the_reference_stores_what_it_loads(rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 64)).astype(np.float32)
    for dtype, error in {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-5, "q4_0": 2**-2}.items():
        np.testing.assert_allclose(load(store(x, dtype), dtype), x, atol=error * 4)


@each_isa
@each_row_type
def test_nothing_is_read_beyond_the_last_row(
    rng: np.random.Generator, isa: str, dtype: str, dim: int
) -> None:
    for n in (1, 5):
        x = rng.normal(size=(n, dim)).astype(np.float32)
        cache = core.Cache(at_page_end(store(x, dtype)), dtype, dim)
        query = np.ones((3, dim), np.float32)
        weight = np.ones((3, n), np.float32)
        last = np.full(4, n - 1, np.int32)
        expected = core.rows_to_f32("scalar", cache)
        np.testing.assert_array_equal(core.rows_to_f32(isa, cache), expected)
        for cells in (None, last[:n]):
            assert np.isfinite(core.dots(isa, query, cache, cells=cells, ahead=last)).all()
            acc = core.accumulate(isa, weight, query[:, 0], cache, query, cells=cells, ahead=last)
            assert np.isfinite(acc[:, :dim]).all()


@each_isa
@each_row_type
def test_dots(rng: np.random.Generator, isa: str, dtype: str, dim: int) -> None:
    query = rng.normal(size=(N_QUERIES[-1], dim)).astype(np.float32)
    rows = Stored.of(rng.normal(size=(COUNTS[-1], 2, dim)).astype(np.float32), dtype, gap=1)
    for head in range(2):
        keys = rows.decoded()[:, head]
        exact = query.astype(float) @ keys.T.astype(float)
        # What score_error() in decode.cpp counts on.
        allowed = (2 * dim + 16) * UNIT * np.outer(norm_up(query), norm_up(keys))
        for n_query in N_QUERIES:
            out = core.dots(isa, query[:n_query], rows.cache, head)
            assert (np.abs(out - exact[:n_query]) <= allowed[:n_query]).all()
            for n in COUNTS:
                cells, ahead = some_cells(rng, COUNTS[-1], n), some_cells(rng, COUNTS[-1], n_query * 7)
                out = core.dots(isa, query[:n_query], rows.cache, head, cells, ahead, gap=n_query % 3)
                assert np.isnan(out[:, n:]).all()
                assert (np.abs(out[:, :n] - exact[:n_query, cells]) <= allowed[:n_query, cells]).all()


@each_isa
@each_row_type
def test_dots_f64(rng: np.random.Generator, isa: str, dtype: str, dim: int) -> None:
    x = rng.normal(size=(70, 2, dim)).astype(np.float32)
    query = (rng.normal(size=dim) * 10.0 ** rng.integers(-6, 7, dim)).astype(np.float32)
    rows = Stored.of(x, dtype, gap=3)
    for head in range(2):
        terms = query.astype(np.float64) * rows.decoded()[:, head].astype(np.float64)
        expected = np.array([math.fsum(row) for row in terms])
        magnitudes = np.abs(terms).sum(-1)
        for n in COUNTS:
            cells = some_cells(rng, 70, n)
            score, magnitude = core.dots_f64(isa, query, rows.cache, head, cells)
            # In any order dim terms are summed within dim * 2^-53 of their magnitudes.
            assert (np.abs(score - expected[cells]) <= dim * 2.0**-53 * magnitudes[cells]).all()
            np.testing.assert_allclose(magnitude, magnitudes[cells], rtol=1e-12)


@each_isa
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_dots_f64_do_not_overflow_or_vanish(isa: str, dtype: str) -> None:
    large = {"f32": 3e38, "f16": 6e4, "bf16": 3e38}[dtype]
    small = {"f32": 1e-45, "f16": 6e-8, "bf16": 1e-40}[dtype]
    rows = Stored.of(
        np.array([[large] * 5, [small] * 5, [np.nan] * 5, [np.inf] * 5], np.float32)[:, None], dtype
    )
    key = rows.decoded()[:2, 0, 0].astype(np.float64)
    for query in (np.float32(3e38), np.float32(1e-45)):
        score, magnitude = core.dots_f64(isa, np.full(5, query), rows.cache)
        np.testing.assert_allclose(score[:2], 5 * np.float64(query) * key, rtol=1e-15)
        np.testing.assert_allclose(magnitude[:2], 5 * np.float64(query) * key, rtol=1e-15)
        assert np.isnan(score[2]) and score[3] == np.inf


# Building the grid


@each_isa
@each_dim
def test_squared_norm_and_range(rng: np.random.Generator, isa: str, dim: int) -> None:
    rows = (rng.normal(size=(9, dim)) * 10.0 ** rng.integers(-20, 20, (9, 1))).astype(np.float32)
    for row in rows:
        exact = math.fsum(float(x) ** 2 for x in row)
        assert core.squared_norm(isa, row) == pytest.approx(exact, rel=2.0**-40)
    low, high = core.range(isa, rows)
    np.testing.assert_array_equal(low[:dim], rows.min(0))
    np.testing.assert_array_equal(high[:dim], rows.max(0))
    for bad in (np.nan, np.inf, -np.inf):
        rows[3, dim // 2] = bad
        assert not np.isfinite(core.squared_norm(isa, rows[3]))
    assert np.isfinite(core.squared_norm(isa, np.full(dim, 3e38, np.float32)))


@each_isa
@each_dim
def test_encode(rng: np.random.Generator, isa: str, dim: int) -> None:
    center = store(rng.normal(size=dim).astype(np.float32), "bf16").view(np.uint16)
    step = store(np.abs(rng.normal(size=dim) / 100).astype(np.float32), "bf16").view(np.uint16)
    step[dim // 2] = 0
    middle, width = (load(x.view(np.uint8), "bf16").astype(np.float64) for x in (center, step))
    n_fits = 0
    for reach in (0.5, 1, 127, 129) * 5:
        key = (middle + width * rng.uniform(-reach, reach, dim)).astype(np.float32)
        if reach == 129:
            key[dim // 2] = np.nextafter(key[dim // 2], np.float32(9))  # beside a channel without a step
        fits, residual, squared, code = core.encode(isa, key, center, step)
        assert fits == core.encode("scalar", key, center, step)[0]
        if not fits:
            continue  # then nothing else is meant
        n_fits += 1
        levels = code[:dim].astype(np.int64) - 128
        np.testing.assert_array_equal(code, core.encode("scalar", key, center, step)[3])
        assert not code[dim:].any()
        exact = key - (middle + width * levels)
        assert residual == pytest.approx((exact**2).sum(), rel=2.0**-40, abs=1e-300)
        assert squared == (levels**2).sum()
        assert (np.abs(exact) <= width * 0.5001 + 1e-7).all()
    assert 0 < n_fits < 20


@each_isa
def test_dots_carry_nan_and_infinity(rng: np.random.Generator, isa: str) -> None:
    for dim in (63, 64):
        keys = rng.normal(size=(20, dim)).astype(np.float32)
        keys[3, 5], keys[17, dim - 1], keys[18, 0] = np.nan, np.inf, -np.inf
        out = core.dots(isa, np.ones((2, dim), np.float32), Stored.of(keys).cache)
        assert np.isnan(out[:, 3]).all() and (out[:, 17] == np.inf).all() and (out[:, 18] == -np.inf).all()
        assert np.isfinite(np.delete(out, [3, 17, 18], axis=1)).all()


@each_isa
@each_row_type
def test_accumulate(rng: np.random.Generator, isa: str, dtype: str, dim: int) -> None:
    rows = Stored.of(rng.normal(size=(COUNTS[-1], 2, dim)).astype(np.float32), dtype, gap=1)
    every = np.arange(COUNTS[-1], dtype=np.int32)
    for n_query in N_QUERIES:
        rescale = rng.uniform(size=n_query).astype(np.float32)
        acc = rng.normal(size=(n_query, dim)).astype(np.float32)
        start = acc.astype(float) * rescale[:, None]
        for n in COUNTS:
            head = n % 2
            cells = None if n == COUNTS[-1] else some_cells(rng, COUNTS[-1], n)
            ahead = some_cells(rng, COUNTS[-1], n_query * 7)
            weight = rng.exponential(size=(n_query, n + n_query % 3)).astype(np.float32)
            weight[:, n:] = np.nan
            out = core.accumulate(isa, unaligned(weight), rescale, rows.cache, acc, head, cells, ahead)
            w = weight[:, :n].astype(float)
            v = rows.decoded()[every if cells is None else cells, head].astype(float)
            allowed = (n + 3) * UNIT * (np.abs(start) + w @ np.abs(v))
            assert (np.abs(out[:, :dim] - (start + w @ v)) <= allowed).all()


@each_isa
def test_accumulate_carries_nan_and_infinity(isa: str) -> None:
    for dim in (63, 64):
        values = np.ones((9, dim), np.float32)
        values[7, 0], values[8, dim - 1] = np.nan, np.inf
        ones = np.ones((3, dim), np.float32)
        out = core.accumulate(isa, ones[:, :9].copy(), ones[:, 0].copy(), Stored.of(values).cache, ones)
        assert np.isnan(out[:, 0]).all() and (out[:, dim - 1] == np.inf).all()
        assert (out[:, 1 : dim - 1] == 10).all()


# Exponentials


@each_isa
def test_largest(rng: np.random.Generator, isa: str) -> None:
    for n in (*COUNTS[1:], 511, 513):
        x = at_page_end(rng.normal(size=n).astype(np.float32) - 10)
        assert core.largest(isa, x) == x.max()
        at = rng.integers(n)
        for special in (np.inf, -np.inf, 3e38):
            x[at] = special
            assert core.largest(isa, x) == x.max()
        x[:] = -np.inf
        assert core.largest(isa, x) == -np.inf
        for at in range(n):
            x = rng.normal(size=n).astype(np.float32)
            x[rng.integers(n)] = np.inf
            x[at] = np.nan
            assert math.isnan(core.largest(isa, x)), (n, at)


@each_isa
@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.18, 3.7), (1.44, -60.0), (25.0, 900.0)])
def test_exp2_sum(rng: np.random.Generator, isa: str, scale: float, shift: float) -> None:
    for n in (*COUNTS, 500):
        x = (rng.uniform(-126, 60, n) + shift) / scale
        x = x.astype(np.float32)
        out, total = core.exp2_sum(isa, x, scale, shift)
        exponent = x.astype(float) * float(np.float32(scale)) - float(np.float32(shift))
        rounding = 2 * UNIT * (np.abs(exponent + shift) + np.abs(exponent)) * math.log(2)
        np.testing.assert_array_less(np.abs(out / np.exp2(exponent) - 1), 2**-20 + rounding)
        assert total == pytest.approx(math.fsum(out), rel=2**-16)


@each_isa
def test_exp2_sum_at_the_ends_of_its_range(isa: str) -> None:
    x = np.array([-126, -125.75, -125.5, -125.25, 0, 126.25, 126.5, 126.75, 127, 127.4, 127.6], np.float32)
    out, _ = core.exp2_sum(isa, x, 1.0, 0.0)
    np.testing.assert_allclose(out, np.exp2(x.astype(float)), rtol=2**-20)
    out, total = core.exp2_sum(isa, np.array([128, 129, 200, 1e30, np.inf], np.float32), 1.0, 0.0)
    assert (out == np.inf).all() and total == np.inf


@each_isa
def test_exp2_sum_far_below_and_nan(isa: str) -> None:
    x = np.array([-126.5, -140, -151, -1000, -1e30, 0, -np.inf, *[-300] * 20, -np.inf], np.float32)
    for shift in (0.0, 1.0, 1e4):
        out, total = core.exp2_sum(isa, x + np.float32(shift), 1.0, shift)
        assert ((out >= 0) & (out <= 2.0**-126)).tolist() == [i != 5 for i in range(len(x))]
        assert total == 1
    for at in (0, 15, 16, 19):
        x = np.full(20, -np.inf, np.float32)
        x[at] = np.nan
        out, total = core.exp2_sum(isa, x, 1.0, 0.0)
        assert math.isnan(total) and np.isnan(out).sum() == 1 and math.isnan(out[at])


# Weights


def some_weights(rng: np.random.Generator, n_query: int, n: int) -> Float:
    weight = np.exp2(rng.uniform(-60, 10, (n_query, n))).astype(np.float32)
    weight[rng.uniform(size=weight.shape) < 0.2] = 0
    return weight


@each_isa
@pytest.mark.parametrize("n", [0, 64, 448, 512, 576, 4160])
def test_sums_below(rng: np.random.Generator, isa: str, n: int) -> None:
    weight = unaligned(some_weights(rng, 1, n)[0])
    candidate = np.sort(np.exp2(rng.uniform(-60, 10, core.CANDIDATES))).astype(np.float32)
    if n:
        candidate[3] = np.sort(weight)[n // 2]  # not under itself
        weight[n // 3] = np.nan  # under nothing
        weight[n // 4] = np.inf
    start = rng.uniform(size=core.CANDIDATES)
    expected = [s + math.fsum(weight[weight < c]) for s, c in zip(start, candidate, strict=True)]
    np.testing.assert_allclose(core.sums_below(isa, weight, candidate, start), expected, rtol=2**-17)


def random_bits(rng: np.random.Generator, n_blocks: int) -> Bits:
    return rng.integers(0, 2**64, n_blocks, np.uint64)


@each_isa
def test_select(rng: np.random.Generator, isa: str) -> None:
    for n_query in N_QUERIES:
        for n_blocks in (0, 1, 2, 8, 9):
            weight = unaligned(some_weights(rng, n_query, n_blocks * BLOCK + 16))
            threshold = np.exp2(rng.uniform(-20, 10, n_query)).astype(np.float32)
            before = random_bits(rng, n_blocks) & random_bits(rng, n_blocks)
            visible = random_bits(rng, n_blocks) | random_bits(rng, n_blocks)
            if n_blocks:
                visible[0] |= np.uint64(1 << 5 | 1 << 7 | 1 << 63)
                weight[0, 5], weight[-1, 63] = np.nan, np.inf  # kept
                weight[0, 7] = threshold[0]
            reaches = ~(weight[:, : n_blocks * BLOCK] < threshold[:, None])
            expected = (before | to_bits(reaches.any(0))) & visible
            kept, dropped = core.select(isa, weight, threshold, before, visible)
            np.testing.assert_array_equal(kept, expected)
            left = np.where(from_bits(expected), 0, weight[:, : n_blocks * BLOCK].astype(float))
            sums = left.reshape(n_query, n_blocks, BLOCK).sum(-1)
            np.testing.assert_allclose(dropped[:, :n_blocks], sums, rtol=2**-17)
            assert np.isnan(dropped[:, n_blocks:]).all()


@each_isa
def test_select_with_all_or_nothing_kept(rng: np.random.Generator, isa: str) -> None:
    weight = some_weights(rng, 2, 3 * BLOCK)
    none, full = np.zeros(3, np.uint64), np.full(3, 2**64 - 1, np.uint64)
    zero, most = np.zeros(2, np.float32), np.full(2, np.inf, np.float32)
    sums = weight.astype(float).reshape(2, 3, BLOCK).sum(-1)
    for threshold, before, visible, keeps in (
        (zero, none, full, full),  # every weight reaches 0
        (most, none, full, none),
        (most, full, full, full),
        (zero, full, none, none),  # a mask that hides everything
    ):
        kept, dropped = core.select(isa, weight, threshold, before, visible)
        np.testing.assert_array_equal(kept, keeps)
        np.testing.assert_allclose(dropped[:, :3], sums * (keeps == 0), rtol=2**-17)


@each_isa
def test_mask_to_bits(rng: np.random.Generator, isa: str) -> None:
    for n in (*COUNTS, 31, 32, 33, 127, 129, 1000):
        visible = rng.uniform(size=n) < 0.5
        mask = np.where(visible, 0, -np.inf).astype(np.float16).view(np.uint16)
        mask[visible & (rng.uniform(size=n) < 0.3)] = 0x8000  # -0 is 0
        mask = at_page_end(mask)
        bits, plain = core.mask_to_bits(isa, mask)
        np.testing.assert_array_equal(bits, to_bits(visible))
        assert plain
        for at in rng.permutation(n)[:20]:
            for other in (0x7C00, 0x7E00, 0xFE00, 0xFC01, 0x3C00, 0xFBFF, 0x0001, 0x8001):
                odd = mask.copy()
                odd[at] = other
                assert not core.mask_to_bits(isa, odd)[1], (n, at, hex(other))


# The scan


@dataclass
class Scan:
    """Keys in an index, queries against them, and what is exactly true of them."""

    query: Float
    keys: Float  # (n, dim), decoded
    index: core.GridIndex
    cells: Bits  # (1 or n_query, n_blocks)
    to_log2: float
    reference: Float
    candidate: Float
    score: Double  # (n_query, n_blocks * 64) q.k * to_log2

    @classmethod
    def of(
        cls,
        query: Float,
        keys: Float,
        *,
        dtype: str = "f32",
        scale: float = 1.0,
        hidden: float = 0.0,
        own_cells: bool = False,
    ) -> Scan:
        """A share of the cells is hidden; of each head others with ``own_cells``."""
        rng = np.random.default_rng(len(keys) * 1000 + keys.shape[1])
        stored = Stored.of(keys, dtype)
        decoded = stored.decoded()[:, 0]
        query = np.ascontiguousarray(query, np.float32)
        to_log2 = float(np.float32(LOG2E / math.sqrt(keys.shape[1]) * scale))
        index = core.GridIndex(keys.shape[1], 0, len(keys))
        repair_all(index, np.ones(len(keys), bool), stored, None)
        indexed = np.array([index.indexed(b) for b in range(index.n_blocks)], np.uint64)
        shown = rng.uniform(size=(len(query) if own_cells else 1, len(keys))) >= hidden
        cells = indexed & np.stack([to_bits(head) for head in shown])
        score = np.full((len(query), index.n_blocks * BLOCK), -np.inf)
        score[:, : len(keys)] = exact_dots(query, decoded) * to_log2
        reference = np.clip(score.max(1), -3e38, 3e38).astype(np.float32)
        candidate = np.exp2(np.linspace(-20, 3, core.CANDIDATES)).astype(np.float32)
        return cls(query, decoded, index, cells, to_log2, reference, candidate, score)

    @property
    def inside(self) -> NDArray[np.bool_]:
        """(n_query, n_blocks * 64): the cells of each head."""
        return np.stack([from_bits(self.cells[h % len(self.cells)]) for h in range(len(self.query))])

    @property
    def exact(self) -> Double:
        """(n_query, n_blocks * 64) scores relative to the reference; -inf outside of `cells`."""
        return np.where(self.inside, self.score - self.reference[:, None].astype(float), -np.inf)

    def run(self, isa: str, certified: bool = True, first: int = 0) -> tuple[Float, Float, Double, Double]:
        weight, slack, lower, below = core.scan(
            isa,
            self.index,
            np.ascontiguousarray(self.cells[:, first:]),
            unaligned(self.query),
            norm_up(self.query),
            self.reference,
            self.candidate,
            self.to_log2,
            certified,
            first,
        )
        n = self.index.n_blocks - first
        assert np.isnan(weight[:, n * BLOCK :]).all() and np.isnan(slack[:, n:]).all()
        return weight[:, : n * BLOCK], slack[:, :n], lower, below

    def violations(self, isa: str, certified: bool = True) -> int:
        """Cells whose exact weight exceeds the upper bound."""
        weight = self.run(isa, certified)[0].astype(float)
        with np.errstate(divide="ignore"):
            return int((self.exact > np.log2(weight)).sum())

    def check(self, isa: str) -> None:
        weight, slack, lower, below = self.run(isa)
        inside, exact = self.inside, self.exact
        assert not np.isnan(weight).any()
        assert (weight[~inside] == 0).all()
        assert (weight[inside] >= 2.0**core.MIN_LOG2 * (1 - UNIT)).all()
        assert self.violations(isa) == 0
        scanned = inside.reshape(*slack.shape, BLOCK).any(-1)
        assert (slack[scanned] > 0).all() and (slack[~scanned] == 0).all()
        if not np.isfinite(weight).all():
            return  # the sums are not finite either: decode() gives such a step to dense attention
        w = weight.astype(float)
        # Below, where the weight was not cut off.
        least = np.log2(w[inside]) - (2 * np.repeat(slack.astype(float), BLOCK, axis=1))[inside]
        cut = w[inside] <= 2.0**core.MIN_LOG2 * (1 + core.WEIGHT_ERROR)
        assert (cut | (exact[inside] >= least - math.log2(core.CHORD_EXCESS))).all()
        total = np.exp2(exact).sum(1) + 2.0**core.MIN_LOG2 * w.shape[1]
        assert (lower <= total * (1 + core.WEIGHT_ERROR)).all()
        factor = [[core.lower_factor(s) for s in head] for head in slack]
        expected = (w * np.repeat(factor, BLOCK, axis=1)).sum(1)
        np.testing.assert_allclose(lower, expected, rtol=core.WEIGHT_ERROR, atol=1e-37)
        sampled = w[:, self.sampled()]
        under = [[math.fsum(head[head < c]) for c in self.candidate] for head in sampled]
        np.testing.assert_allclose(below, under, rtol=core.WEIGHT_ERROR, atol=1e-37)

    def sampled(self) -> NDArray[np.bool_]:
        """(n_blocks * 64,): the cells whose weights are held against the candidates."""
        chosen = np.zeros((self.index.n_blocks, BLOCK), bool)
        for block, row in enumerate(chosen):
            first = core.sampled_cell(block % core.MAX_RUN)
            row[first : first + BLOCK // core.SAMPLE_STEP] = True
        return chosen.ravel()


def rounding_traps(rng: np.random.Generator, n: int, dim: int) -> tuple[Float, Float]:
    """Keys half a step off the grid in the query's direction; the second query is off its levels too."""
    step = math.ceil(2**14 / 127) / 2**14  # bfloat16 of 1 / 127, rounded up
    query = np.stack([rng.choice([-1.0, 1.0], dim), rng.integers(-127, 127, dim) + 0.4999])
    query[1, 0] = 127
    keys = (rng.integers(-125, 125, (n, dim)) + 0.4999 * np.sign(query[0])) * step
    keys[:1], keys[1:2] = -1, 1  # so that the grid is -1 to 1
    return query, keys


def level_traps(rng: np.random.Generator, n: int, dim: int) -> tuple[Float, Float]:
    """Keys on the grid, without residual, in the direction of what the query loses as integers."""
    query = rng.integers(-30000, 30000, (2, dim)) + 0.4999
    query[:, 0] = 127 * 256  # the largest level there is
    keys = rng.integers(-127, 128, (n, dim)).astype(float)
    keys[0], keys[1:2] = 127, -127
    return query, keys / 128  # 127 / 128 in 127 steps of a power of two


def largest_integers(n: int, dim: int) -> tuple[Float, Float]:
    """Every level the largest there is, with either sign, against the largest code."""
    query = np.ones((2, dim))
    query[1] = -1
    keys = np.linspace(-127, 127, n)[:, None] * np.ones((1, dim)) / 128
    return query, keys


def lost_additions(n: int, dim: int) -> tuple[Float, Float]:
    """Equal keys; in a float32 sum over the channels in order, all but the first product are rounded away."""
    query = np.full((2, dim), 0.49 * 2.0**-9)  # of an ulp of 2^14
    query[:, 0] = 2**14
    return query, np.ones((n, dim))


def vanishing_channel(query: Float, keys: Float, large: float, small: float) -> tuple[Float, Float]:
    query[:, 0], keys[:, 0] = large, keys[:, 0] * 1e5 * small
    return query, keys


def adversaries(rng: np.random.Generator, n: int, dim: int) -> Iterator[tuple[str, Float, Float]]:
    """Names, queries (2, dim), keys (n, dim)."""

    def query(size: float = 1.0) -> Float:
        return rng.normal(size=(2, dim)) * size

    def keys(size: float = 1.0) -> Float:
        return rng.normal(size=(n, dim)) * size

    huge = keys()
    huge[:, dim // 2] *= 3000
    yield "random", query(), keys()
    yield "peaked", query(20), keys()
    yield "huge channel", query(), huge
    yield "subnormal keys", query(), keys(1e-39)
    yield "subnormal and normal", query(), np.where(rng.uniform(size=(n, dim)) < 0.5, keys(1e-40), keys())
    yield "all equal", query(), np.repeat(keys()[:1], n, axis=0)
    yield "duplicates", query(10), keys()[rng.integers(0, min(3, n), n)]
    yield "zero keys", query(), keys(0)
    yield "zero query", query(0), keys()
    yield "query just below the tiny limit", query(core.TINY_SCALED_QUERY), keys(0.5)
    yield "query just above the tiny limit", query(core.TINY_SCALED_QUERY * 200), keys()
    yield "tiny query", query(1e-20), keys()
    yield "tiny query, large keys", query(1e-25), keys(1e20)
    yield "subnormal query", query(1e-41), keys(1e4)
    yield "query with tiny channels", query() * np.where(np.arange(dim) % 3, 1e-15, 1), keys()
    for small in (1e-29, 1e-44):
        large = core.MAX_QUERY_NORM * 0.99
        yield "large query on a vanishing channel", *vanishing_channel(query(), keys(1e-5), large, small)
    yield "one channel", query() * (np.arange(dim) == 0), keys()
    yield "large", query(1e4), keys(1e4)
    yield "large offset", query(), keys() + 1e4
    yield "offset that cancels", query() * 100 - (query() * 100).mean(1, keepdims=True), keys() + 300
    yield "huge", query(1e15), keys(1e15)
    yield "near the largest float", query(1e-3), keys() * 5e37
    yield "aligned", np.sign(query()), np.sign(query()[:1]) * np.abs(keys())
    yield "rounding traps", *rounding_traps(rng, n, dim)
    yield "level traps", *level_traps(rng, n, dim)
    yield "largest integers", *largest_integers(n, dim)
    yield "lost additions", *lost_additions(n, dim)


@each_isa
@pytest.mark.parametrize("dim", (*DIMS, *MANY_DIMS))
def test_scan_bounds_hold_against_adversaries(rng: np.random.Generator, isa: str, dim: int) -> None:
    for n in (1, 63, 64, 65, 130):
        for name, query, keys in adversaries(rng, n, dim):
            with np.errstate(over="ignore"):
                query, keys = query.astype(np.float32), keys.astype(np.float32)
                scan = Scan.of(query, keys, hidden=0.1, own_cells=n == 65)
            try:
                scan.check(isa)
            except AssertionError as error:
                error.add_note(f"{name}, n = {n}, dim = {dim}")
                raise


@each_isa
@pytest.mark.parametrize("size", [1e-9, core.TINY_SCALED_QUERY, 1e-14, 1e-30])
def test_scan_bounds_hold_for_tiny_queries_that_matter(
    rng: np.random.Generator, isa: str, size: float
) -> None:
    # A large scale makes up for the query: what is lost because it is tiny has to be in the slack.
    for dim in (1, 3, 64, 256):
        for exponent in range(-3, 12):
            query, keys = rng.normal(size=(2, dim)) * size * 2.0**exponent, rng.normal(size=(130, dim))
            scan = Scan.of(query, keys.astype(np.float32), scale=20 / size / 2.0**exponent)
            scan.check(isa)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_scan_bounds_hold_for_every_cache_type(rng: np.random.Generator, isa: str, dtype: str) -> None:
    for dim in (32, 64, 96, 256):
        for size in (1e-3, 1, 100):
            query, keys = rng.normal(size=(3, dim)) * 5 / size, rng.normal(size=(200, dim)) * size + size
            Scan.of(query, keys.astype(np.float32), dtype=dtype, hidden=0.3).check(isa)


@each_isa
@pytest.mark.parametrize("n", [512, 513, 1100])
def test_scan_in_several_runs(rng: np.random.Generator, isa: str, n: int) -> None:
    query, keys = rng.normal(size=(3, 40)) * 6, rng.normal(size=(n, 40)).astype(np.float32)
    for own_cells in (False, True):
        Scan.of(query, keys, hidden=0.3, own_cells=own_cells).check(isa)


@each_isa
@pytest.mark.parametrize("n_query", N_QUERIES)
def test_scan_serves_any_group(rng: np.random.Generator, isa: str, n_query: int) -> None:
    scan = Scan.of(rng.normal(size=(n_query, 80)) * 8, rng.normal(size=(150, 80)).astype(np.float32))
    scan.check(isa)
    alone = [Scan.of(q[None], scan.keys).run(isa)[0] for q in scan.query]
    np.testing.assert_array_equal(scan.run(isa)[0], np.concatenate(alone))


@each_isa
@pytest.mark.parametrize("n_query", N_QUERIES)
def test_scan_with_cells_of_each_head(rng: np.random.Generator, isa: str, n_query: int) -> None:
    query, keys = rng.normal(size=(n_query, 80)) * 8, rng.normal(size=(330, 80)).astype(np.float32)
    scan = Scan.of(query, keys, hidden=0.5, own_cells=True)
    scan.cells[:, 2] = 0  # nothing for any head
    scan.cells[0, 1] = scan.cells[-1, 3] = 0  # nothing for one
    scan.check(isa)
    scan.cells[::2] = 0  # nothing in any block
    scan.check(isa)


@pytest.mark.parametrize("dim", (*DIMS, *MANY_DIMS))
def test_isas_agree_on_the_scan(rng: np.random.Generator, dim: int) -> None:
    query, keys = rng.normal(size=(5, dim)) * 4, rng.normal(size=(200, dim)).astype(np.float32)
    for certified in (True, False):
        for own_cells in (False, True):
            scan = Scan.of(query, keys, hidden=0.5, own_cells=own_cells)
            weight, slack, lower, below = scan.run("scalar", certified)
            for isa in ISAS:
                other = scan.run(isa, certified)
                np.testing.assert_allclose(other[0], weight, rtol=1e-3)
                np.testing.assert_allclose(other[1], slack, rtol=1e-3)
                np.testing.assert_allclose(other[2], lower, rtol=1e-3)
                np.testing.assert_allclose(other[3], below, rtol=0.1)  # a weight may lie on the other side


@each_isa
def test_weights_are_chords(rng: np.random.Generator, isa: str) -> None:
    scan = Scan.of(rng.normal(size=(3, 64)) * 4, rng.normal(size=(200, 64)).astype(np.float32))
    weight, slack, _, _ = scan.run(isa)
    inside = scan.inside
    upper = (scan.exact + np.repeat(slack.astype(float), BLOCK, axis=1))[inside]
    chord = np.exp2(np.floor(upper)) * (1 + upper - np.floor(upper))
    # The slack is not used up: what it covers of the keys is lost twice at most.
    assert (np.abs(np.log2(weight[inside] / chord)) <= slack.max() * 1.1).all()
    assert np.median(np.abs(weight[inside] / chord - 1)) < 0.03


@each_isa
def test_scan_skips_blocks_without_cells(rng: np.random.Generator, isa: str) -> None:
    scan = Scan.of(rng.normal(size=(2, 64)), rng.normal(size=(256, 64)).astype(np.float32))
    scan.cells[:, 1:3] = 0
    scan.check(isa)
    assert (scan.run(isa)[1][:, 1:3] == 0).all()


@each_isa
def test_scan_of_hidden_cells_only(rng: np.random.Generator, isa: str) -> None:
    for n in (1, 64, 130):
        scan = Scan.of(rng.normal(size=(5, 64)), rng.normal(size=(n, 64)).astype(np.float32), hidden=1)
        for out in scan.run(isa):
            assert (out == 0).all()


@each_isa
def test_scan_from_a_later_block(rng: np.random.Generator, isa: str) -> None:
    scan = Scan.of(rng.normal(size=(3, 80)), rng.normal(size=(300, 80)).astype(np.float32))
    # Not the same to the last bit: the query's quantum belongs to the run of blocks.
    np.testing.assert_allclose(scan.run(isa, first=2)[0], scan.run(isa)[0][:, 2 * BLOCK :], rtol=1e-3)


@each_isa
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_a_query_that_is_not_finite_weighs_infinity(
    rng: np.random.Generator, isa: str, special: float
) -> None:
    for dim in (3, 40, 64):
        scan = Scan.of(rng.normal(size=(4, dim)), rng.normal(size=(130, dim)).astype(np.float32), hidden=0.2)
        before = scan.run(isa)[0]
        scan.query[2, dim - 1] = special
        weight = scan.run(isa)[0]
        assert (weight[2][scan.inside[2]] == np.inf).all() and (weight[2][~scan.inside[2]] == 0).all()
        np.testing.assert_array_equal(np.delete(weight, 2, axis=0), np.delete(before, 2, axis=0))


@each_isa
def test_scan_keeps_what_overflows(isa: str) -> None:
    # A weight beyond float32 or not a number reaches every threshold.
    keys = np.full((64, 64), 1e19, np.float32) * np.linspace(0.5, 1, 64, dtype=np.float32)[:, None]
    scan = Scan.of(np.full((1, 64), 1e19, np.float32), keys)
    scan.reference[:] = 0
    weight = scan.run(isa)[0]
    assert (weight == np.inf).all()
    none = np.zeros(1, np.uint64)
    kept, _ = core.select(isa, weight, np.array([3e38], np.float32), none, ~none)
    assert from_bits(kept).all()


@each_isa
def test_without_slack_the_bounds_fail(rng: np.random.Generator, isa: str) -> None:
    # The negative control: the checks above can fail.
    found = {}
    for dim in (16, 64, 128):
        for name, query, keys in adversaries(rng, 200, dim):
            if name in ("random", "peaked", "huge channel", "rounding traps"):
                scan = Scan.of(query.astype(np.float32), keys.astype(np.float32))
                assert scan.violations(isa) == 0
                found[name, dim] = scan.violations(isa, certified=False)
    assert min(found.values()) > 0 and sum(found.values()) > 500, found


@each_isa
def test_the_slack_is_small_enough_to_prune(rng: np.random.Generator, isa: str) -> None:
    # In nats, for scores that spread by 4: a term too many would show here.
    for dim, most in ((64, 0.35), (128, 0.45), (256, 0.65)):
        query = rng.normal(size=(4, dim)) * 4
        scan = Scan.of(query, rng.normal(size=(512, dim)).astype(np.float32))
        assert scan.run(isa)[1].max() / LOG2E < most


def test_lower_factor() -> None:
    for slack in np.concatenate([[0], np.exp(np.linspace(-20, 5, 400))]).astype(np.float32):
        assert 0 <= core.lower_factor(slack) <= 2.0 ** (-2 * float(slack)) / core.CHORD_EXCESS
    assert core.lower_factor(0.01) * core.CHORD_EXCESS > 0.98


def test_chord_excess() -> None:
    f = np.linspace(0, 1, 100_001)
    assert 1 <= ((1 + f) / np.exp2(f)).max() < core.CHORD_EXCESS < 1.0615
    assert core.lower_factor(np.inf) == 0


# Arguments that do not fit


def test_shapes_are_checked() -> None:
    x = np.zeros((2, 64), np.float32)
    head = x[:, 0].copy()
    cache = Stored.of(x).cache
    index = core.GridIndex(64, 0, 128)
    none = np.zeros(2, np.uint64)
    candidate = np.zeros(core.CANDIDATES, np.float32)
    below = np.zeros(core.CANDIDATES)
    for call in (
        lambda: core.dots("scalar", x[:, :63].copy(), cache),
        lambda: core.dots("scalar", x, cache, 1),
        lambda: core.dots("scalar", x, cache, cells=np.array([2], np.int32)),
        lambda: core.dots("scalar", x, cache, ahead=np.array([-1], np.int32)),
        lambda: core.dots("scalar", x, cache, gap=-1),
        lambda: core.largest("scalar", x[0, :0]),
        lambda: core.accumulate("scalar", x[:, :1].copy(), head, cache, x),
        lambda: core.accumulate("scalar", x, head[:1], cache, x),
        lambda: core.accumulate("scalar", x, head, cache, x[:, :63].copy()),
        lambda: core.sums_below("scalar", x[0, :63], candidate, below),
        lambda: core.sums_below("scalar", x[0], candidate[:7], below),
        lambda: core.select("scalar", x, head, none, none),
        lambda: core.select("scalar", x, head[:1], none[:1], none[:1]),
        lambda: core.select("scalar", x, head, none[:1], none),
        lambda: core.scan("scalar", index, none[None] + 1, x, head, head, candidate, 1.0),
        lambda: core.scan("scalar", index, none[None], x, head, head, candidate, 1.0, first=1),
        lambda: core.scan("scalar", index, none[None], x[:, :63].copy(), head, head, candidate, 1.0),
        lambda: core.scan("scalar", index, np.zeros((3, 2), np.uint64), x, head, head, candidate, 1.0),
        lambda: core.scan("scalar", index, none[None], x, head[:1], head, candidate, 1.0),
        lambda: core.scan("scalar", index, none[None], x, head, head, candidate[:8], 1.0),
        lambda: core.Cache(np.zeros((4, 64), np.uint8), "f64", 16),
        lambda: core.Cache(np.zeros((4, 66), np.uint8), "f32", 16),
        lambda: core.Cache(np.zeros((4, 34), np.uint8), "q8_0", 16),
        lambda: core.Cache(np.zeros((4, 18), np.uint8), "q4_0", 16),
        lambda: core.Cache(np.zeros((4, 128), np.uint8)[:, ::2], "f32", 16),
        lambda: core.rows_to_f32("scalar", cache, 1),
        lambda: core.rows_to_f32("scalar", cache, 0, np.array([2], np.int32)),
    ):
        with pytest.raises(ValueError):
            call()
