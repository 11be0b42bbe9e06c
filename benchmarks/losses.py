"""Losses and KL divergences from logits, in float64, a few positions at a time."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cusprun.errors import Failed

ROWS = 4  # positions per float64 softmax: 4 x 49152 x 8 bytes = 1.5 MB, which a cache holds


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p(target) per row in float64, (n,); ``logits`` (n, n_vocab), ``targets`` (n,)."""
    found = np.empty(len(targets))
    for part in _parts(len(targets)):
        rows = logits[part].astype(np.float64)
        _, log_sum = _exponentials(rows)
        found[part] = log_sum - rows[np.arange(len(rows)), targets[part]]
    return found


def divergences(
    logits: np.ndarray, reference: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Per row: loss, the reference's loss, KL(reference || this) in nats, whether both find one token likeliest.

    With logits z, p = softmax: KL(p || q) = sum p (z_p - z_q) - logsumexp z_p + logsumexp z_q, in float64.
    """
    n = len(targets)
    nll, reference_nll, kld, same = np.empty(n), np.empty(n), np.empty(n), np.empty(n, dtype=bool)
    for part in _parts(n):
        q, p = logits[part].astype(np.float64), reference[part].astype(np.float64)
        at = (np.arange(len(q)), targets[part])
        same[part] = q.argmax(axis=1) == p.argmax(axis=1)
        _, log_sum_q = _exponentials(q)
        weights, log_sum_p = _exponentials(p)
        nll[part], reference_nll[part] = log_sum_q - q[at], log_sum_p - p[at]
        np.subtract(p, q, out=p)
        kld[part] = np.einsum("ij,ij->i", weights, p) / weights.sum(axis=1) - log_sum_p + log_sum_q
    return nll, reference_nll, kld, same


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, min(start + ROWS, n)) for start in range(0, n, ROWS))


def _exponentials(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """exp(row - its largest), and ln of the sum of exp(row). Raises Failed where a logit is not a number."""
    largest = rows.max(axis=1, keepdims=True)
    weights = rows - largest
    np.exp(weights, out=weights)
    log_sum: np.ndarray = np.log(weights.sum(axis=1)) + largest[:, 0]
    if not np.isfinite(log_sum).all():
        raise Failed("the artifact's logits are not finite numbers: its weights are damaged")
    return weights, log_sum
