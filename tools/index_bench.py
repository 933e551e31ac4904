"""The index as a library beside NumPy and faiss: search, build, append, memory.

    python tools/capture.py -d 8192 -o capture.npz
    python tools/index_bench.py capture.npz

Keys and queries of a model, float32; heads are joined to --dim channels, layers follow each other until there
are --keys of them. For each query tau is the score that --share of the keys reach. All contenders answer each
query in one run: "in a row" each of them --repeat times after a third as many to warm up, the median counts, as a
benchmark of one function has it; "cold" each once, after another 160 MB were read and all threads fell asleep. A
ratio is the median over the queries of the other's time by ours, with the 10th and the 90th percentile. faiss-cpu
(IndexFlatIP.range_search) takes part where it is installed. Every answer of ours is compared with NumPy's in
float64.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import louver_llama as ll
from capture_file import library_keys
from louver_llama import _index
from louver_llama.machine import this_machine

Array = npt.NDArray[np.float32]
Search = Callable[[Array, float], Any]

# Seconds after which the threads of OpenBLAS and OpenMP, which spin for a while when their work is done, are asleep.
SETTLE = 0.06


def main() -> None:
    """Run the benchmark that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("capture", type=Path)
    parser.add_argument("--keys", type=int, default=100_000, metavar="N")
    parser.add_argument("--dim", type=int, default=128, metavar="N")
    parser.add_argument(
        "--share", type=float, default=0.01, help="of the keys that reach tau (default: 0.01)"
    )
    parser.add_argument("-r", "--rounds", type=int, default=20, metavar="N", help="queries")
    parser.add_argument("--repeat", type=int, default=45, metavar="N", help="of each search in a row")
    options = parser.parse_args()
    try:
        keys, queries = library_keys(options.capture, options.keys, options.dim)
    except (OSError, ValueError) as error:
        sys.exit(f"index_bench.py: {error}")
    machine = this_machine()
    print(f"{machine}\n\n{len(keys):,} keys of {options.dim} channels from {options.capture.name}, float32\n")
    print("| | time | beside it | ratio (10th to 90th percentile) |\n|---|---|---|---|")
    searches(keys, queries, options)
    builds(keys)
    appends(keys)


def searches(keys: Array, queries: Array, options: argparse.Namespace) -> None:
    """A search with the index, with NumPy and with faiss."""
    index = ll.Index.build(keys)
    contenders: dict[str, Search] = {
        "index": lambda q, tau: index.search(q, tau),
        "NumPy, keys @ q >= tau": lambda q, tau: keys @ q >= tau,
    }
    if flat := faiss_index(keys):
        contenders["faiss IndexFlatIP.range_search"] = lambda q, tau: flat.range_search(q[None], tau)
    other = np.ones(40_000_000, np.float32)
    rng = np.random.default_rng(0)
    in_a_row: dict[str, list[float]] = {name: [] for name in contenders}
    cold: dict[str, list[float]] = {name: [] for name in contenders}
    n_scored = 0
    for _ in range(options.rounds):
        q = np.ascontiguousarray(queries[rng.integers(len(queries))])
        scores = keys.astype(np.float64) @ q.astype(np.float64)
        tau = float(np.quantile(scores, 1 - options.share))
        n_scored += checked(index, q, tau, scores)
        for name, search in contenders.items():
            time.sleep(SETTLE)
            repeated = [timed(search, q, tau) for _ in range(options.repeat * 4 // 3)]
            in_a_row[name].append(float(np.median(repeated[-options.repeat :])))
        for name, search in contenders.items():
            other.sum()
            time.sleep(SETTLE)
            cold[name].append(timed(search, q, tau))
    share = n_scored / options.rounds / len(keys)
    print(f"| keys scored for the top {options.share:.0%} | {share:.2%} | | |")
    for how, times in (("in a row", in_a_row), ("cold", cold)):
        ours = np.array(times.pop("index"))
        for name, theirs in times.items():
            row(f"search, {how}", ours, name, np.array(theirs))


def checked(index: ll.Index, q: Array, tau: float, scores: npt.NDArray[np.float64]) -> int:
    """How many keys were scored; ends the program where the answer is not NumPy's in float64."""
    found = index.search(q, tau)
    rounding = 1e-9 * np.abs(scores).max()
    all_found = np.isin(np.flatnonzero(scores >= tau + rounding), found.ids).all()
    if not all_found or not (scores[found.ids] >= tau - rounding).all():
        sys.exit("index_bench.py: the index did not find the range")
    return found.stats.n_scored


def builds(keys: Array) -> None:
    """Building the index beside copying the keys."""
    for kind in (np.float32, np.float16):
        typed = keys.astype(kind)
        pairs = [(timed(ll.Index.build, typed), timed(typed.copy)) for _ in range(9)]
        build, copy = np.array(pairs).T
        row(f"build, {np.dtype(kind)}", build, "keys.copy()", copy, inverse=True)
    index = ll.Index.build(keys.astype(np.float16))
    megabytes = keys.size * 2 / 1e6
    print(
        f"| memory | {index.memory_usage.index / 1e6:.1f} MB | float16 keys, {megabytes:.1f} MB "
        f"| {index.stats.index_share:.3f} |"
    )


def appends(keys: Array) -> None:
    """Key by key from C++, at the end of an index that has them all."""
    typed = keys.astype(np.float16)
    index = ll.Index.build(typed)
    seconds = _index.time_appends(index._core, typed[np.newaxis, :50_000], "f16")
    print(f"| append of one key from C++, float16 | {seconds / min(50_000, len(keys)) * 1e6:.2f} us | | |")


def faiss_index(keys: Array) -> Any:
    """faiss's exact index, or None where faiss is not installed."""
    try:
        import faiss
    except ImportError:
        return None
    flat = faiss.IndexFlatIP(keys.shape[1])
    flat.add(keys)
    return flat


def timed(work: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def row(
    what: str,
    ours: npt.NDArray[np.float64],
    name: str,
    theirs: npt.NDArray[np.float64],
    inverse: bool = False,
) -> None:
    """A line of the table; the ratio is how much longer theirs takes, or with ``inverse`` ours."""
    ratio = ours / theirs if inverse else theirs / ours
    low, middle, high = np.percentile(ratio, [10, 50, 90])
    print(
        f"| {what} | {np.median(ours) * 1e3:.2f} ms | {name}, {np.median(theirs) * 1e3:.2f} ms "
        f"| {middle:.2f} ({low:.2f} to {high:.2f}) |"
    )


if __name__ == "__main__":
    main()
