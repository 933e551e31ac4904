"""What ``Llama.louver_stats()`` returns."""

from __future__ import annotations

from typing import TypedDict


class HeadCertificate(TypedDict):
    """What one query head attended at the last step, and what that can have cost."""

    head: int
    tau: float  # every visible key with q.k >= tau was attended
    n_visible: int
    n_scanned: int
    n_attended: int
    delta: float  # bound on the softmax mass that was dropped
    error_bound: float  # bound on |output - dense attention's output|, the largest over the channels


class LayerCertificates(TypedDict):
    """The certificates of one query token in one layer."""

    layer: int
    stream: int
    token: int
    path: str
    heads: list[HeadCertificate]


class CheckCounts(TypedDict):
    """What the brute-force check found; all zero when it is off."""

    pairs: int
    misses: int
    bound_violations: int
    mass_violations: int


class IndexMemory(TypedDict):
    """Memory of the index; a cell here is one cell of one KV head."""

    bytes: int
    cells: int
    bytes_per_cell: float
    cache_bytes_per_cell: float
    share: float  # of the cache's own bytes
    blocks_built: int
    cells_encoded: int


class LouverStats(TypedDict):
    """Counts since the last reset, the index's memory now, and the certificates of the last step.

    ``attention`` counts attention computed, one per layer and query token, by the path that computed it;
    ``reasons`` says for the paths "stock" and "dense" why it was not Louver's. The sums, ``delta`` and
    ``error_bound`` are over the ``n_queries`` (layer, query token, query head) that stock did not compute.
    """

    attention: dict[str, int]
    reasons: dict[str, dict[str, int]]
    n_queries: int
    heads_uniform: int  # of n_queries: attended to all keys without a scan, because that was cheaper
    heads_in_full: (
        int  # the same on a GPU, because of a number that is not finite or too large, or of the mask
    )
    keys_visible: int
    keys_scanned: int
    keys_attended: int
    bytes_read: int
    bytes_dense: int
    delta_mean: float
    delta_max: float
    error_bound_max: float
    check: CheckCounts
    index: IndexMemory
    last_step: list[LayerCertificates]
