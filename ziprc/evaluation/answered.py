"""What the answers of one policy to the test prompts were worth, in estimates that can be paired with another policy's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ziprc.evaluation.accuracy import majority_scores
from ziprc.evaluation.bootstrap import Estimate, Resampling, quotient
from ziprc.evaluation.outcomes import Outcomes, align, join_outcomes
from ziprc.tables.grades import GRADES
from ziprc.tables.rollouts import ROLLOUTS


@dataclass(frozen=True)
class Answered:
    """The test rollouts of one policy, and what they were worth."""

    rollouts: pa.Table
    outcomes: Outcomes
    boot: Resampling
    found: Mapping[str, Estimate]

    def within(self, window: int) -> Estimate:
        """Accuracy when a response may have `window` tokens: what is longer is cut, and wrong."""
        return self.boot.ratio(self.outcomes.score * (self.outcomes.length <= window))


def answered(
    reads: Mapping[str, Path], name: str, prompts: Sequence[str], replicates: int, seed: int, samples: int | None = None
) -> Answered:
    """Estimates over the given prompts, of the first `samples` responses to each (None: all).

    A prompt without a graded rollout counts in no mean, and is in no replicate's sum.
    """
    where = reads[f"grades/{name}"]
    rollouts, grades = ROLLOUTS.read(reads[f"rollouts/{name}"]), GRADES.read(where)
    if samples is not None:
        rollouts = rollouts.filter(pc.less(rollouts["sample_index"], samples))
    outcomes = join_outcomes(rollouts, grades, str(where))
    number = {prompt: n for n, prompt in enumerate(prompts)}
    group: NDArray[np.int64] = np.array([number[p] for p in outcomes.prompt_ids.to_pylist()])[outcomes.group]
    boot = Resampling(group, replicates, seed, len(prompts))
    answers = align(grades, outcomes.rollout_ids, str(where))["extracted_answer"].to_pylist()
    asked = (np.bincount(group, minlength=len(prompts)) > 0).astype(float)
    votes = majority_scores(group, answers, outcomes.score, len(prompts))
    found = {
        "accuracy": boot.ratio(outcomes.score), "majority": quotient(*boot.prompt_totals(votes, asked)),
        "tokens": boot.ratio(outcomes.length), "finished": boot.ratio(outcomes.finished),
    }  # fmt: skip
    return Answered(rollouts, outcomes, boot, found)
