"""How far one run's next-token distributions are from another's over the same text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]  # (steps, n_vocab)


@dataclass(frozen=True)
class Quality:
    """KL divergences in nats, and the share of steps whose most likely token is the same."""

    kl_mean: float
    kl_p95: float
    kl_max: float
    top1_agreement: float


def quality(reference: Logits, logits: Logits) -> Quality:
    """Compare ``logits`` with ``reference``, step by step."""
    kl = divergences(reference, logits)
    return Quality(
        kl_mean=float(kl.mean()),
        kl_p95=float(np.quantile(kl, 0.95)),
        kl_max=float(kl.max()),
        top1_agreement=float((reference.argmax(1) == logits.argmax(1)).mean()),
    )


def divergences(reference: Logits, logits: Logits) -> npt.NDArray[np.float64]:
    """KL(reference || logits) of each step, in nats."""
    return np.array([_divergence(r, p) for r, p in zip(reference, logits, strict=True)])


def _divergence(reference: Logits, logits: Logits) -> float:
    r, p = _log_softmax(reference), _log_softmax(logits)
    return float(np.exp(r) @ (r - p))


def _log_softmax(row: Logits) -> npt.NDArray[np.float64]:
    # In float64, because the divergences are small differences.
    shifted: npt.NDArray[np.float64] = row.astype(np.float64) - row.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted
