"""Every instruction set against float64 and against scalar, and the scan's bounds against exact scores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest

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
    padded,
    repair_all,
    store,
    to_bits,
)

DIMS = (1, 3, 16, 63, 64, 80, 96, 127, 128, 256)
COUNTS = (0, 1, 15, 16, 17, 63, 64)
N_QUERIES = tuple(range(1, 10))
SPECIAL = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-45, 3e38], np.float32)

each_isa = pytest.mark.parametrize("isa", ISAS)
each_dim = pytest.mark.parametrize("dim", DIMS)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def test_scalar_is_always_there() -> None:
    assert ISAS[-1] == "scalar"
    with pytest.raises(ValueError, match="sse9"):
        core.largest("sse9", np.zeros(1, np.float32))


# Conversion


@each_isa
@each_dim
@pytest.mark.parametrize("gap", [0, 1, 6, 64])
def test_rows_to_f32_is_exact(rng: np.random.Generator, isa: str, dim: int, gap: int) -> None:
    for dtype in DTYPES if dim % 32 == 0 else DTYPES[:3]:
        x = rng.normal(size=(70, 2, dim)).astype(np.float32)
        if dtype != "q8_0":
            x[0, :, : SPECIAL.size] = SPECIAL[:dim]
        x[1] *= 1e-6  # subnormal float16
        rows = Stored.of(x, dtype, gap)
        for head in range(2):
            expected = pad(rows.decoded()[:, head])
            np.testing.assert_array_equal(core.rows_to_f32(isa, rows.cache, head), expected)
            for n in COUNTS:
                cells = rng.integers(0, 70, n).astype(np.int32)
                ahead = rng.integers(0, 70, 5).astype(np.int32)
                out = core.rows_to_f32(isa, rows.cache, head, cells, ahead)
                np.testing.assert_array_equal(out, expected[cells])


@each_isa
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_every_half_is_converted_exactly(isa: str, dtype: str) -> None:
    data = np.arange(65536, dtype=np.uint16).reshape(512, 128).view(np.uint8)
    converted = core.rows_to_f32(isa, core.Cache(data, dtype, 128))
    np.testing.assert_array_equal(converted, load(data, dtype))


@each_isa
def test_every_q8_0_level_is_converted_exactly(isa: str) -> None:
    data = np.empty((64, 8, 34), np.uint8)
    data[:, :, :2] = np.linspace(-4, 4, 64).astype(np.float16).view(np.uint8).reshape(64, 1, 2)
    data[:, :, 2:] = np.arange(256, dtype=np.uint8).reshape(8, 32)
    data = data.reshape(64, -1)
    np.testing.assert_array_equal(core.rows_to_f32(isa, core.Cache(data, "q8_0", 256)), load(data, "q8_0"))


def test_the_reference_stores_what_it_loads(rng: np.random.Generator) -> None:
    x = rng.normal(size=(5, 64)).astype(np.float32)
    for dtype, error in {"f32": 0, "f16": 2**-11, "bf16": 2**-8, "q8_0": 2**-5}.items():
        np.testing.assert_allclose(load(store(x, dtype), dtype), x, atol=error * 4)


# Arithmetic


@each_isa
@each_dim
def test_dots(rng: np.random.Generator, isa: str, dim: int) -> None:
    for n_query in N_QUERIES:
        query = rng.normal(size=(n_query, dim)).astype(np.float32)
        for n in COUNTS:
            keys = rng.normal(size=(n, dim)).astype(np.float32)
            stride = n + n_query % 3
            out = core.dots(isa, pad(query), pad(keys), stride)
            assert np.isnan(out[:, n:]).all()
            # What score_error() in decode.cpp counts on.
            allowed = (2 * dim + 16) * UNIT * np.outer(norm_up(query), norm_up(keys))
            assert (np.abs(out[:, :n] - query.astype(float) @ keys.T.astype(float)) <= allowed).all()


@each_isa
def test_dots_carry_nan_and_infinity(rng: np.random.Generator, isa: str) -> None:
    keys = rng.normal(size=(20, 64)).astype(np.float32)
    keys[3, 5], keys[17, 63], keys[18, 0] = np.nan, np.inf, -np.inf
    query = np.ones((2, 64), np.float32)
    expected = core.dots("scalar", query, keys, 20)
    out = core.dots(isa, query, keys, 20)
    assert np.isnan(out[:, 3]).all() and (out[:, 17] == np.inf).all() and (out[:, 18] == -np.inf).all()
    np.testing.assert_array_equal(np.isfinite(out), np.isfinite(expected))


@each_isa
def test_largest(rng: np.random.Generator, isa: str) -> None:
    for n in (*COUNTS[1:], 65, 511, 513):
        x = rng.normal(size=n).astype(np.float32) - 10
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
def test_exp2_sum_far_below_and_nan(isa: str) -> None:
    x = np.array([-126.5, -140, -151, -1000, -1e30, 0, *[-300] * 20], np.float32)
    out, total = core.exp2_sum(isa, x, 1.0, 0.0)
    assert ((out >= 0) & (out <= 2.0**-126)).tolist() == [i != 5 for i in range(len(x))]
    assert total == 1
    for at in (0, 15, 16, 19):
        x = np.zeros(20, np.float32)
        x[at] = np.nan
        out, total = core.exp2_sum(isa, x, 1.0, 0.0)
        assert math.isnan(total) and np.isnan(out).sum() == 1 and math.isnan(out[at])


@each_isa
@each_dim
def test_accumulate(rng: np.random.Generator, isa: str, dim: int) -> None:
    for n_query in N_QUERIES:
        for n in COUNTS:
            weight = rng.exponential(size=(n_query, n + n_query % 3)).astype(np.float32)
            weight[:, n:] = np.nan
            values = pad(rng.normal(size=(n, dim)).astype(np.float32))
            rescale = rng.uniform(size=n_query).astype(np.float32)
            acc = rng.normal(size=(n_query, padded(dim))).astype(np.float32)
            out = core.accumulate(isa, weight, rescale, values, acc)
            w, v, start = (
                weight[:, :n].astype(float),
                values.astype(float),
                acc.astype(float) * rescale[:, None],
            )
            allowed = (n + 3) * UNIT * (np.abs(start) + w @ np.abs(v))
            assert (np.abs(out - (start + w @ v)) <= allowed).all()


# Weights


def some_weights(rng: np.random.Generator, n_query: int, n: int) -> Float:
    weight = np.exp2(rng.uniform(-60, 10, (n_query, n))).astype(np.float32)
    weight[rng.uniform(size=weight.shape) < 0.2] = 0
    return weight


@each_isa
@pytest.mark.parametrize("n", [0, 64, 448, 512, 576, 4160])
def test_sums_below(rng: np.random.Generator, isa: str, n: int) -> None:
    weight = some_weights(rng, 1, n)[0]
    candidate = np.sort(np.exp2(rng.uniform(-60, 10, 8))).astype(np.float32)
    if n:
        candidate[3] = np.sort(weight)[n // 2]  # not under itself
        weight[n // 3] = np.nan  # under nothing
        weight[n // 4] = np.inf
    start = rng.uniform(size=8)
    expected = [s + math.fsum(weight[weight < c]) for s, c in zip(start, candidate, strict=True)]
    np.testing.assert_allclose(core.sums_below(isa, weight, candidate, start), expected, rtol=2**-17)


@each_isa
def test_select(rng: np.random.Generator, isa: str) -> None:
    for n_query in N_QUERIES:
        for n_blocks in (0, 1, 2, 9):
            weight = some_weights(rng, n_query, n_blocks * BLOCK + 16)
            threshold = np.exp2(rng.uniform(-20, 10, n_query)).astype(np.float32)
            if n_blocks:
                weight[0, 5], weight[-1, 63] = np.nan, np.inf
                weight[0, 7] = threshold[0]
            kept = rng.integers(0, 2**64, n_blocks, np.uint64) & rng.integers(0, 2**64, n_blocks, np.uint64)
            reaches = ~(weight[:, : n_blocks * BLOCK] < threshold[:, None])
            out = core.select(isa, weight, threshold, kept)
            np.testing.assert_array_equal(out, kept | to_bits(reaches.any(0)))


@each_isa
def test_dropped_sums(rng: np.random.Generator, isa: str) -> None:
    for n_query in N_QUERIES:
        for n_blocks in (0, 1, 3, 8):
            weight = some_weights(rng, n_query, n_blocks * BLOCK + 16)
            kept = rng.integers(0, 2**64, n_blocks, np.uint64)
            kept[:1] = 2**64 - 1
            weight[:, 5:6] = np.nan  # kept, where there is a block
            out = core.dropped_sums(isa, weight, kept, n_blocks + 2)
            dropped = np.where(from_bits(kept), 0, weight[:, : n_blocks * BLOCK].astype(float))
            expected = dropped.reshape(n_query, n_blocks, BLOCK).sum(-1)
            np.testing.assert_allclose(out[:, :n_blocks], expected, rtol=2**-17)
            assert np.isnan(out[:, n_blocks:]).all()


@each_isa
def test_mask_to_bits(rng: np.random.Generator, isa: str) -> None:
    for n in (*COUNTS, 31, 32, 33, 65, 127, 129, 1000):
        visible = rng.uniform(size=n) < 0.5
        mask = np.where(visible, 0, -np.inf).astype(np.float16).view(np.uint16)
        mask[visible & (rng.uniform(size=n) < 0.3)] = 0x8000  # -0 is 0
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
    cells: Bits
    to_log2: float
    reference: Float
    candidate: Float
    exact: Double  # (n_query, n_blocks * 64) q.k * to_log2 - reference; -inf outside of `cells`

    @classmethod
    def of(
        cls, query: Float, keys: Float, *, dtype: str = "f32", scale: float = 1.0, hidden: float = 0.0
    ) -> Scan:
        rng = np.random.default_rng(len(keys) * 1000 + keys.shape[1])
        stored = Stored.of(keys, dtype)
        decoded = stored.decoded()[:, 0]
        query = np.ascontiguousarray(query, np.float32)
        to_log2 = float(np.float32(LOG2E / math.sqrt(keys.shape[1]) * scale))
        index = core.GridIndex(keys.shape[1], 0, len(keys))
        repair_all(index, np.ones(len(keys), bool), stored, None)
        indexed = np.array([index.indexed(b) for b in range(index.n_blocks)], np.uint64)
        cells = indexed & to_bits(rng.uniform(size=len(keys)) >= hidden)
        x = np.full((len(query), index.n_blocks * BLOCK), -np.inf)
        x[:, : len(keys)] = exact_dots(query, decoded) * to_log2
        reference = np.clip(x.max(1), -3e38, 3e38).astype(np.float32)
        x[:, ~from_bits(cells)] = -np.inf
        candidate = np.exp2(np.linspace(-20, 3, 8)).astype(np.float32)
        exact = x - reference[:, None].astype(float)
        return cls(query, decoded, index, cells, to_log2, reference, candidate, exact)

    def run(self, isa: str, certified: bool = True) -> tuple[Float, Float, Double, Double]:
        weight, slack, lower, below = core.scan(
            isa,
            self.index,
            self.cells,
            self.query,
            norm_up(self.query),
            self.reference,
            self.candidate,
            self.to_log2,
            certified,
        )
        n = self.index.n_blocks
        assert np.isnan(weight[:, n * BLOCK :]).all() and np.isnan(slack[:, n:]).all()
        return weight[:, : n * BLOCK], slack[:, :n], lower, below

    def violations(self, isa: str, certified: bool = True) -> int:
        """Cells whose exact weight exceeds the upper bound. A NaN weight is no bound, and is always kept."""
        weight = self.run(isa, certified)[0].astype(float)
        with np.errstate(divide="ignore"):
            return int((self.exact > np.log2(weight) + math.log2(1 + core.WEIGHT_ERROR)).sum())

    def check(self, isa: str) -> None:
        weight, slack, lower, below = self.run(isa)
        inside = from_bits(self.cells)
        assert (weight[:, ~inside] == 0).all()
        assert self.violations(isa) == 0
        assert (slack >= 0).all()
        if not np.isfinite(weight).all():
            return  # the sums are not finite either: decode() gives such a step to dense attention
        w = weight.astype(float)
        # Below, where the weight was not cut off.
        least = np.log2(w[:, inside]) - 2 * np.repeat(slack.astype(float), BLOCK, axis=1)[:, inside]
        cut = w[:, inside] <= 2.0**core.MIN_LOG2 * (1 + core.WEIGHT_ERROR)
        assert (cut | (self.exact[:, inside] >= least + math.log2(1 - core.WEIGHT_ERROR))).all()
        total = np.exp2(self.exact).sum(1) + 2.0**core.MIN_LOG2 * w.shape[1]
        assert (lower <= total * (1 + core.WEIGHT_ERROR)).all()
        factor = [[core.lower_factor(s) for s in head] for head in slack]
        expected = (w * np.repeat(factor, BLOCK, axis=1)).sum(1)
        np.testing.assert_allclose(lower, expected, rtol=core.WEIGHT_ERROR, atol=1e-37)
        under = [[math.fsum(head[head < c]) for c in self.candidate] for head in w]
        np.testing.assert_allclose(below, under, rtol=core.WEIGHT_ERROR, atol=1e-37)


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
    for large, small in ((1e28, 1e-36), (1e33, 1e-40)):
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
    yield "lost additions", *lost_additions(n, dim)


@each_isa
@each_dim
def test_scan_bounds_hold_against_adversaries(rng: np.random.Generator, isa: str, dim: int) -> None:
    for n in (1, 63, 130):
        for name, query, keys in adversaries(rng, n, dim):
            with np.errstate(over="ignore"):
                scan = Scan.of(query.astype(np.float32), keys.astype(np.float32), hidden=0.1)
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
@pytest.mark.parametrize("n_query", N_QUERIES)
def test_scan_serves_any_group(rng: np.random.Generator, isa: str, n_query: int) -> None:
    scan = Scan.of(rng.normal(size=(n_query, 80)) * 8, rng.normal(size=(150, 80)).astype(np.float32))
    scan.check(isa)
    alone = [Scan.of(q[None], scan.keys).run(isa)[0] for q in scan.query]
    np.testing.assert_array_equal(scan.run(isa)[0], np.concatenate(alone))


@pytest.mark.parametrize("dim", DIMS)
def test_isas_agree_on_the_scan(rng: np.random.Generator, dim: int) -> None:
    scan = Scan.of(rng.normal(size=(5, dim)) * 4, rng.normal(size=(200, dim)).astype(np.float32), hidden=0.5)
    weight, slack, lower, below = scan.run("scalar")
    for isa in ISAS:
        other = scan.run(isa)
        np.testing.assert_allclose(other[0], weight, rtol=1e-3)
        np.testing.assert_allclose(other[1], slack, rtol=1e-3)
        np.testing.assert_allclose(other[2], lower, rtol=1e-3)
        np.testing.assert_allclose(other[3], below, rtol=0.05)  # a weight may lie on the other side


@each_isa
def test_scan_skips_blocks_without_cells(rng: np.random.Generator, isa: str) -> None:
    scan = Scan.of(rng.normal(size=(2, 64)), rng.normal(size=(256, 64)).astype(np.float32))
    scan.cells[1] = scan.cells[2] = 0
    scan.exact[:, 64:192] = -np.inf
    scan.check(isa)
    assert (scan.run(isa)[1][:, 1:3] == 0).all()


@each_isa
def test_scan_from_a_later_block(rng: np.random.Generator, isa: str) -> None:
    scan = Scan.of(rng.normal(size=(3, 80)), rng.normal(size=(300, 80)).astype(np.float32))
    whole = scan.run(isa)[0]
    part = core.scan(
        isa,
        scan.index,
        scan.cells[2:],
        scan.query,
        norm_up(scan.query),
        scan.reference,
        scan.candidate,
        scan.to_log2,
        first=2,
    )[0]
    # Not the same to the last bit: the query's quantum belongs to the run of blocks.
    np.testing.assert_allclose(part[:, : 3 * BLOCK], whole[:, 2 * BLOCK :], rtol=1e-3)


@each_isa
def test_scan_keeps_what_overflows(isa: str) -> None:
    # A weight beyond float32 or not a number reaches every threshold.
    keys = np.full((64, 64), 1e19, np.float32) * np.linspace(0.5, 1, 64, dtype=np.float32)[:, None]
    scan = Scan.of(np.full((1, 64), 1e19, np.float32), keys)
    scan.reference[:] = 0
    weight = scan.run(isa)[0]
    assert not np.isfinite(weight).any()
    kept = core.select(isa, weight, np.array([3e38], np.float32), np.zeros(1, np.uint64))
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
        assert 0 <= core.lower_factor(slack) <= 2.0 ** (-2 * float(slack))
    assert core.lower_factor(0.01) > 0.98
    assert core.lower_factor(np.inf) == 0


# Arguments that do not fit


def test_shapes_are_checked(rng: np.random.Generator) -> None:
    x = np.zeros((2, 64), np.float32)
    index = core.GridIndex(64, 0, 128)
    none = np.zeros(2, np.uint64)
    eight = np.zeros(8, np.float32)
    for call in (
        lambda: core.dots("scalar", x, np.zeros((2, 80), np.float32), 2),
        lambda: core.dots("scalar", x, x, 1),
        lambda: core.dots("scalar", x[:, :63], x[:, :63], 2),
        lambda: core.largest("scalar", x[0, :0]),
        lambda: core.accumulate("scalar", x[:, :1], x[:, 0], x, x),
        lambda: core.sums_below("scalar", x[0, :63], eight, np.zeros(8)),
        lambda: core.sums_below("scalar", x[0], eight[:7], np.zeros(8)),
        lambda: core.select("scalar", x, x[:, 0], none),
        lambda: core.dropped_sums("scalar", x, none[:1], 0),
        lambda: core.scan("scalar", index, none + 1, x, x[:, 0], x[:, 0], eight, 1.0),
        lambda: core.scan("scalar", index, none, x, x[:, 0], x[:, 0], eight, 1.0, first=1),
        lambda: core.scan("scalar", index, none, x[:, :63], x[:, 0], x[:, 0], eight, 1.0),
        lambda: core.Cache(np.zeros((4, 64), np.uint8), "f64", 16),
        lambda: core.Cache(np.zeros((4, 66), np.uint8), "f32", 16),
        lambda: core.Cache(np.zeros((4, 34), np.uint8), "q8_0", 16),
        lambda: core.Cache(np.zeros((4, 128), np.uint8)[:, ::2], "f32", 16),
        lambda: core.rows_to_f32("scalar", Stored.of(x).cache, 1),
        lambda: core.rows_to_f32("scalar", Stored.of(x).cache, 0, np.array([2], np.int32)),
    ):
        with pytest.raises(ValueError):
            call()
