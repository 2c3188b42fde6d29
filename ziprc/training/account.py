"""What the progress table says of a rollout: collected while it is sampled, graded and learned from."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ziprc.engines.base import Response
from ziprc.rewards.base import RIGHT, Grade
from ziprc.tables.grades import GradeStatus
from ziprc.tables.rollouts import FinishReason

Row = dict[str, Any]
# Of a rollout, that are timed; the rest of it is the update.
PARTS = ("push", "generate", "grade", "rubric", "score", "judge")


@dataclass(frozen=True)
class Answer:
    """One graded response, as the processes tell each other. `score` is None where the grader failed."""

    prompt_id: str
    difficulty: str
    prompt_tokens: int
    length: int
    finished: bool
    score: float | None
    reason: str

    @property
    def right(self) -> bool:
        return self.score is not None and self.score >= RIGHT


@dataclass
class Rollout:
    """What is known of the rollout in progress."""

    window: int = 0
    probe: bool = False
    prompt_ids: list[list[int]] = field(default_factory=list)
    responses: list[Response] = field(default_factory=list)
    row: Row = field(default_factory=dict)
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    began: float = field(default_factory=time.monotonic)
    norms: list[float] = field(default_factory=list)
    log_ratios: list[Tensor] = field(default_factory=list)  # new over old policy: the tokens of each micro-batch
    mismatches: list[Tensor] = field(default_factory=list)  # trainer over sampler
    judged: list[Any] = field(default_factory=list)  # by a rubric (rubric.py)
    use: Any = None  # of a reasoning vocabulary, where there is one (vocabulary.py)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        before = time.monotonic()
        try:
            yield
        finally:
            self.seconds[part] += time.monotonic() - before


def described(answers: Sequence[Answer]) -> Row:
    """Counts, shares and lengths of the responses of all processes."""
    length, finished, right = (np.array([getattr(a, key) for a in answers]) for key in ("length", "finished", "right"))
    scores = [a.score for a in answers if a.score is not None]
    known, cells = length[right], defaultdict[str, list[int]](lambda: [0, 0])
    for answer in answers:
        cells[answer.difficulty][0] += 1
        cells[answer.difficulty][1] += answer.right
    return {
        "prompts": len({a.prompt_id for a in answers}), "responses": len(answers), "ungraded": len(answers) - len(scores),
        "tokens_prompt": sum(a.prompt_tokens for a in answers), "tokens_response": int(length.sum()),
        "success": float(right.mean()), "truncated": float((~finished).mean()),
        "success_finished": float(right[finished].mean()) if finished.any() else None,
        "score": float(np.mean(scores)) if scores else None,
        "length_mean": float(length.mean()), "length_max": float(length.max()),
        "right_length_mean": float(known.mean()) if len(known) else None,
        **{f"right_length_q{q}": float(np.quantile(known, q / 100)) if len(known) else None for q in (50, 95)},
        "by_difficulty": json.dumps(dict(sorted(cells.items()))),
        "by_reason": json.dumps(dict(sorted(Counter(a.reason for a in answers).items()))),
    }  # fmt: skip


def ratios(rollout: Rollout, clip_low: float, clip_high: float) -> dict[str, float]:
    """Of the new over the old policy, and of the trainer over the sampler, on the tokens of this process."""
    log = torch.cat(rollout.log_ratios).double().numpy()
    if not len(log):  # every response was cut, and is left out of the loss
        return {}
    ratio = np.exp(log)
    found = {
        "ratio_mean": ratio.mean(), "ratio_std": ratio.std(), "ratio_p95": np.quantile(ratio, 0.95),
        "log_ratio_mean": log.mean(), "log_ratio_std": log.std(),
        "ratio_outside": ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).mean(),
    }  # fmt: skip
    if rollout.mismatches:
        gap = torch.cat(rollout.mismatches).double().numpy()
        found |= {"mismatch_kl": (np.exp(gap) - gap - 1).mean(), "mismatch_max": np.abs(gap).max()}
    return {name: float(value) for name, value in found.items()}


def score_of(grade: Grade | None) -> float | None:
    """0 for a response that was cut (None); None where the grader failed."""
    return 0.0 if grade is None else grade.score


def reason_of(grade: Grade | None, ended: FinishReason) -> str:
    """Why a response has its score: `right`, `cut`, `given up`, the grader's failure, or its word before the first colon."""
    if grade is None:
        return "given up" if ended is FinishReason.ABORT else "cut"
    if grade.status != GradeStatus.GRADED:
        return str(grade.status)
    return "right" if grade.score == 1 else (grade.rationale or "wrong").partition(":")[0]
