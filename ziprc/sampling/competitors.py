"""The settings of every competitor that validation prompts choose from, at each token budget."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ziprc.joint.bins import BinGrid
from ziprc.sampling.policies.base import MAJORITY, SCORES, Baseline, Best, Reader, Source, Vote
from ziprc.sampling.policies.deepconf import DeepConfOffline, DeepConfOnline
from ziprc.sampling.policies.fixed import Fixed, FixedStyle
from ziprc.sampling.policies.pruning import LengthPruning, RandomPruning, ValuePruning
from ziprc.sampling.policies.stopping import AdaptiveConsistency, SequentialStop, StyleStop
from ziprc.sampling.score import Logistic

COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)
MOST = COUNTS[-1]
# Chosen on the validation prompts of the toy. Up to two samples the sharpness makes no difference.
SHARPNESS = {Source.MEAN: (20.0,), Source.LOW: (0.5,), Source.LOGISTIC: (1.0, 4.0), Source.VALUE: (1.5,)}
CAP_QUANTILES = (0.5, 0.7, 0.8, 0.9, 0.95)
THRESHOLDS = {
    Source.LOGISTIC: (0.4, 0.6, 0.7, 0.8, 0.9, 0.95),
    Source.VALUE: (0.25, 0.4, 0.55, 0.7),
    Source.MEAN: (0.9, 0.93, 0.95, 0.965, 0.98),
}
NEVER = float("inf")


def families(grid: BinGrid, logistic: Logistic, styles: int, lengths: ArrayLike) -> dict[str, list[Baseline]]:
    """Settings of every family, for validation prompts to choose from at each token budget.

    `styles` is the number of style codes (0: none), `lengths` those of validation rollouts, whose quantiles are the caps.
    """
    reader = Reader(grid, logistic)
    found: dict[str, list[Baseline]] = {"majority": [Fixed(reader, MAJORITY, k) for k in range(1, MOST + 1)]}
    for source in SCORES:
        first, *others = SHARPNESS[source]
        settings = [(first, k) for k in COUNTS] + [(power, k) for power in others for k in COUNTS if k > 2]
        found[f"vote-{source}"] = [Fixed(reader, Vote(source, power), k) for power, k in settings]
        found[f"best-{source}"] = [Fixed(reader, Best(source), k) for k in COUNTS]

    # Settings that cannot differ are left out: 0.7 stops after one vote; 0.95 and 0.99 need four and six equal ones.
    sure = [(0.7, MOST, 1)]
    sure += [(t, k, 1) for t in (0.8, 0.9, 0.95, 0.99) for k in (4, 8, 16, MOST) if t < 0.95 or k > 4]
    sure += [(t, k, 2) for t in (0.7, 0.95, 0.99) for k in (8, 16, MOST)]
    found["adaptive-consistency"] = [AdaptiveConsistency(reader, *own) for own in sure]
    for source, levels in THRESHOLDS.items():
        found[f"sequential-{source}"] = [SequentialStop(reader, source, t, MOST) for t in levels]
        if source is not Source.VALUE:
            found[f"sequential-{source}"] += [
                SequentialStop(reader, source, t, k) for t in levels[1::2] for k in (2, 3, 4)
            ]
    found["sequential-logistic"] += [SequentialStop(reader, Source.LOGISTIC, t, 6) for t in (0.6, 0.8, 0.95)]
    voting = [SequentialStop(reader, Source.LOGISTIC, t, MOST, vote=True) for t in (0.7, 0.8, 0.9, 0.95)]
    found["sequential-logistic"] += voting

    # Keeping 0.1 and 0.9 are the published "low" and "high".
    found["deepconf-offline"] = [DeepConfOffline(reader, k, keep) for k in (4, 8, 16, MOST) for keep in (0.5, 0.9)]
    sizes = ((6, 2), (8, 4), (16, 4), (MOST, 4))
    online = [DeepConfOnline(reader, k, w, keep, 0.9) for k, w in sizes for keep in (0.1, 0.5, 0.9)]
    online += [DeepConfOnline(reader, k, 1, 0.5, NEVER) for k in (2, 3, 4)]  # one sample has one quantile, and agrees
    found["deepconf-online"] = online

    found["value-pruning"] = [ValuePruning(reader, k, t) for k in (4, 8, 16) for t in (0.05, 0.1, 0.25)]
    found["random-pruning"] = [RandomPruning(reader, 8, rate) for rate in (0.02, 0.1)]
    caps = np.unique(np.ceil(np.quantile(lengths, CAP_QUANTILES)).astype(int))
    found["length-pruning"] = [LengthPruning(reader, 8, int(cap)) for cap in caps]
    if styles:
        found["fixed-style"] = [FixedStyle(reader, k, s) for s in range(styles) for k in (1, 4)]
        found["style-stop"] = [StyleStop(reader, s) for s in range(styles)]
    return found
