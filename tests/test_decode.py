"""A decode step against float64 dense attention: its output, its certificate, and the check beside it."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from reference import (
    ISAS,
    Double,
    Float,
    Layer,
    Step,
    Stored,
    core,
    decode_together,
    make_layer,
    make_tokens,
    weights,
)

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
    ("q4_0", "q4_0"),
    ("f16", "q4_0"),
)
LENGTHS = (1, 2, 63, 64, 65, 127, 500, 513, 1000, 1027)
ROUNDING = 1e-4  # of float32 sums, on top of every bound; outputs are up to 16 long


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(4)


def errors(layer: Layer, result: Step) -> Double:
    """|output - dense| of each head."""
    return np.linalg.norm(result.output - layer.dense(), axis=1)


def check_step(layer: Layer, result: Step, epsilon: float) -> None:
    """What is promised of a step that ran with ``check``."""
    check_tokens([layer], [result], epsilon)


def check_tokens(tokens: list[Layer], results: list[Step], epsilon: float) -> None:
    """The same of each of several tokens that shared a scan."""
    checked = results[0].checked
    assert (checked.misses, checked.bound_violations, checked.mass_violations) == (0, 0, 0)
    pairs = sum(int(token.visible.sum()) * len(token.query) for token in tokens)
    assert checked.pairs == (pairs if epsilon > 0 else 0)
    for token, result in zip(tokens, results, strict=True):
        check_certificates(token, result, epsilon)


def check_certificates(layer: Layer, result: Step, epsilon: float) -> None:
    assert result.outcome == "done"
    n_visible = int(layer.visible.sum())
    for error, c in zip(errors(layer, result), result.certificates, strict=True):
        assert error <= c.error_bound + ROUNDING
        assert 0 <= c.delta <= epsilon
        assert c.n_visible == n_visible
        assert 0 <= c.n_attended <= n_visible and c.n_scanned <= n_visible
    for h, keys, _ in layer.heads():
        # No more keys can reach tau than were attended.
        reach = keys[layer.visible].astype(float) @ layer.query[h].astype(float) >= result.certificates[h].tau
        assert reach.sum() <= result.certificates[h].n_attended


def attended(layer: Layer, **settings: float) -> NDArray[np.bool_]:
    """(n_head, n_kv): which cells the output holds, found without trusting any count."""
    return attended_together([layer], **settings)[0]


def attended_together(tokens: list[Layer], **settings: float) -> NDArray[np.bool_]:
    """(n_token, n_head, n_kv): the same of tokens that share a scan.

    Values are replaced by unit vectors, as many cells at a time as there are channels, and compensation is
    off: a channel of the output is not zero exactly where its cell was attended.
    """
    layer = tokens[0]
    n_kv, width = len(layer.visible), 256
    found = np.zeros((len(tokens), len(layer.query), n_kv), bool)
    seen = np.any([token.visible for token in tokens], axis=0)
    for first in range(0, n_kv, width):
        v = np.zeros((n_kv, layer.keys.cache.n_head, width), np.float32)
        v[np.arange(first, min(first + width, n_kv)), :, np.arange(min(width, n_kv - first))] = 1
        probe = replace(layer, values=Stored.of(v), visible=seen, index=[]).build()
        probes = [replace(probe, query=token.query, visible=token.visible) for token in tokens]
        for t, result in enumerate(decode_together(probes, compensate=False, **settings)):
            found[t, :, first : first + width] = result.output[:, : n_kv - first] > 0
    return found


def tokens_of_scores(rng: np.random.Generator, scores: Float, n_head_kv: int) -> list[Layer]:
    """Tokens whose scores are given: (n_token, n_head, n_kv) in nats. Every query is a channel of its own."""
    n_token, n_head, n_kv = scores.shape
    n_gqa = n_head // n_head_kv
    n_query = n_token * n_gqa
    keys = (
        scores.reshape(n_token, n_head_kv, n_gqa, n_kv)
        .transpose(3, 1, 0, 2)
        .reshape(n_kv, n_head_kv, n_query)
    )
    values = rng.normal(size=(n_kv, n_head_kv, 32)).astype(np.float32)
    axes = np.eye(n_query, dtype=np.float32).reshape(n_token, n_gqa, n_query)
    shared = Layer(
        np.tile(axes[0], (n_head_kv, 1)), Stored.of(keys), Stored.of(values), 1.0, np.ones(n_kv, bool)
    )
    shared.build()
    return [replace(shared, query=np.tile(axis, (n_head_kv, 1))) for axis in axes]


# Dense


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_epsilon_0_is_dense(rng: np.random.Generator, dim: int, dtypes: tuple[str, str]) -> None:
    if dim % 32 and {"q8_0", "q4_0"} & set(dtypes):
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


@pytest.mark.parametrize("score", [-40, -640, -960, -3000])
def test_scores_far_below_zero_are_no_reason_for_zeros(score: float) -> None:
    # A weight of 2^(1.44 * score) is nothing even in float64; the weights' ratios are not.
    query = np.full((1, 16), 1.0, np.float32)
    keys = Stored.of(np.full((3, 1, 16), score / 16, np.float32))
    values = Stored.of(np.full((3, 1, 16), 2.0, np.float32))
    result = Layer(query, keys, values, 1.0, np.ones(3, bool)).decode(epsilon=0)
    assert result.outcome == "done"
    assert np.allclose(result.output, 2.0)


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
    if dim % 32 and {"q8_0", "q4_0"} & set(dtypes):
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


@pytest.mark.parametrize("length", [1e3, 1e4])
def test_one_long_key_does_not_spoil_the_certificate(rng: np.random.Generator, length: float) -> None:
    # A key outside the index, orthogonal to the queries: its score's float32 error is not that of the others.
    layer = make_layer(rng, 4096 + 64, dtypes=("f32", "f32"))
    keys, values = layer.keys.decoded().copy(), layer.values.decoded().copy()
    layer.query[:, 0] = 0
    keys[4100] = 0
    keys[4100, :, 0] = length
    long = Layer(layer.query, Stored.of(keys), Stored.of(values), layer.scale, layer.visible).build()
    long.invalidate(4100, 1)
    result = long.decode(epsilon=0.05, check=True)
    check_step(long, result, 0.05)
    assert all(c.delta < 0.05 and c.n_attended < 2000 for c in result.certificates)


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
    chord = math.log(core.CHORD_EXCESS)  # how far an upper weight may lie above the exact one
    sharp = 0
    for epsilon in np.geomspace(1e-3, 0.5, 50):
        result = layer.decode(epsilon=epsilon, check=True, sinks=0, recent=0)
        check_step(layer, result, epsilon)
        (c,) = result.certificates
        assert (scores >= c.tau).sum() <= c.n_attended <= (scores >= c.tau - 0.01 - chord).sum() + 1
        sharp += c.n_attended <= (scores >= c.tau - 0.01).sum() + 1
    assert sharp > 5


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
    for n_kv in (65, 1400, 12000):
        layer = make_layer(rng, n_kv, n_gqa=3).build()
        one = layer.decode(epsilon=epsilon, n_threads=1)
        for n_threads in (1, 2, 3, 5):
            runs = [layer.decode(epsilon=epsilon, n_threads=n_threads) for _ in range(3)]
            for run in runs:
                np.testing.assert_array_equal(run.output, runs[0].output)
                for c, first in zip(run.certificates, runs[0].certificates, strict=True):
                    assert (c.tau, c.delta, c.error_bound) == (first.tau, first.delta, first.error_bound)
            apart = np.linalg.norm(runs[0].output - one.output, axis=1)
            for d, c, first in zip(apart, runs[0].certificates, one.certificates, strict=True):
                # In short contexts every thread takes smaller chunks, and the sample is another one.
                same = epsilon == 0 or n_kv == 12000
                assert d <= ROUNDING + (0 if same else c.error_bound + first.error_bound)
                assert c.n_attended == pytest.approx(first.n_attended, rel=0 if same else 0.25)
                assert c.delta == pytest.approx(first.delta, rel=1e-3 if same else 0.5)


def test_check_changes_nothing(rng: np.random.Generator) -> None:
    layer = make_layer(rng, 900).build()
    plain, checked = layer.decode(), layer.decode(check=True)
    np.testing.assert_array_equal(plain.output, checked.output)
    assert plain.checked.pairs == 0


# Several tokens share a scan


def visibility(rng: np.random.Generator, kind: str, n_token: int, n_kv: int) -> NDArray[np.bool_]:
    """(n_token, n_kv)."""
    token, cell = np.arange(n_token)[:, None], np.arange(n_kv)
    causal = cell < n_kv - n_token + 1 + token
    return {
        "causal": causal,
        "alike": cell >= 0 * token,
        "disjoint": cell % n_token == token,
        "random": rng.uniform(size=(n_token, n_kv)) < 0.6,
        "one sees nothing": causal & (token != n_token // 2),
        "one sees one cell": np.where(token == 0, cell == n_kv // 2, causal),
        "windows": (cell >= 40 * token) & (cell < n_kv // 2 + 40 * token),
    }[kind]


VISIBILITIES = ("causal", "alike", "disjoint", "random", "one sees nothing", "one sees one cell", "windows")


@pytest.mark.parametrize("kind", VISIBILITIES)
@pytest.mark.parametrize("n_token", [2, 5, 16])
def test_tokens_that_share_a_scan_keep_their_promises(
    rng: np.random.Generator, n_token: int, kind: str
) -> None:
    for n_kv, n_gqa, dim in ((70, 1, 64), (700, 8, 40), (1100, 3, 128)):
        tokens = make_tokens(rng, visibility(rng, kind, n_token, n_kv), n_gqa=n_gqa, key_dim=dim)
        for epsilon in (0.01, 0.2):
            results = decode_together(tokens, epsilon=epsilon, check=True, recent=16, n_threads=1 + n_kv % 3)
            check_tokens(tokens, results, epsilon)
            for token, result in zip(tokens, results, strict=True):
                n_visible = token.visible.sum()
                assert all(c.n_scanned == n_visible for c in result.certificates)
                if n_visible == 0:
                    assert (result.output == 0).all()
                    assert all(
                        (c.n_attended, c.delta, c.error_bound) == (0, 0, 0) for c in result.certificates
                    )


@pytest.mark.parametrize("kind", VISIBILITIES)
@pytest.mark.parametrize("n_token", [2, 5, 16])
@pytest.mark.parametrize("n_threads", [1, 2])
def test_tokens_at_epsilon_0_are_dense_each(
    rng: np.random.Generator, n_threads: int, n_token: int, kind: str
) -> None:
    for n_kv in (70, 1500):
        tokens = make_tokens(rng, visibility(rng, kind, n_token, n_kv))
        together = decode_together(tokens, epsilon=0, n_threads=n_threads)
        check_tokens(tokens, together, 0)
        for token, result in zip(tokens, together, strict=True):
            alone = token.decode(epsilon=0, n_threads=n_threads)
            np.testing.assert_allclose(result.output, alone.output, atol=ROUNDING)
            for c, own in zip(result.certificates, alone.certificates, strict=True):
                assert (c.n_visible, c.n_attended, c.n_scanned) == (own.n_visible, own.n_attended, 0)
                assert (c.delta, c.error_bound, c.tau) == (0, 0, -math.inf)


@pytest.mark.parametrize("kind", VISIBILITIES)
def test_what_each_token_attends_seen_through_its_output(rng: np.random.Generator, kind: str) -> None:
    tokens = make_tokens(rng, visibility(rng, kind, 4, 800), spread=3)
    settings = {"epsilon": 0.1, "sinks": 5, "recent": 20}
    found = attended_together(tokens, **settings)
    for token, cells, result in zip(tokens, found, decode_together(tokens, **settings), strict=True):
        assert not cells[:, ~token.visible].any()
        shown = np.flatnonzero(token.visible)
        assert cells[:, shown[:5]].all() and cells[:, shown[-20:]].all()
        for (h, keys, _), c in zip(token.heads(), result.certificates, strict=True):
            dots = keys.astype(float) @ token.query[h].astype(float)
            assert cells[h, token.visible & (dots >= c.tau)].all()
            assert cells[h].sum() == c.n_attended
            if len(shown) > 0:
                share = weights(token.query[h], keys, token.visible, token.scale)
                assert share[~cells[h, token.visible]].sum() <= c.delta <= 0.1


def test_tokens_with_unindexed_cells(rng: np.random.Generator) -> None:
    # As in a real step: the last block has no grid yet, and the tokens' own cells lie there.
    tokens = make_tokens(rng, visibility(rng, "causal", 6, 1000))
    for token in tokens:
        token.invalidate(960, 40)
    results = decode_together(tokens, epsilon=0.1, check=True, recent=0, sinks=0)
    check_tokens(tokens, results, 0.1)
    for token, result in zip(tokens, results, strict=True):
        for c in result.certificates:
            assert c.n_scanned == 960 and c.n_attended >= token.visible[960:].sum()


@pytest.mark.parametrize("epsilon", [0, 0.05])
def test_one_token_that_is_not_finite_leaves_all_to_stock(rng: np.random.Generator, epsilon: float) -> None:
    tokens = make_tokens(rng, visibility(rng, "causal", 3, 500))
    tokens[1].query[0, 3] = math.nan
    for result in decode_together(tokens, epsilon=epsilon, n_threads=2):
        assert result.outcome == "not_finite" and np.isnan(result.output).all()


# Epsilon holds, whatever the scores


REFERENCE = [*range(4), *range(-12, 0)]  # the cells whose largest score is a query's reference


def scores_of(rng: np.random.Generator, kind: str, n_kv: int) -> Float:
    """(n_kv,) nats. "far": the reference lies 10 to 40 nats below the best key."""
    scores = rng.normal(size=n_kv) * 4
    if kind == "far one":
        scores[rng.integers(4, n_kv - 12)] = scores.max() + rng.uniform(10, 40)
    elif kind == "far many":
        scores[REFERENCE] = scores.max() - rng.uniform(10, 40)
    elif kind == "far plateau":
        scores = np.where(rng.uniform(size=n_kv) < 0.5, 0, -3) + rng.normal(size=n_kv) * 0.1
        scores[REFERENCE] = -rng.uniform(10, 40)
    elif kind == "far ramp":
        scores = np.linspace(0, rng.uniform(10, 40), n_kv)
        scores[REFERENCE] = 0
    elif kind == "uniform":
        scores *= 1e-3
    elif kind == "wide":
        scores *= 5
    return scores.astype(np.float32)


KINDS = ("usual", "far one", "far many", "far plateau", "far ramp", "uniform", "wide")


@pytest.mark.parametrize("seed", range(24))
def test_epsilon_holds_whatever_the_heads_of_a_group(seed: int) -> None:
    # Some heads' sampled thresholds end before epsilon does, and are raised; others' have to be lowered then.
    rng = np.random.default_rng(seed)
    n_head_kv, n_gqa, n_token = 2, int(rng.integers(1, 5)), int(rng.choice([1, 1, 2, 4]))
    n_kv = int(rng.integers(100, 3000))
    scores = [
        [scores_of(rng, rng.choice(KINDS), n_kv) for _ in range(n_head_kv * n_gqa)] for _ in range(n_token)
    ]
    tokens = tokens_of_scores(rng, np.array(scores), n_head_kv)
    for epsilon in (1e-3, 0.05, 0.3, 0.9):
        for sinks, recent in ((0, 0), (4, 64)):
            settings = {"epsilon": epsilon, "sinks": sinks, "recent": recent, "n_threads": 1 + seed % 3}
            check_tokens(tokens, decode_together(tokens, check=True, **settings), epsilon)


@pytest.mark.parametrize("kind", ["usual", "far many", "far ramp"])
def test_epsilon_is_used_up(rng: np.random.Generator, kind: str) -> None:
    # The control of the test above: mass is really dropped, so that epsilon could be exceeded.
    for epsilon in (0.01, 0.05):
        (token,) = tokens_of_scores(rng, np.array([[scores_of(rng, kind, 760)]]), 1)
        settings = {"epsilon": epsilon, "sinks": 0, "recent": 0}
        (c,) = token.decode(**settings).certificates
        share = weights(token.query[0], token.keys.decoded()[:, 0], token.visible, 1.0)
        truth = share[~attended(token, **settings)[0]].sum()
        assert 0.5 * epsilon < truth <= c.delta <= epsilon


# KV heads that are not scanned


@pytest.mark.parametrize("n_token", [1, 3])
@pytest.mark.parametrize("all_of", [[False, True, False], [True, True, True], [False, False, False]])
def test_heads_that_are_not_scanned(rng: np.random.Generator, all_of: list[bool], n_token: int) -> None:
    tokens = make_tokens(rng, visibility(rng, "causal", n_token, 1100), n_head_kv=3)
    for n_threads in (1, 2):
        settings = {"epsilon": 0.1, "check": True, "recent": 8, "n_threads": n_threads}
        plain = decode_together(tokens, **settings)
        mixed = decode_together(tokens, attend_all=all_of, **settings)
        check_tokens(tokens, mixed, 0.1)
        for token, result, scanned in zip(tokens, mixed, plain, strict=True):
            n_visible = token.visible.sum()
            error = errors(token, result)
            for h, (c, other) in enumerate(zip(result.certificates, scanned.certificates, strict=True)):
                if all_of[h // 2]:
                    assert (c.n_scanned, c.n_attended, c.tau) == (0, n_visible, -math.inf)
                    assert (c.delta, c.error_bound) == (0, 0) and error[h] < ROUNDING
                else:
                    for name in ("tau", "n_scanned", "n_attended", "delta", "error_bound"):
                        assert getattr(c, name) == getattr(other, name)
                    assert c.n_scanned == n_visible and c.n_attended < n_visible and c.delta > 0
                    np.testing.assert_allclose(result.output[h], scanned.output[h], atol=ROUNDING)


def test_heads_that_are_not_scanned_do_not_need_their_index(rng: np.random.Generator) -> None:
    layer = make_layer(rng, 700).build()
    for cell in range(100, 200):
        layer.keys.write(cell, 1, layer.query[2])  # and nobody said so
    assert layer.decode(check=True).checked.bound_violations > 0
    check_step(layer, layer.decode(check=True, attend_all=[False, True]), 0.05)


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
from reference import decode_together, make_tokens
from louver_llama import _core
import sys
assert _core.isa() == sys.argv[1]
causal = np.arange(1100) < np.arange(1098, 1101)[:, None]
for dim, *dtypes in ((64, "f16", "f16"), (80, "bf16", "f32"), (128, "q8_0", "q8_0"), (64, "q4_0", "q4_0")):
    tokens = make_tokens(np.random.default_rng(5), causal, key_dim=dim, dtypes=dtypes, n_gqa=1)
    for epsilon in (0, 0.05):
        for token, result in zip(tokens, decode_together(tokens, epsilon=epsilon, check=True, n_threads=2)):
            checked = result.checked
            assert result.outcome == "done"
            assert checked.misses == checked.bound_violations == checked.mass_violations == 0
            for error, c in zip(np.linalg.norm(result.output - token.dense(), axis=1), result.certificates):
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
        {"attend_all": [True]},
        {"attend_all": [True] * 3},
    ):
        with pytest.raises(ValueError):
            layer.decode(**settings)
