"""louver_llama.attention against dense softmax in float64: what it certifies has to hold."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import louver_llama as ll
from exact import DTYPES, OPTIONS, Double, dense, f64, name_of, stored
from louver_llama import Index, oracles

each_kind = pytest.mark.parametrize("options", OPTIONS, ids=name_of)
N, DIM, VALUE_DIM = 400, 20, 7
ORACLES = [
    oracles.Mass(0.0),
    oracles.Mass(0.001),
    oracles.Mass(0.05),
    oracles.Mass(0.5),
    oracles.Fixed(2.0),
    oracles.Fixed(np.inf),
    oracles.TopK(5),
    oracles.SampleMax(n_samples=50),
    oracles.SampleMeanMax(n_samples=50),
    oracles.SampleTopK(3, n_samples=50),
    oracles.SampleGap(n_samples=50),
    oracles.Budget(0.2, n_samples=50),
]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def data(rng: np.random.Generator, n_head_kv: int = 2, n_gqa: int = 3) -> tuple[NDArray, NDArray, NDArray]:
    """Queries, keys and values with some mass here and some there."""
    keys = rng.normal(size=(n_head_kv, N, DIM)) * rng.uniform(0.3, 2, (n_head_kv, N, 1))
    values = rng.normal(size=(n_head_kv, N, VALUE_DIM)) + 3
    queries = rng.normal(size=(n_head_kv * n_gqa, DIM)) * 2
    return queries.astype(np.float32), keys.astype(np.float32), values.astype(np.float32)


def expect_bounded(
    output: NDArray, wanted: Double, certificates: tuple[ll.Certificate, ...], values: NDArray
) -> Double:
    """|output - dense| <= error_bound, up to the output's rounding; returns the errors."""
    error = np.linalg.norm(f64(output) - wanted, axis=-1)
    rounding = 1e-6 * np.abs(f64(values)[np.isfinite(f64(values))]).max() * values.shape[-1]
    bounds = np.array([certificate.error_bound for certificate in certificates])
    assert (error <= bounds + rounding).all(), (error, bounds)
    return error


@each_kind
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("oracle", ORACLES, ids=str)
def test_within_the_certified_error(
    rng: np.random.Generator, options: dict[str, object], compensate: bool, oracle: oracles.Oracle
) -> None:
    queries, keys, values = data(rng)
    index = Index.build(keys, **options)
    output, certificates = ll.attention(queries, index, values, oracle, compensate=compensate)
    assert output.shape == (6, VALUE_DIM) and output.dtype == np.float32
    wanted = dense(queries, keys, values, np.ones(N, bool), DIM**-0.5)
    error = expect_bounded(output, wanted, certificates, values)
    assert not any(certificate.dense for certificate in certificates)
    if oracle == oracles.Mass(0.0):
        assert (error < 1e-5).all()
        assert all(c.delta == c.error_bound == 0 and c.n_selected == N for c in certificates)
    if isinstance(oracle, oracles.Mass):
        assert all(certificate.delta <= oracle.epsilon for certificate in certificates)


def test_the_bound_can_fail(rng: np.random.Generator) -> None:
    """The negative control: values that moved behind the certificate's back."""
    queries, keys, values = data(rng)
    output, certificates = ll.attention(queries, Index.build(keys), values)
    wanted = dense(queries, keys, values + 20, np.ones(N, bool), DIM**-0.5)
    with pytest.raises(AssertionError):
        expect_bounded(output, wanted, certificates, values)


def test_compensation_helps(rng: np.random.Generator) -> None:
    queries, keys, values = data(rng)
    index = Index.build(keys)
    wanted = dense(queries, keys, values, np.ones(N, bool), DIM**-0.5)
    with_means, without = (
        np.linalg.norm(
            ll.attention(queries, index, values, oracles.Mass(0.3), compensate=c)[0] - wanted, axis=1
        ).mean()
        for c in (True, False)
    )
    assert with_means < 0.7 * without


@each_kind
def test_removed_positions_are_not_read(rng: np.random.Generator, options: dict[str, object]) -> None:
    queries, keys, values = data(rng)
    index = Index.build(keys, **options)
    gone = [0, 63, 64, 200, 399]
    index.remove(gone)
    live = np.ones(N, bool)
    live[gone] = False
    values[:, gone] = np.nan
    output, certificates = ll.attention(queries, index, values)
    expect_bounded(output, dense(queries, keys, values, live, DIM**-0.5), certificates, values)
    assert np.isfinite(output).all() and certificates[0].n_keys == N - 5


@each_kind
@pytest.mark.parametrize("where", ["keys", "values"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_what_dense_gives(
    rng: np.random.Generator, options: dict[str, object], where: str, bad: float
) -> None:
    queries, keys, values = data(rng)
    (keys if where == "keys" else values)[0, 100, 2] = bad
    output, certificates = ll.attention(queries, Index.build(keys, **options), values)
    wanted = dense(queries, keys, values, np.ones(N, bool), DIM**-0.5)
    np.testing.assert_allclose(output[:3], wanted[:3], rtol=1e-4, atol=1e-5)
    expect_bounded(output[3:], wanted[3:], certificates[3:], values)
    assert [certificate.dense for certificate in certificates] == [True] * 3 + [False] * 3


def test_shapes_and_scale(rng: np.random.Generator) -> None:
    queries, keys, values = data(rng)
    index = Index.build(keys)
    flat, _ = ll.attention(queries, index, values, scale=0.7)
    wanted = dense(queries, keys, values, np.ones(N, bool), 0.7)
    assert np.abs(flat - wanted).max() < 0.1
    by_head, _ = ll.attention(queries.reshape(2, 3, DIM), index, values, scale=0.7)
    np.testing.assert_array_equal(by_head, flat.reshape(2, 3, VALUE_DIM))
    one, certificates = ll.attention(queries[0], Index.build(keys[0]), values[0], scale=0.7)
    np.testing.assert_allclose(one, flat[0], rtol=1e-6)
    assert one.shape == (VALUE_DIM,) and len(certificates) == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_layouts_of_values(rng: np.random.Generator, dtype: str) -> None:
    queries, keys, values = data(rng)
    index = Index.build(keys)
    values = stored(values, dtype)
    output, _ = ll.attention(queries, index, values)
    wide = np.zeros((N, 2, 2 * VALUE_DIM), DTYPES[dtype])
    wide[:, :, ::2] = values.transpose(1, 0, 2)
    for same in (np.asfortranarray(values), wide.transpose(1, 0, 2)[:, :, ::2], values[:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(ll.attention(queries, index, same)[0], output)
    expect_bounded(
        output,
        dense(queries, keys, values, np.ones(N, bool), DIM**-0.5),
        ll.attention(queries, index, values)[1],
        values,
    )
    halves = queries.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        ll.attention(halves, index, values)[0], ll.attention(halves.astype(np.float32), index, values)[0]
    )


def test_far_and_huge_scores(rng: np.random.Generator) -> None:
    """Scores of thousands of log2 units: one key has all the mass."""
    queries, keys, values = data(rng)
    for factor in (1e3, 1e6, 1e12):
        index = Index.build(keys * np.float32(factor))
        output, certificates = ll.attention(queries, index, values)
        wanted = dense(queries, keys * np.float32(factor), values, np.ones(N, bool), DIM**-0.5)
        expect_bounded(output, wanted, certificates, values)
        assert all(certificate.delta <= 0.05 for certificate in certificates)
