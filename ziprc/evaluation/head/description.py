"""What the base model is like on unseen prompts: the room that introspection has to work in.

pass@1, majority and oracle (any of k right), lengths and how much they vary within one prompt, overall and per
difficulty cell, and the best fixed style per cell: if one style were best everywhere, there would be nothing to
adapt.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziprc.evaluation.bootstrap import Resampling, rounded
from ziprc.evaluation.outcomes import Outcomes

LENGTH_PERCENTILES = (5, 50, 95)
MIN_STYLE_COUNT = 20  # rollouts of a style in a cell before it may be called the best


def majority_scores(
    group: NDArray[np.int64], answers: Sequence[str | None], score: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[P] score of the commonest answer of each prompt; tied answers share, no answer at all scores 0."""
    votes: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for g, answer, s in zip(group.tolist(), answers, score.tolist(), strict=True):
        if answer is not None:
            votes[g][answer].append(s)
    out = np.zeros(int(group.max()) + 1)
    for g, ballot in votes.items():
        top = max(len(scores) for scores in ballot.values())
        out[g] = np.mean([np.mean(scores) for scores in ballot.values() if len(scores) == top])
    return out


def describe_base(
    boot: Resampling, outcomes: Outcomes, answers: Sequence[str | None], confidence: float
) -> dict[str, Any]:
    """The numbers for all prompts together."""
    group, prompts = outcomes.group, boot.prompts
    samples = np.bincount(group, minlength=prompts)
    majority = majority_scores(group, answers, outcomes.score)
    oracle = np.zeros(prompts)
    np.maximum.at(oracle, group, outcomes.success.astype(float))
    shortest, longest = np.full(prompts, np.inf), np.zeros(prompts)
    np.minimum.at(shortest, group, outcomes.length)
    np.maximum.at(longest, group, outcomes.length)

    def per_prompt(values: NDArray[np.float64]) -> dict[str, float | None]:
        totals = boot.prompt_totals(np.stack([values, np.ones(prompts)], -1))
        return boot.quotient(lambda t: t[:, 0] / t[:, 1], totals).interval(confidence)

    return {
        "samples_per_prompt": rounded(samples.mean()),
        "pass_at_1": boot.ratio(outcomes.score).interval(confidence),
        "majority": per_prompt(majority),
        "oracle": per_prompt(oracle),
        "finished": boot.ratio(outcomes.finished).interval(confidence),
        "mean_length": boot.ratio(outcomes.length).interval(confidence),
        "length_percentiles": {
            str(p): rounded(v)
            for p, v in zip(LENGTH_PERCENTILES, np.percentile(outcomes.length, LENGTH_PERCENTILES), strict=True)
        },
        "length_ratio_within_prompt": {
            "median": rounded(np.median(longest / shortest)),
            "mean": per_prompt(longest / shortest),
        },
        "prompts_with_both_outcomes": rounded(np.mean(_mixed(outcomes, prompts))),
    }


def _mixed(outcomes: Outcomes, prompts: int) -> NDArray[np.bool_]:
    good = np.bincount(outcomes.group, outcomes.success, prompts)
    return (good > 0) & (good < np.bincount(outcomes.group, minlength=prompts))


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
    records = []
    for cell in sorted(set(cells.tolist())):
        in_cell = cells == cell
        inside = in_cell[outcomes.group]
        records.append(
            {
                "cell": cell,
                "prompts": int(in_cell.sum()),
                "pass_at_1": boot.ratio(np.where(inside, outcomes.score, 0.0), inside).interval(confidence),
                "majority": rounded(majority[in_cell].mean()),
                "mean_length": rounded(outcomes.length[inside].mean()),
                "styles": _styles(boot, outcomes, style, inside, confidence),
            }
        )
    for record in records:
        record["best_style"] = _best(record["styles"])
    return sorted(records, key=lambda r: -(r["pass_at_1"]["value"] or 0.0))


def _styles(
    boot: Resampling, outcomes: Outcomes, style: NDArray[np.str_], inside: NDArray[np.bool_], confidence: float
) -> list[dict[str, Any]]:
    counts = Counter(style[inside].tolist())
    out = []
    for name in sorted(counts):
        chosen = inside & (style == name)
        out.append(
            {
                "style": name or "none",
                "share": rounded(counts[name] / inside.sum()),
                "count": counts[name],
                "pass_at_1": boot.ratio(np.where(chosen, outcomes.score, 0.0), chosen).interval(confidence),
                "mean_length": rounded(outcomes.length[chosen].mean()),
            }
        )
    return out


def _best(styles: Sequence[dict[str, Any]]) -> str | None:
    eligible = [s for s in styles if s["style"] != "none" and s["count"] >= MIN_STYLE_COUNT]
    return max(eligible, key=lambda s: s["pass_at_1"]["value"])["style"] if eligible else None
