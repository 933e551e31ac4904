"""A decode step against float64 dense attention: its output, its certificate, and the check beside it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from reference import ISAS, Double, Layer, Stored, core, make_layer, weights

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUPS = (1, 2, 3, 7, 8)
DTYPES = (
    ("f32", "f32"),
    ("f16", "f16"),
    ("bf16", "bf16"),
    ("q8_0", "q8_0"),
    ("f16", "q8_0"),
    ("q8_0", "f32"),
    ("bf16", "f16"),
)
LENGTHS = (1, 2, 63, 64, 65, 127, 500, 513, 1000, 1027)
ROUNDING = 1e-4  # of float32 sums, on top of every bound; outputs are up to 16 long


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(4)


def errors(layer: Layer, result: core.Decoded) -> Double:
    """|output - dense| of each head."""
    return np.linalg.norm(result.output - layer.dense(), axis=1)


def check_step(layer: Layer, result: core.Decoded, epsilon: float) -> None:
    """What is promised of a step that ran with ``check``."""
    assert result.outcome == "done"
    n_visible, n_head = int(layer.visible.sum()), len(layer.query)
    checked = result.checked
    assert (checked.misses, checked.bound_violations, checked.mass_violations) == (0, 0, 0)
    assert checked.pairs == (n_visible * n_head if epsilon > 0 else 0)
    for error, c in zip(errors(layer, result), result.certificates, strict=True):
        assert error <= c.error_bound + ROUNDING
        assert 0 <= c.delta <= epsilon * (1 + 1e-3)
        assert c.n_visible == n_visible
        assert 0 <= c.n_attended <= n_visible and c.n_scanned <= n_visible
    for h, keys, _ in layer.heads():
        # No more keys can reach tau than were attended.
        reach = keys[layer.visible].astype(float) @ layer.query[h].astype(float) >= result.certificates[h].tau
        assert reach.sum() <= result.certificates[h].n_attended


def attended(layer: Layer, **settings: float) -> NDArray[np.bool_]:
    """(n_head, n_kv): which cells the output holds, found without trusting any count.

    Values are replaced by unit vectors, as many cells at a time as there are channels, and compensation is
    off: a channel of the output is not zero exactly where its cell was attended.
    """
    n_kv, width = len(layer.visible), 256
    found = np.zeros((len(layer.query), n_kv), bool)
    for first in range(0, n_kv, width):
        v = np.zeros((n_kv, layer.keys.cache.n_head, width), np.float32)
        v[np.arange(first, min(first + width, n_kv)), :, np.arange(min(width, n_kv - first))] = 1
        probe = Layer(layer.query, layer.keys, Stored.of(v), layer.scale, layer.visible).build()
        result = probe.decode(compensate=False, **settings)
        found[:, first : first + width] = result.output[:, : n_kv - first] > 0
    return found


# Dense


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_epsilon_0_is_dense(rng: np.random.Generator, dim: int, dtypes: tuple[str, str]) -> None:
    if dim % 32 and "q8_0" in dtypes:
        dtypes = ("f16", "bf16")
    for n_kv in LENGTHS:
        for n_threads in (1, 3):
            layer = make_layer(rng, n_kv, key_dim=dim, dtypes=dtypes, n_gqa=1 + n_kv % 4)
            result = layer.decode(epsilon=0, n_threads=n_threads)
            assert result.outcome == "done"
            assert errors(layer, result).max() < ROUNDING
            for c in result.certificates:
                assert (c.n_visible, c.n_scanned, c.n_attended) == (n_kv, 0, n_kv)
                assert (c.delta, c.error_bound, c.tau) == (0, 0, -math.inf)


@pytest.mark.parametrize("hidden", ["blocks at the start", "blocks inside", "chunks", "random", "almost all"])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_epsilon_0_with_hidden_cells(rng: np.random.Generator, hidden: str, n_threads: int) -> None:
    # Scratch is full of huge numbers (testing.cpp): a block without visible cells must not look at them.
    n_kv = 1500
    cell = np.arange(n_kv)
    visible = {
        "blocks at the start": cell >= 130,
        "blocks inside": (cell < 64) | (cell >= 256),
        "chunks": (cell < 100) | (cell >= 1200),
        "random": rng.uniform(size=n_kv) < 0.5,
        "almost all": np.isin(cell, [700, 701, 1030]),
    }[hidden]
    layer = make_layer(rng, n_kv, visible=visible)
    result = layer.decode(epsilon=0, n_threads=n_threads)
    assert result.outcome == "done"
    assert errors(layer, result).max() < ROUNDING


def test_heads_of_very_different_scores_do_not_disturb_each_other(rng: np.random.Generator) -> None:
    # What one head's tile left behind must not become the next head's peak where a block is hidden.
    visible = np.ones(512, bool)
    visible[128:320] = False
    layer = make_layer(rng, 512, n_gqa=1, visible=visible)
    layer.query[0] *= 1e4
    layer.query[1] *= 1e-4
    for epsilon in (0, 0.05):
        result = layer.build().decode(epsilon=epsilon, recent=4)
        assert (
            result.outcome == "not_finite"
            or (errors(layer, result) <= [c.error_bound + ROUNDING for c in result.certificates]).all()
        )
    assert layer.decode(epsilon=0).outcome == "done"


# Sparse


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("n_gqa", GROUPS)
def test_every_shape_keeps_its_promises(rng: np.random.Generator, dim: int, n_gqa: int) -> None:
    for n_kv in (1, 65, 700, 1027):
        layer = make_layer(rng, n_kv, key_dim=dim, n_gqa=n_gqa, n_head_kv=1 + n_gqa % 3).build()
        for epsilon in (0.01, 0.1, 0.5):
            check_step(
                layer, layer.decode(epsilon=epsilon, check=True, recent=16, n_threads=1 + n_kv % 3), epsilon
            )


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_every_cache_type_keeps_its_promises(
    rng: np.random.Generator, dim: int, dtypes: tuple[str, str]
) -> None:
    if dim % 32 and "q8_0" in dtypes:
        dtypes = ("bf16", "f32")
    layer = make_layer(rng, 900, key_dim=dim, dtypes=dtypes, gap=10).build()
    for epsilon in (0.02, 0.2):
        for compensate in (True, False):
            result = layer.decode(epsilon=epsilon, compensate=compensate, check=True, n_threads=2)
            check_step(layer, result, epsilon)
            assert max(c.n_attended for c in result.certificates) < 900


@pytest.mark.parametrize("n_kv", LENGTHS)
def test_every_length_keeps_its_promises(rng: np.random.Generator, n_kv: int) -> None:
    layer = make_layer(rng, n_kv).build()
    for sinks, recent in ((0, 0), (0, 1), (4, 64), (2000, 0), (0, 2000)):
        for n_threads in (1, 2, 3):
            result = layer.decode(epsilon=0.05, sinks=sinks, recent=recent, check=True, n_threads=n_threads)
            check_step(layer, result, 0.05)
            assert all(c.n_scanned == n_kv for c in result.certificates)
            if max(sinks, recent) >= n_kv:
                assert all(c.n_attended == n_kv for c in result.certificates)
                assert errors(layer, result).max() < ROUNDING


def test_keys_and_values_of_different_dimension(rng: np.random.Generator) -> None:
    for key_dim, value_dim in ((192, 128), (64, 256), (128, 16), (80, 33)):
        layer = make_layer(rng, 600, key_dim=key_dim, value_dim=value_dim).build()
        check_step(layer, layer.decode(epsilon=0.05, check=True), 0.05)
        assert errors(layer, layer.decode(epsilon=0)).max() < ROUNDING


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.2, 0.5])
def test_concentrated_keys_are_pruned(rng: np.random.Generator, epsilon: float) -> None:
    layer = make_layer(rng, 5003, n_gqa=1).build()
    result = layer.decode(epsilon=epsilon, check=True, n_threads=2)
    check_step(layer, result, epsilon)
    for h, keys, _ in layer.heads():
        # Not many more than the fewest that hold 1 - epsilon of the mass, and the always kept ones.
        mass = np.sort(weights(layer.query[h], keys, layer.visible, layer.scale))[::-1].cumsum()
        fewest = int(np.searchsorted(mass, 1 - epsilon)) + 1
        n_attended = result.certificates[h].n_attended
        assert n_attended <= 2 * fewest + 100 and n_attended < 0.2 * 5003
        assert result.certificates[h].delta > 0.1 * epsilon


def test_uniform_attention_is_not_pruned_by_mistake(rng: np.random.Generator) -> None:
    layer = make_layer(rng, 1000, spread=0).build()
    result = layer.decode(epsilon=0.05, check=True, recent=0, sinks=0)
    check_step(layer, result, 0.05)
    assert all(c.n_attended >= 949 for c in result.certificates)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.5])
def test_the_attended_cells_seen_through_the_output(rng: np.random.Generator, epsilon: float) -> None:
    # Independent of every count: no key that reaches tau is missing, and delta bounds what is.
    visible = rng.uniform(size=1000) < 0.9
    for n_gqa in (1, 3):
        layer = make_layer(rng, 1000, n_gqa=n_gqa, visible=visible, spread=3).build()
        settings = {"epsilon": epsilon, "sinks": 5, "recent": 20}
        found = attended(layer, **settings)
        assert not found[:, ~visible].any()
        shown = np.flatnonzero(visible)
        assert found[:, shown[:5]].all() and found[:, shown[-20:]].all()
        for (h, keys, _), c in zip(layer.heads(), layer.decode(**settings).certificates, strict=True):
            dots = keys.astype(float) @ layer.query[h].astype(float)
            assert found[h, visible & (dots >= c.tau)].all()
            assert found[h].sum() == c.n_attended < 0.75 * 900
            share = weights(layer.query[h], keys, visible, layer.scale)
            assert share[~found[h, visible]].sum() <= c.delta <= epsilon * 1.001


def test_tau_is_right_to_the_last_key(rng: np.random.Generator) -> None:
    # Scores a hundredth of a nat apart, and nearly no slack: some dropped key lies just under every tau.
    n_kv, dim = 4000, 16
    keys = np.zeros((n_kv, 1, dim), np.float32)
    keys[:, 0, 0] = np.linspace(-20, 0, n_kv)
    query = np.eye(1, dim, dtype=np.float32)
    values = Stored.of(rng.normal(size=(n_kv, 1, 16)).astype(np.float32))
    layer = Layer(query, Stored.of(keys), values, 1.0, np.ones(n_kv, bool)).build()
    scores = keys[:, 0, 0].astype(float)
    for epsilon in np.geomspace(1e-3, 0.5, 12):
        result = layer.decode(epsilon=epsilon, check=True, sinks=0, recent=0)
        check_step(layer, result, epsilon)
        (c,) = result.certificates
        assert (scores >= c.tau).sum() <= c.n_attended <= (scores >= c.tau - 0.01).sum() + 1


def test_a_group_shares_its_survivors(rng: np.random.Generator) -> None:
    layer = make_layer(rng, 800, n_gqa=4, n_head_kv=2).build()
    found = attended(layer, epsilon=0.05, recent=8)
    for group in (found[:4], found[4:]):
        assert (group == group[0]).all()


@pytest.mark.parametrize(
    "mask", ["nothing", "first cell", "last cell", "one inside", "window", "every third", "two sequences"]
)
@pytest.mark.parametrize("epsilon", [0, 0.05])
def test_masks(rng: np.random.Generator, mask: str, epsilon: float) -> None:
    n_kv = 1100
    cell = np.arange(n_kv)
    visible = {
        "nothing": cell < 0,
        "first cell": cell == 0,
        "last cell": cell == n_kv - 1,
        "one inside": cell == 600,
        "window": (cell > 500) & (cell <= 860),
        "every third": cell % 3 == 0,
        "two sequences": (cell < 64) | ((cell >= 400) & (cell < 1024)),
    }[mask]
    layer = make_layer(rng, n_kv, visible=visible).build(np.ones(n_kv, bool))
    for n_threads in (1, 3):
        result = layer.decode(epsilon=epsilon, check=True, n_threads=n_threads, recent=10)
        check_step(layer, result, epsilon)
        if mask == "nothing":
            assert (result.output == 0).all()
            assert all((c.n_attended, c.delta, c.error_bound) == (0, 0, 0) for c in result.certificates)


def test_hidden_cells_do_not_matter(rng: np.random.Generator) -> None:
    visible = rng.uniform(size=700) < 0.6
    layer = make_layer(rng, 700, visible=visible, dtypes=("f32", "f32")).build()
    before = layer.decode(epsilon=0.05)
    for cell in np.flatnonzero(~visible):
        for head in range(2):
            layer.keys.write(cell, head, np.full(64, rng.choice([np.nan, np.inf, 1e30])))
            layer.values.write(cell, head, np.full(64, np.nan))
    layer.invalidate(0, 700)
    after = layer.build().decode(epsilon=0.05, check=True)
    assert after.outcome == "done"
    np.testing.assert_allclose(after.output, before.output, atol=1e-5)
    assert errors(layer, layer.decode(epsilon=0)).max() < ROUNDING


def test_unindexed_cells_are_attended(rng: np.random.Generator) -> None:
    for share in (0.0, 0.3, 0.95):
        layer = make_layer(rng, 777)
        indexed = rng.uniform(size=777) < share
        layer.build(indexed)
        result = layer.decode(epsilon=0.1, check=True, recent=0, sinks=0)
        check_step(layer, result, 0.1)
        for c in result.certificates:
            assert c.n_scanned == indexed.sum() and c.n_attended >= 777 - indexed.sum()
        if share == 0:
            assert errors(layer, result).max() < ROUNDING


# Threads


@pytest.mark.parametrize("epsilon", [0, 0.05])
def test_threads_agree_and_runs_repeat(rng: np.random.Generator, epsilon: float) -> None:
    for n_kv in (65, 1400, 5003):
        layer = make_layer(rng, n_kv, n_gqa=3).build()
        one = layer.decode(epsilon=epsilon, n_threads=1)
        for n_threads in (1, 2, 3, 5):
            runs = [layer.decode(epsilon=epsilon, n_threads=n_threads) for _ in range(3)]
            for run in runs:
                np.testing.assert_array_equal(run.output, runs[0].output)
                for c, first in zip(run.certificates, runs[0].certificates, strict=True):
                    assert (c.tau, c.delta, c.error_bound) == (first.tau, first.delta, first.error_bound)
            np.testing.assert_allclose(runs[0].output, one.output, atol=ROUNDING)
            for c, first in zip(runs[0].certificates, one.certificates, strict=True):
                assert c.n_attended == first.n_attended
                assert c.delta == pytest.approx(first.delta, rel=1e-3)


def test_check_changes_nothing(rng: np.random.Generator) -> None:
    layer = make_layer(rng, 900).build()
    plain, checked = layer.decode(), layer.decode(check=True)
    np.testing.assert_array_equal(plain.output, checked.output)
    assert plain.checked.pairs == 0


# Compensation, estimates


def test_compensation_reduces_the_mean_error(rng: np.random.Generator) -> None:
    mean = {}
    for compensate in (True, False):
        found = []
        for seed in range(8):
            # Values with a common part, as real ones have: what the mean of a block can give back.
            layer = make_layer(np.random.default_rng(seed), 1500, dtypes=("f16", "f32"))
            layer.values = Stored.of(layer.values.decoded() + 2)
            layer.build()
            result = layer.decode(epsilon=0.2, compensate=compensate, check=True)
            check_step(layer, result, 0.2)
            found.append(errors(layer, result))
        mean[compensate] = np.mean(found)
    assert mean[True] < 0.8 * mean[False]


def test_estimated_is_leaner_and_close(rng: np.random.Generator) -> None:
    layer = make_layer(rng, 3000, key_dim=128).build()
    certified, estimated = (layer.decode(epsilon=0.05, certified=c) for c in (True, False))
    assert (errors(layer, estimated) < 0.3).all()
    for sure, guess in zip(certified.certificates, estimated.certificates, strict=True):
        assert guess.n_attended <= sure.n_attended


# Negative controls: the check can fail


def test_a_stale_index_is_caught(rng: np.random.Generator) -> None:
    layer = make_layer(rng, 1000).build()
    check_step(layer, layer.decode(check=True), 0.05)
    cells = rng.choice(np.arange(100, 900), 50, replace=False)
    for cell in cells:
        for head in range(2):
            layer.keys.write(cell, head, layer.query[head * 2] / 4)  # heavy now, and nobody said so
    stale = layer.decode(check=True)
    assert stale.checked.bound_violations > 50
    assert stale.checked.misses > 50
    assert stale.checked.mass_violations > 0
    assert (errors(layer, stale) > [c.error_bound for c in stale.certificates]).any()
    for cell in cells:
        layer.invalidate(int(cell), 1)
    check_step(layer, layer.decode(check=True), 0.05)
    check_step(layer.build(), layer.decode(check=True), 0.05)


def test_a_scan_without_slack_is_caught(rng: np.random.Generator) -> None:
    layer = make_layer(rng, 2000, spread=8).build()
    assert layer.decode(epsilon=0.2, check=True).checked.bound_violations == 0
    assert layer.decode(epsilon=0.2, check=True, certified=False).checked.bound_violations > 1000


# What is not finite


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("epsilon", [0, 0.05])
def test_nan_and_infinity_are_never_decided_here(
    rng: np.random.Generator, dtype: str, special: float, epsilon: float
) -> None:
    for where in ("query", "keys", "values"):
        for cell in (0, 70, 600, 699):
            layer = make_layer(rng, 700, dtypes=(dtype, dtype))
            if where == "query":
                layer.query[1, cell % 64] = special
            else:
                stored = getattr(layer, where)
                x = stored.decoded()[cell, 1]
                x[cell % 64] = special
                stored.write(cell, 1, x)
            layer.build()
            for n_threads in (1, 2):
                result = layer.decode(epsilon=epsilon, n_threads=n_threads)
                if result.outcome == "not_finite":
                    assert np.isnan(result.output).all()  # as it came: not written
                else:
                    # A score of -inf weighs nothing, and the rest is finite.
                    assert where == "keys" and not math.isnan(special)
                    with np.errstate(invalid="ignore"):
                        expected = layer.dense()
                    assert np.isfinite(expected).all()
                    bound = [c.error_bound + ROUNDING for c in result.certificates]
                    assert (np.linalg.norm(result.output - expected, axis=1) <= bound).all()


@pytest.mark.parametrize("where", ["query", "keys", "values"])
@pytest.mark.parametrize("size", [1e10, 1e19, 1e30, 3e38])
@pytest.mark.parametrize("epsilon", [0, 0.05])
def test_overflow_is_never_silent(rng: np.random.Generator, where: str, size: float, epsilon: float) -> None:
    for one_cell in (True, False):
        layer = make_layer(rng, 700, dtypes=("f32", "f32"))
        if where == "query":
            layer.query *= np.float32(size / 10)
        else:
            stored = getattr(layer, where)
            for cell in [333] if one_cell else range(700):
                for head in range(2):
                    x = stored.decoded()[cell, head]
                    stored.write(cell, head, x / np.abs(x).max() * np.float32(size))
        result = layer.build().decode(epsilon=epsilon)
        if result.outcome == "done":
            assert np.isfinite(result.output).all()
            with np.errstate(all="ignore"):
                dense = layer.dense()
            largest = np.abs(layer.values.decoded()).max()
            for h, c in enumerate(result.certificates):
                # With scores this large their own rounding decides who wins, in dense attention too.
                if where == "values":
                    error = np.linalg.norm(result.output[h] - dense[h])
                    assert error <= c.error_bound + ROUNDING * max(1, largest)
                assert c.error_bound >= 0 and 0 <= c.delta <= 1


# Instruction sets


@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_decodes_the_same(isa: str) -> None:
    # The kernels are chosen once per process.
    script = """
import numpy as np
from reference import make_layer, core
from louver_llama import _core
import sys
assert _core.isa() == sys.argv[1]
for dim, dtypes in ((64, ("f16", "f16")), (80, ("bf16", "f32")), (128, ("q8_0", "q8_0"))):
    layer = make_layer(np.random.default_rng(5), 1100, key_dim=dim, dtypes=dtypes, n_gqa=3).build()
    dense = layer.dense()
    for epsilon in (0, 0.05):
        result = layer.decode(epsilon=epsilon, check=True, n_threads=2)
        checked = result.checked
        assert result.outcome == "done"
        assert checked.misses == checked.bound_violations == checked.mass_violations == 0
        for error, c in zip(np.linalg.norm(result.output - dense, axis=1), result.certificates):
            assert error <= c.error_bound + 1e-4
            assert epsilon == 0 or c.n_attended < 700
"""
    environment = {**os.environ, "LOUVER_ISA": isa}
    done = subprocess.run(
        [sys.executable, "-c", script, isa],
        cwd=Path(__file__).parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


# Arguments that do not fit


def test_arguments_are_checked(rng: np.random.Generator) -> None:
    layer = make_layer(rng, 100).build()
    other = make_layer(rng, 100, key_dim=80).build()
    short = make_layer(rng, 30).build()
    for changed in (
        {"query": other.query},
        {"query": layer.query[:3]},
        {"keys": other.keys},
        {"values": make_layer(rng, 100, n_head_kv=1).values},
        {"visible": np.ones(101, bool)},
        {"index": layer.index[:1]},
        {"index": other.index},
        {"index": short.index},
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": math.inf},
        {"scale": math.nan},
    ):
        with pytest.raises(ValueError):
            Layer(**{**vars(layer), **changed}).decode()
    for settings in (
        {"epsilon": 1.0},
        {"epsilon": -0.1},
        {"epsilon": math.nan},
        {"sinks": -1},
        {"recent": -1},
        {"n_threads": 0},
        {"n_threads": 17},
    ):
        with pytest.raises(ValueError):
            layer.decode(**settings)
