"""Recall on a model's keys: grid, ball, and the method that the paper ships.

    python tools/capture.py -d 8192 -o capture.npz
    python tools/index_recall.py capture.npz

For layers and heads of the capture and the captured queries, tau is the score that --share of the keys reach.
Recall is the share of the keys with q.k >= tau that are found, "scored" the share of all keys that are scored
for it.

The shipped method (arXiv 2605.06763, its repository's "TA filter") is written anew here after its description:
4 subspaces, groups of 4 from a balanced tree of principal axes; groups sorted by the scores of their centroids,
which are float16, without radii; rows are read until the centroids' scores add up to less than tau, 256 at most.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

import louver_llama as ll
from capture_file import decoded, load_layers

N_SUBSPACES = 4
GROUP = 4
MOST_ROWS = 256

Array = npt.NDArray[np.float32]
Search = Callable[[Array, float], tuple[npt.NDArray[np.int64], int]]


class Shipped:
    """The paper's shipped filter over keys (n, dim). ``radii``: stop on upper bounds instead, and read on."""

    def __init__(self, keys: Array) -> None:
        self.keys = keys
        self.slices = np.array_split(np.arange(keys.shape[1]), N_SUBSPACES)
        self.members = [list(tree(keys[:, part])) for part in self.slices]
        self.centroids = [
            np.stack([keys[group][:, part].mean(0) for group in groups]).astype(np.float16)
            for part, groups in zip(self.slices, self.members, strict=True)
        ]

    def candidates(self, query: Array, tau: float) -> npt.NDArray[np.int64]:
        """The positions that are scored."""
        rounded = query.astype(np.float16)
        scores = [
            centroids.astype(np.float32) @ rounded[part].astype(np.float32)
            for part, centroids in zip(self.slices, self.centroids, strict=True)
        ]
        order = [np.argsort(-score, kind="stable")[:MOST_ROWS] for score in scores]
        rows = sum(score[best] for score, best in zip(scores, order, strict=True))
        below = np.flatnonzero(rows < tau)
        depth = int(below[0]) + 1 if len(below) else len(rows)
        read = [groups[g] for groups, best in zip(self.members, order, strict=True) for g in best[:depth]]
        return np.unique(np.concatenate(read))


def tree(points: Array) -> Iterator[npt.NDArray[np.int64]]:
    """Groups of near points: halves along the first principal axis until GROUP are left."""
    stack = [np.arange(len(points))]
    while stack:
        some = stack.pop()
        if len(some) <= GROUP:
            yield some
            continue
        centered = points[some] - points[some].mean(0)
        axis = np.linalg.eigh(centered.T @ centered)[1][:, -1]
        half = -(-len(some) // GROUP + 1) // 2 * GROUP if len(some) > 2 * GROUP else GROUP
        ranked = some[np.argsort(centered @ axis, kind="stable")]
        stack += [ranked[:half], ranked[half:]]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("capture", type=Path)
    parser.add_argument(
        "--share", type=float, default=0.01, help="of the keys that reach tau (default: 0.01)"
    )
    parser.add_argument(
        "--layers", type=int, default=10, metavar="N", help="spread over the model (default: 10)"
    )
    options = parser.parse_args()
    try:
        layers = list(load_layers(options.capture))
    except (OSError, ValueError) as error:
        sys.exit(f"index_recall.py: {error}")
    chosen = np.unique(np.linspace(0, len(layers) - 1, options.layers).astype(int))
    found: dict[str, list[tuple[float, float]]] = {}
    wanted_pairs = 0
    for layer in (layers[i] for i in chosen):
        keys = decoded(layer.k, layer.type_k)
        for head in range(layer.n_head_kv):
            of_head = np.ascontiguousarray(keys[:, head])
            methods = contenders(of_head)
            for query in layer.queries[:, head * (layer.n_head // layer.n_head_kv)]:
                scores = of_head.astype(np.float64) @ query.astype(np.float64)
                tau = float(np.quantile(scores, 1 - options.share))
                wanted = scores >= tau
                wanted_pairs += int(wanted.sum())
                for name, method in methods.items():
                    hits, scored = method(query, tau)
                    recall = np.isin(np.flatnonzero(wanted), hits).mean()
                    found.setdefault(name, []).append((float(recall), scored / len(of_head)))
    print(
        f"{options.capture.name}: {len(chosen)} layers, {wanted_pairs:,} pairs with q.k >= tau (top {options.share:.0%})\n"
    )
    print("| | recall, mean | recall, worst query | scored |\n|---|---|---|---|")
    for name, pairs in found.items():
        recall, scored = np.array(pairs).T
        print(f"| {name} | {recall.mean():.5f} | {recall.min():.5f} | {scored.mean():.1%} |")


def contenders(keys: Array) -> dict[str, Search]:
    """Each gives for a query and tau the positions found and how many keys were scored."""
    grid = ll.Index.build(keys)
    balls = {n: ll.Index.build(keys, "ball", n_subspaces=n) for n in (4, 16)}
    shipped = Shipped(keys)

    def by_index(index: ll.Index, method: str = "sum") -> Search:
        def search(query: Array, tau: float) -> tuple[npt.NDArray[np.int64], int]:
            matches = index.search(query, tau, method=method)
            return matches.ids, matches.stats.n_scored

        return search

    def by_shipped(query: Array, tau: float) -> tuple[npt.NDArray[np.int64], int]:
        candidates = shipped.candidates(query, tau)
        scores = keys[candidates].astype(np.float64) @ query.astype(np.float64)
        return candidates[scores >= tau], len(candidates)

    found = {"grid": by_index(grid)}
    for n, ball in balls.items():
        found[f"ball, {n} subspaces, sum of bounds"] = by_index(ball)
        found[f"ball, {n} subspaces, sweep"] = by_index(ball, "sweep")
    found["the paper's shipped method"] = by_shipped
    return found


if __name__ == "__main__":
    main()
