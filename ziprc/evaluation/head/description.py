"""What the base model is like on unseen prompts: the room that introspection has to work in.

pass@1, majority and oracle (any of k right), lengths and how much they vary within one prompt, overall and per
difficulty cell, and the best fixed style per cell: if one style were best everywhere, there would be nothing to
adapt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziprc.evaluation.accuracy import majority_scores
from ziprc.evaluation.bootstrap import Resampling, quotient, rounded
from ziprc.evaluation.outcomes import Outcomes

LENGTH_PERCENTILES = (5, 50, 95)
MIN_STYLE_COUNT = 20  # rollouts of a style in a cell before it may be called the best


def describe_base(
    boot: Resampling, outcomes: Outcomes, answers: Sequence[str | None], confidence: float
) -> dict[str, Any]:
    """The numbers for all prompts together."""
    group, prompts = outcomes.group, boot.prompts
    samples, good = np.bincount(group, minlength=prompts), np.bincount(group, outcomes.success, prompts)
    shortest, longest = np.full(prompts, np.inf), np.zeros(prompts)
    np.minimum.at(shortest, group, outcomes.length)
    np.maximum.at(longest, group, outcomes.length)
    percentiles = zip(LENGTH_PERCENTILES, np.percentile(outcomes.length, LENGTH_PERCENTILES), strict=True)

    def per_prompt(values: NDArray[np.float64]) -> dict[str, float | None]:
        return quotient(*boot.prompt_totals(values, np.ones(prompts))).interval(confidence)

    return {
        "samples_per_prompt": rounded(samples.mean()),
        "pass_at_1": boot.ratio(outcomes.score).interval(confidence),
        "majority": per_prompt(majority_scores(group, answers, outcomes.score)),
        "oracle": per_prompt((good > 0).astype(float)),
        "finished": boot.ratio(outcomes.finished).interval(confidence),
        "mean_length": boot.ratio(outcomes.length).interval(confidence),
        "length_percentiles": {str(p): rounded(v) for p, v in percentiles},
        "length_ratio_within_prompt": {
            "median": rounded(np.median(longest / shortest)),
            "mean": per_prompt(longest / shortest),
        },
        "prompts_with_both_outcomes": rounded(np.mean((good > 0) & (good < samples))),
    }


def describe_cells(
    boot: Resampling,
    outcomes: Outcomes,
    cells: NDArray[np.str_],
    answers: Sequence[str | None],
    styles: Sequence[str | None],
    confidence: float,
) -> list[dict[str, Any]]:
    """One record per difficulty cell, easiest first. `cells` are of every prompt, `styles` of every rollout."""
    majority = majority_scores(outcomes.group, answers, outcomes.score)
    style = np.array([s or "" for s in styles])

    def pass_at_1(inside: NDArray[np.bool_]) -> dict[str, float | None]:
        return boot.ratio(np.where(inside, outcomes.score, 0.0), inside).interval(confidence)

    records = []
    for cell in np.unique(cells).tolist():
        in_cell = cells == cell
        inside = in_cell[outcomes.group]
        found = []
        for name, count in sorted(Counter(style[inside].tolist()).items()):
            chosen = inside & (style == name)
            share, length = rounded(count / inside.sum()), rounded(outcomes.length[chosen].mean())
            record = {"style": name or "none", "share": share, "count": count}
            found.append(record | {"pass_at_1": pass_at_1(chosen), "mean_length": length})
        known = [s for s in found if s["style"] != "none" and s["count"] >= MIN_STYLE_COUNT]
        best = max(known, key=lambda s: s["pass_at_1"]["value"], default={"style": None})
        records.append(
            {
                "cell": cell,
                "prompts": int(in_cell.sum()),
                "pass_at_1": pass_at_1(inside),
                "majority": rounded(majority[in_cell].mean()),
                "mean_length": rounded(outcomes.length[inside].mean()),
                "styles": found,
                "best_style": best["style"],
            }
        )
    return sorted(records, key=lambda r: -(r["pass_at_1"]["value"] or 0.0))
