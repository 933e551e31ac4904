"""louver_llama.attention: as far from dense attention in float64 as its certificates say, and no farther."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from exact import DTYPES, KINDS, dense, dropped_mass, f64, heads, normal, stored
from louver_llama import Certificate, Index, attention
from louver_llama.oracles import (
    Budget,
    Fixed,
    Mass,
    Oracle,
    SampleGap,
    SampleMax,
    SampleMeanMax,
    SampleTopK,
    TopK,
)
from test_index_layouts import layouts

ROUNDING = 1e-5  # of float32 outputs, in units of the largest |value|
EVERY: list[Oracle] = [
    Fixed(1.0),
    Fixed(math.inf),
    SampleMax(32),
    SampleMeanMax(),
    SampleTopK(),
    SampleGap(),
    Budget(0.2),
    TopK(1),
    TopK(30),
    Mass(0.0),
    Mass(0.01),
    Mass(0.3),
    Mass(0.999),
]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(17)


@dataclass
class Problem:
    queries: NDArray[np.float32]  # (n_query, dim)
    keys: NDArray  # (n_head_kv, n, dim)
    values: NDArray  # (n_head_kv, n, value_dim)
    live: NDArray[np.bool_]  # (n,)

    @classmethod
    def random(
        cls,
        rng: np.random.Generator,
        *,
        n: int = 300,
        n_head_kv: int = 2,
        n_gqa: int = 2,
        dim: int = 16,
        value_dim: int = 16,
        dtype: str = "float32",
        spread: float = 3.0,
        removed: bool = True,
    ) -> Problem:
        live = np.ones(n, bool)
        if removed:
            live[5::7] = False
            live[64:128] = False
        return cls(
            normal(rng, n_head_kv * n_gqa, dim) * np.float32(spread),
            stored(normal(rng, n_head_kv, n, dim), dtype),
            stored(normal(rng, n_head_kv, n, value_dim) + np.float32(0.5), dtype),
            live,
        )

    def index(self, kind: str) -> Index:
        index = Index.build(self.keys, kind, merge_at=32)
        index.remove(np.flatnonzero(~self.live))
        return index

    def dense(self, scale: float | None = None) -> NDArray[np.float64]:
        scale = self.keys.shape[2] ** -0.5 if scale is None else scale
        return dense(self.queries, self.keys, self.values, self.live, scale)

    def rounding(self) -> float:
        return ROUNDING * float(np.linalg.norm(f64(self.values)[:, self.live], axis=2).max())

    def check(
        self, out: NDArray[np.float32], certificates: tuple[Certificate, ...], scale: float | None = None
    ) -> None:
        assert out.dtype == np.float32
        off = np.linalg.norm(out - self.dense(scale), axis=1)
        bounds = np.array([certificate.error_bound for certificate in certificates])
        assert (off <= bounds + self.rounding()).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("oracle", EVERY, ids=str)
def test_error_bound(rng: np.random.Generator, oracle: Oracle, compensate: bool, kind: str) -> None:
    for spread in (0.0, 0.3, 3.0, 30.0, 1000.0):
        problem = Problem.random(rng, spread=spread)
        index = problem.index(kind)
        out, certificates = attention(problem.queries, index, problem.values, oracle, compensate=compensate)
        problem.check(out, certificates)
        selection = index.select(problem.queries, oracle)
        for i, (certificate, match) in enumerate(zip(certificates, selection, strict=True)):
            assert not certificate.dense
            assert certificate.delta == selection.certificates[i].delta
            assert certificate.tau == selection.certificates[i].tau
            true = dropped_mass(problem.queries[i], problem.keys[i // 2], problem.live, match.ids, 0.25)
            assert true <= certificate.delta * (1 + 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_is_not_idle(rng: np.random.Generator, kind: str) -> None:
    """The negative control: outputs differ from dense by more than rounding, and a wrong one is found out."""
    problem = Problem.random(rng)
    out, certificates = attention(problem.queries, problem.index(kind), problem.values, Mass(0.3))
    assert np.linalg.norm(out - problem.dense(), axis=1).max() > 10 * problem.rounding()
    away = out + np.float32(2 * max(certificate.error_bound for certificate in certificates))
    with pytest.raises(AssertionError):
        problem.check(away, certificates)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n_head_kv", "n_gqa"), [(1, 1), (1, 5), (2, 1), (3, 9)])
@pytest.mark.parametrize("n", [1, 63, 64, 65, 400])
def test_epsilon_0_is_dense(rng: np.random.Generator, n: int, n_head_kv: int, n_gqa: int, kind: str) -> None:
    problem = Problem.random(rng, n=n, n_head_kv=n_head_kv, n_gqa=n_gqa, removed=False)
    queries = problem.queries.reshape(n_head_kv, n_gqa, -1)
    out, certificates = attention(queries, problem.index(kind), problem.values, Mass(0))
    assert out.shape == (n_head_kv, n_gqa, 16)
    assert len(certificates) == n_head_kv * n_gqa
    assert all(certificate.delta == certificate.error_bound == 0 for certificate in certificates)
    assert all(certificate.n_selected == n for certificate in certificates)
    assert np.abs(out.reshape(-1, 16) - problem.dense()).max() <= problem.rounding()


@pytest.mark.parametrize("kind", KINDS)
def test_compensation_helps(rng: np.random.Generator, kind: str) -> None:
    """Values with a common part: what is dropped is worth about its block's mean."""
    off = []
    for compensate in (True, False):
        problem = Problem.random(np.random.default_rng(3), n=2000, n_gqa=8, spread=2.0)
        queries, index = problem.queries, problem.index(kind)
        out, certificates = attention(queries, index, problem.values, TopK(200), compensate=compensate)
        problem.check(out, certificates)
        off.append(np.linalg.norm(out - problem.dense(), axis=1).mean())
    assert off[0] < 0.7 * off[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value_dim", [1, 15, 16, 33, 1024])
def test_values(rng: np.random.Generator, value_dim: int, dtype: str, kind: str) -> None:
    problem = Problem.random(rng, n=130, n_head_kv=1, value_dim=value_dim, dtype=dtype)
    index = problem.index(kind)
    plain, certificates = attention(problem.queries, index, problem.values, Mass(0.1))
    problem.check(plain, certificates)
    assert plain.shape == (2, value_dim)
    for name, values in layouts(problem.values[0]):
        out, _ = attention(problem.queries, index, values, Mass(0.1))
        assert np.array_equal(out, plain), name
    single, (certificate,) = attention(problem.queries[0], index, problem.values[0], Mass(0.1))
    assert single.shape == (value_dim,)
    assert np.array_equal(single, plain[0])
    assert certificate == certificates[0]
    everywhere = np.broadcast_to(problem.values[:, :1], problem.values.shape)
    out, _ = attention(problem.queries, index, everywhere, Mass(0.1))
    np.testing.assert_allclose(out, np.tile(f64(everywhere[0, :1]), (2, 1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_another_dtype_than_keys(rng: np.random.Generator, kind: str) -> None:
    problem = Problem.random(rng)
    index = problem.index(kind)
    for dtype in DTYPES:
        problem.values = stored(problem.values, dtype)
        problem.check(*attention(problem.queries, index, problem.values))
    cells_first = np.ascontiguousarray(problem.values.swapaxes(0, 1)).swapaxes(0, 1)
    problem.check(*attention(problem.queries, index, cells_first))
    problem.check(*attention(problem.queries, index, memoryview(f64(cells_first).astype(np.float32))))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 20, 1e6])
def test_scale(rng: np.random.Generator, scale: float, kind: str) -> None:
    problem = Problem.random(rng)
    index = problem.index(kind)
    for oracle in (Mass(0.05), TopK(10)):
        problem.check(*attention(problem.queries, index, problem.values, oracle, scale=scale), scale)
    # The negative control: the scale changes the result.
    assert not np.allclose(problem.dense(scale), problem.dense(0.5))


@pytest.mark.parametrize("kind", KINDS)
def test_defaults(rng: np.random.Generator, kind: str) -> None:
    problem = Problem.random(rng)
    index = problem.index(kind)
    out, certificates = attention(problem.queries, index, problem.values)
    same, _ = attention(problem.queries, index, problem.values, Mass(0.05), compensate=True, scale=16**-0.5)
    assert np.array_equal(out, same)
    assert all(certificate.delta <= 0.05 for certificate in certificates)
    none, nothing = attention(problem.queries[:0], index, problem.values)
    assert none.shape == (0, 16)
    assert nothing == ()


# NaN and infinities


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("oracle", EVERY, ids=str)
def test_removed_positions_are_not_read(rng: np.random.Generator, oracle: Oracle, kind: str) -> None:
    problem = Problem.random(rng)
    index = problem.index(kind)
    for compensate in (True, False):
        clean, _ = attention(problem.queries, index, problem.values, oracle, compensate=compensate)
        for bad in (math.nan, math.inf):
            values = problem.values.copy()
            values[:, ~problem.live] = bad
            out, certificates = attention(problem.queries, index, values, oracle, compensate=compensate)
            assert np.array_equal(out, clean)
            assert not any(certificate.dense for certificate in certificates)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("oracle", [Mass(0.0), Mass(0.3), TopK(3), Fixed(100.0), SampleMax()], ids=str)
def test_what_is_not_finite_gives_what_dense_gives(
    rng: np.random.Generator, oracle: Oracle, bad: float, compensate: bool, kind: str
) -> None:
    problem = Problem.random(rng, spread=1.0)
    clean, rounding = (problem.keys.copy(), problem.values.copy()), problem.rounding()
    queries = problem.queries
    for where in ("keys", "values"):
        problem.keys, problem.values = clean[0].copy(), clean[1].copy()
        getattr(problem, where)[0, 34, 2] = bad
        out, certificates = attention(
            queries, problem.index(kind), problem.values, oracle, compensate=compensate
        )
        np.testing.assert_allclose(out[:2], problem.dense()[:2], rtol=1e-5, atol=1e-5)
        assert [certificate.dense for certificate in certificates] == [True, True, False, False]
        # The other KV head has nothing to do with it.
        for i in (2, 3):
            assert np.linalg.norm(out[i] - problem.dense()[i]) <= certificates[i].error_bound + rounding


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_scores_of_either_sign(rng: np.random.Generator, kind: str) -> None:
    """A key at -infinity weighs nothing; one at +infinity, or NaN, spoils all, as it does with dense attention."""
    problem = Problem.random(rng, n=100, n_head_kv=1, n_gqa=1, removed=False)
    for factor, is_finite in ((-1.0, True), (1.0, False), (math.nan, False)):
        problem.keys[0, 50] = 0.5 * factor
        channel = int(np.abs(problem.queries[0]).argmax())
        problem.keys[0, 50, channel] = factor * math.inf * np.sign(problem.queries[0, channel])
        out, (certificate,) = attention(problem.queries, problem.index(kind), problem.values, Mass(0.1))
        assert certificate.dense
        assert np.isfinite(out).all() == is_finite
        np.testing.assert_allclose(out, problem.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_huge_values_and_keys(rng: np.random.Generator, kind: str) -> None:
    """Finite all the same: no step on the way may overflow."""
    problem = Problem.random(rng)
    problem.values *= np.float32(1e37)
    problem.check(*attention(problem.queries, problem.index(kind), problem.values, Mass(0.1)))
    problem.keys[:, ::9] *= np.float32(1e30)
    problem.values /= np.float32(1e37)
    for oracle in EVERY:
        out, certificates = attention(problem.queries, problem.index(kind), problem.values, oracle)
        problem.check(out, certificates)
        assert np.isfinite(out).all()


@pytest.mark.parametrize("kind", KINDS)
def test_random_shapes(rng: np.random.Generator, kind: str) -> None:
    for _ in range(30):
        problem = Problem.random(
            rng,
            n=int(rng.integers(1, 300)),
            n_head_kv=int(rng.integers(1, 4)),
            n_gqa=int(rng.integers(1, 10)),
            dim=int(rng.integers(1, 80)),
            value_dim=int(rng.integers(1, 80)),
            dtype=str(rng.choice(list(DTYPES))),
            spread=float(rng.choice([0.1, 1, 10])),
            removed=bool(rng.integers(2)),
        )
        if problem.live.any():
            oracle = EVERY[rng.integers(len(EVERY))]
            out, certificates = attention(
                problem.queries, problem.index(kind), problem.values, oracle, compensate=bool(rng.integers(2))
            )
            problem.check(out, certificates)
            assert len(heads(problem.values)) * (len(out) // len(problem.values)) == len(out)
