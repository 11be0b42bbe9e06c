"""Gate, up and down of a narrowed FFN, one after the other, to what it is to give: kept where that is judged better."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import torch

from cusprun.gauss_newton import Batches, GatedFfn, improve, judged
from cusprun.gram import Gram
from cusprun.least_squares import fit

STEP_TOKENS = 2**15  # that the step of gate and up is found on, half as many again at most


def fit_jointly(ffn: GatedFfn, batches: Batches) -> GatedFfn:
    """The FFN nearer to the windows' targets, or itself where all of the change does not lower the error on those set
    aside to judge.

    Gate and up take the Gauss-Newton step of :func:`cusprun.gauss_newton.improve`, found on about STEP_TOKENS of the
    tokens; then down is fitted to the new inner activations of all of them, as :func:`cusprun.least_squares.fit` does.
    Both downs, the one that came and the new one, have seen the windows that judge.
    """
    better = improve(ffn, _thinned(batches))
    if better is ffn:
        return ffn
    hidden, channels = ffn.down.shape
    gram, start = Gram.empty(channels, hidden), 0
    for windows in batches():
        x, targets, scales = windows.tokens()
        gram.add_windows(better.inner(x) * scales, start, windows.targets.shape[1], targets * scales)
        start += len(windows.targets)
    down, _ = fit(ffn.down.double().cpu(), gram, torch.arange(channels))
    better = replace(better, down=down.to(ffn.down.device))
    return better if judged(better, batches) < judged(ffn, batches) else ffn


def _thinned(batches: Batches) -> Batches:
    """Batches at even distances that hold about STEP_TOKENS, all of them where there are little more."""
    tokens = sum(windows.targets.shape[0] * windows.targets.shape[1] for windows in batches())
    stride = max(1, round(tokens / STEP_TOKENS))
    return lambda: islice(batches(), 0, None, stride)
