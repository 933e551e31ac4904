"""Keys and queries that a bound or a float comparison gets wrong if anything is left out of its proof.

As a program: searches all of them with the instruction set of LOUVER_ISA and writes what was found to a file.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exact import DTYPES, METHODS, OPTIONS, f64, is_finite, name_of, scores, stored
from louver_llama import Index, Matches, _index

N = 150  # two blocks and a part of a third
EXTREMES = (-math.inf, -1e308, -(2.0**140), -0.0, 5e-324, 2.0**-298, 1.0, 2.0**140, 1e308, math.inf)


@dataclass
class Case:
    """Every query is searched for at every of its thresholds."""

    name: str
    keys: NDArray  # (N, dim)
    queries: NDArray[np.float32]  # (n, dim)
    tau: NDArray[np.float64]  # (n,)


def contents(rng: np.random.Generator, dim: int, most: float) -> Iterator[tuple[str, NDArray]]:
    """(N, dim) float64, up to about ``most``."""
    normal = rng.normal(size=(N, dim))
    yield "normal", normal
    yield "ties", rng.integers(-1, 2, (N, dim)) * 1.0
    yield "duplicates", normal[rng.integers(0, 5, N)]
    yield "all equal", np.broadcast_to(normal[0], (N, dim))
    yield "zero", np.zeros((N, dim))
    yield "negative zero", np.full((N, dim), -0.0)
    huge = normal.copy()
    huge[:, dim // 2] *= most / 8
    yield "one huge channel", huge
    odd = normal.copy()
    odd[::7] *= most / 8
    yield "some huge keys", odd
    yield "subnormal", rng.integers(-9, 10, (N, dim)) * 2.0**-149
    yield "half subnormal", rng.integers(-9, 10, (N, dim)) * 2.0**-24
    yield "the largest", most * (1 - rng.integers(0, 4, (N, dim)) * 2.0**-11) * rng.choice([-1, 1], (N, dim))
    yield "all magnitudes", normal * 2.0 ** rng.integers(-130, 100, (N, dim))
    pairs = normal.copy()
    pairs[:, 1::2] = -pairs[:, : dim - dim % 2 : 2] * (1 + rng.integers(-1, 2, (N, dim // 2)) * 2.0**-10)
    yield "cancelling", pairs
    yield "far from zero", 1000 + normal / 100
    broken = normal.copy()
    broken[rng.integers(0, N, 12), rng.integers(0, dim, 12)] = rng.choice([math.nan, math.inf, -math.inf], 12)
    yield "not finite", broken
    broken = broken.copy()
    broken[::2] = math.inf
    yield "mostly not finite", broken


def directions(rng: np.random.Generator, dim: int) -> NDArray[np.float32]:
    """Queries (n, dim) of all sizes."""
    plain = rng.normal(size=dim)
    with np.errstate(over="ignore"):
        found = [
            plain,
            np.ones(dim),
            np.zeros(dim),
            plain * 2.0**72,
            np.clip(plain * 2.0**126, -3.4e38, 3.4e38),
            plain * 2.0**-140,
            plain * 2.0 ** rng.integers(-120, 120, dim),
        ]
    return np.array(found).astype(np.float32)


def thresholds(rng: np.random.Generator, query: NDArray, keys: NDArray) -> list[float]:
    """At some keys' scores, an ulp to each side, and where nothing or all is found."""
    found = scores(query, keys)
    at = [x for i in rng.permutation(len(found))[:3] if math.isfinite(x := float(found[i]))]
    near = [float(np.nextafter(x, way)) for x in at for way in (-math.inf, math.inf)]
    return [*at, *near, *rng.choice(EXTREMES, 2).tolist()]


def cases() -> Iterator[Case]:
    """The same on every call."""
    rng = np.random.default_rng(7)
    for dtype in DTYPES:
        for dim in (1, 6, 67):
            most = 65504.0 if dtype == "float16" else 3.3e38
            for name, content in contents(rng, dim, most):
                keys = stored(np.clip(content, -most, most) if np.isfinite(content).all() else content, dtype)
                pairs = [(q, tau) for q in directions(rng, dim) for tau in thresholds(rng, q, keys)]
                yield Case(
                    f"{name}, {dtype}, {dim}",
                    keys,
                    np.array([query for query, _ in pairs]),
                    np.array([tau for _, tau in pairs]),
                )


def hugging(rng: np.random.Generator, dim: int) -> Case:
    """Keys whose scores lie within a few of float64's roundings of tau, on both sides."""
    query = rng.normal(size=dim).astype(np.float32)
    keys = rng.normal(size=(N, dim)).astype(np.float32)
    others = np.arange(dim) != dim // 2
    for key in keys:
        # One channel brings the score as close to 1 as a float32 can, a tiny one to one side.
        rest = math.fsum((f64(query) * f64(key))[others].tolist())
        key[dim // 2] = (1 - rest) / float(query[dim // 2])
    found = scores(query, keys[is_finite(keys)])
    tau = np.concatenate([found[:20], np.nextafter(found[:20], -9), np.nextafter(found[:20], 9), [1.0]])
    return Case(f"hugging, {dim}", keys, np.tile(query, (len(tau), 1)), tau)


def searches(case: Case) -> Iterator[tuple[str, Matches]]:
    """By every kind of index and every method that finds all matches."""
    for options in OPTIONS:
        index = Index.build(case.keys, n_threads=1, **options)
        for method in METHODS[options["kind"]]:
            yield f"{name_of(options)}-{method}", index.search(case.queries, case.tau, method=method)


def main(path: str) -> None:
    found = {}
    for i, case in enumerate(cases()):
        for how, matches in searches(case):
            found[f"{i}/{how}/offsets"], found[f"{i}/{how}/ids"] = matches.offsets, matches.ids
    np.savez(path, isa=_index.active_isa(), **found)


if __name__ == "__main__":
    main(sys.argv[1])
