"""The stats in words."""

from __future__ import annotations

from .config import LouverConfig
from .stats import LouverStats


def certificate_lines(stats: LouverStats, config: LouverConfig) -> list[str]:
    """Which path ran and why, and what the certificates say; one line each."""
    lines = [paths_line(stats)]
    if stats["n_queries"]:
        lines.append(certificate_line(stats, config))
    if config.check:
        lines.append(check_line(stats))
    return lines


def paths_line(stats: LouverStats) -> str:
    """How often each path computed attention, with the reasons where it was not Louver's."""
    parts = []
    for path, n in stats["attention"].items():
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in stats["reasons"].get(path, {}).items())
        if n:
            parts.append(f"{path} {n:,}" + (f" ({reasons})" if reasons else ""))
    return "attention, by layer and token: " + ("; ".join(parts) or "none")


def certificate_line(stats: LouverStats, config: LouverConfig) -> str:
    """The bounds, and how much was read for them."""
    return (
        f"certificate: dropped mass at most {stats['delta_max']:.4f}, on average {stats['delta_mean']:.4f} "
        f"(epsilon {config.epsilon:g}, {config.guarantee}); "
        f"{stats['keys_attended'] / stats['keys_visible']:.1%} of the keys attended, "
        f"{stats['bytes_read'] / stats['bytes_dense']:.1%} of dense attention's bytes read; "
        f"index {stats['index']['share']:.0%} of the cache"
    )


def check_line(stats: LouverStats) -> str:
    """What brute force found."""
    check = stats["check"]
    return (
        f"check: {check['pairs']:,} keys scored by brute force, {check['misses']:,} missed; bounds broken: "
        f"{check['bound_violations']:,} of scores, {check['mass_violations']:,} of dropped mass"
    )
