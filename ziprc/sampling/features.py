"""What the forward pass says about a branch besides the joint: running statistics of log-probability and entropy.

One update per token, the same code for a live batch and for recorded rollouts. The reading of position j has seen the
j tokens before it: `log_prob` is of the token just before, `entropy` of the state itself. Of log-probabilities there are the
mean, the lowest, the last window and the lowest window. Shapes: n branches, F features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ziprc.sampling.tree import Floats

FEATURES = ("tokens", "mean", "low", "window", "low window", "entropy", "high entropy", "slip")
DECAY = 1 / 8  # of the exponential window: about the last eight tokens
TOKENS, MEAN, LOW, WINDOW, LOW_WINDOW, ENTROPY, HIGH_ENTROPY, SLIP = range(len(FEATURES))


def fresh(count: int) -> NDArray[np.float32]:
    """[n, F] of branches before their first reading."""
    seen = np.zeros((count, len(FEATURES)), np.float32)
    seen[:, TOKENS] = -1
    return seen


def update(seen: Floats, log_prob: Floats, entropy: Floats) -> NDArray[np.float32]:
    """[n, F] after one more reading; `tokens` counts the tokens seen, 0 after the first reading, whose `log_prob` is ignored.

    `slip` is the number of tokens before the least likely one: where a branch might go another way.
    """
    tokens = seen[:, TOKENS] + 1
    log_prob = np.where(tokens > 0, log_prob, 0)
    share = np.where(tokens > 0, 1 / np.maximum(tokens, 1), 0)
    out = np.empty_like(seen)
    out[:, TOKENS] = tokens
    out[:, MEAN] = seen[:, MEAN] + (log_prob - seen[:, MEAN]) * share
    out[:, LOW] = np.minimum(seen[:, LOW], log_prob)
    out[:, WINDOW] = seen[:, WINDOW] + DECAY * (log_prob - seen[:, WINDOW])
    out[:, LOW_WINDOW] = np.minimum(seen[:, LOW_WINDOW], out[:, WINDOW])
    out[:, ENTROPY] = seen[:, ENTROPY] + (entropy - seen[:, ENTROPY]) / (tokens + 1)
    out[:, HIGH_ENTROPY] = np.maximum(seen[:, HIGH_ENTROPY], entropy)
    out[:, SLIP] = np.where(log_prob < seen[:, LOW], tokens - 1, seen[:, SLIP])
    return out
