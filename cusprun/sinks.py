"""Attention sinks, and what the first tokens of a text are to a least-squares fit.

Later tokens attend to the first one where they have nothing to look for (attention sinks, Xiao et al. 2024), and for
that a few FFNs make its hidden state hundreds of times as large as any other (massive activations, Sun et al. 2024).
Two things follow for a fit that is to keep the model's function. Its error is mostly the sink's, although what follows
reads the sink through a norm, where a thousandth more or less tells nothing: so :func:`scales` makes such tokens no
louder than others may be. And a calibration window has one sink and, now and then, a second token that is half of one;
where too few were seen, the fit makes a sink of its own of another, and the rest of that window loses the thread: so
:func:`starts` gives more of them.
"""

from __future__ import annotations

import numpy as np
import torch

LOUDEST = 3.0  # times the median norm of the hidden states: an error at a token of more counts as if it had that norm
START = 8  # tokens of a short window
EVERY = 64  # tokens of a window, for one short window in them


def scales(norms: torch.Tensor) -> torch.Tensor:
    """What the error at each token is multiplied by, of the norms of the residual stream there, both (…)."""
    return (LOUDEST * norms.median() / norms.clamp_min(torch.finfo(norms.dtype).tiny)).clamp(max=1)


def starts(windows: np.ndarray) -> np.ndarray:
    """Short windows cut out of (n, window) ids at even distances, (short windows, START); none of windows too short.

    A short one out of an even window has an even number, so that both belong to the same half of the text.
    """
    pieces = windows.shape[1] // START
    places = np.linspace(0, pieces, windows.shape[1] // EVERY + 1, endpoint=False, dtype=np.int64)[1:]
    even = windows[: len(windows) // 2 * 2]
    cut = [even[:, place * START : (place + 1) * START] for place in places]
    return np.concatenate([np.empty((0, START), windows.dtype), *cut])
