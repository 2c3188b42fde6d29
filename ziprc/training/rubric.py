"""A rubric's word in the reward of a policy: who is asked, what it comes to, and what is written down about it.

Of a response the verdict p (is the answer right?) and the score s by the rubric are combined (rewards/combine.py); s is asked
for only where the setup needs it. What the task's program thinks of the work is written down beside it where there is one, and
moves nothing unless the program *is* the grader. A response without the score that its reward needs has no reward, and is left
out of its group. Credit to steps (after Step-wise Rubric Rewards, https://arxiv.org/abs/2605.17291): the tokens of a
step get, beside the response's advantage, the verdict on that step, compared within the group.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list, gather_object
from numpy.typing import NDArray

from ziprc.config.online import RubricReward
from ziprc.errors import Dark, UserError
from ziprc.rewards.base import RIGHT, Grade
from ziprc.rewards.combine import asks, combine
from ziprc.tables.grades import GradeStatus
from ziprc.tasks.base import AssessedTask, Assessment

Row = Mapping[str, Any]
Ask = Callable[[Sequence[tuple[Row, str]]], list[Grade]]  # prompts and whole responses
HIGH = 0.8  # a rubric's score of a wrong answer above which hacking is suspected
FULL = 0.95  # below it, of a right answer: a false positive is suspected
SMALL = 1e-4  # added to a deviation, as TRL does


@dataclass(frozen=True)
class Judged:
    """One response: the verdict on its answer, the grade by the rubric (None: not asked), the reward, and the program's word."""

    right: float | None
    grade: Grade | None
    reward: float | None
    program: Assessment | None

    @property
    def score(self) -> float | None:
        return None if self.grade is None else self.grade.score


@dataclass
class Work:
    """How the rubric is asked. `task` is the program that looks at work, where there is one; `ask` the grader of the reward."""

    own: RubricReward
    ask: Ask
    task: AssessedTask | None
    counts: Callable[[], Mapping[str, float]] = field(default=dict)  # of the client, since the last call

    def judge(
        self, rows: Sequence[Row], texts: Sequence[str], finished: Sequence[bool], right: Sequence[float | None]
    ) -> list[Judged]:
        """Every response, in order; only what the setup needs is asked. A cut response is wrong, and its work counts nothing."""
        wanted = [i for i in range(len(rows)) if finished[i] and asks(self.own.setup, right[i])]
        grades = dict(zip(wanted, self.ask([(rows[i], texts[i]) for i in wanted]), strict=True))
        judged = []
        for i, (row, text) in enumerate(zip(rows, texts, strict=True)):
            if not finished[i]:
                judged.append(Judged(right[i], None, 0.0, None))
                continue
            grade = grades.get(i)
            reward = combine(self.own.setup, right[i], None if grade is None else grade.score, self.own.weight)
            program = self.task.assess(json.loads(row["extra"]), text) if self.task is not None else None
            judged.append(Judged(right[i], grade, reward, program))
        return judged


def described(judged: Sequence[Judged]) -> dict[str, float | None]:
    """Columns of the progress table."""
    scores = [j.score for j in judged if j.score is not None]
    right = [j for j in judged if j.right is not None and j.right >= RIGHT]
    looked = [j.program.score == 1 for j in right if j.program is not None]
    wrong = [j for j in judged if j.score is not None and j.right is not None and j.right < RIGHT]
    graded = [j for j in right if j.score is not None]
    gaps = [abs(j.score - j.program.score) for j in judged if j.score is not None and j.program is not None]
    return {
        "asked": sum(j.grade is not None for j in judged),
        "unscored": sum(j.grade is not None and j.grade.status == GradeStatus.UNSCORED for j in judged),
        "unreadable": sum(
            j.grade is not None and j.grade.status not in (GradeStatus.GRADED, GradeStatus.UNSCORED) for j in judged
        ),
        "rubric_score": _mean(scores),
        "unsound": None if not looked else 1 - _mean(looked),
        "verified": _mean([j.right >= RIGHT and j.program.score == 1 for j in judged if j.program and j.right is not None]),
        "suspected_hacking": _mean([j.score > HIGH for j in wrong]),
        "suspected_false": _mean([j.score < FULL for j in graded]),
        "grader_gap": _mean(gaps),
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def judged_by_one(
    work: Work, accelerator: Any, own: tuple[list[Row], list[str], list[bool], list[float | None]]
) -> tuple[list[Judged], str | None]:
    """This process's responses (rows, texts, whether ended, verdicts), judged by the first process for all; or why it is dark."""
    parts, sent = gather_object([own]), [None, None]
    if accelerator.is_main_process:
        try:
            sent = [work.judge(*(list(itertools.chain.from_iterable(part)) for part in zip(*parts, strict=True))), None]
        except Dark as dark:
            sent = [None, str(dark)]
    found, dark = broadcast_object_list(sent)
    first = sum(len(part[1]) for part in parts[: accelerator.process_index])
    return (found or [])[first : first + len(own[1])], dark


def token_ends(tokenizer: Any, ids: Sequence[int]) -> NDArray[np.int64]:
    """[m] where the text of every token ends in the text of all, in characters."""
    return np.cumsum([len(tokenizer.decode([i], skip_special_tokens=False)) for i in ids])


def step_advantages(
    judged: Sequence[Judged], ids: Sequence[Sequence[int]], tokenizer: Any, group: int, weight: float
) -> list[NDArray[np.float32]]:
    """What to add to the advantage of every token of every response, [m] each.

    `group` responses of a prompt stand together; UserError where a group is cut between processes. A step's verdict, whether it
    has points from the grader, gets as its advantage what it is above the mean of the group's responses that have the step, over
    their deviation.
    """
    if len(judged) % group:
        raise UserError("credit: steps compares within a group, and here a group is cut between processes.")
    found = [np.zeros(len(tokens), np.float32) for tokens in ids]
    for first in range(0, len(judged), group):
        marks: dict[str, dict[int, float]] = {}
        for i in range(first, first + group):
            one = judged[i]
            points = json.loads(one.grade.parts) if one.grade is not None and one.grade.parts else {}
            for name in one.program.spans if one.program is not None else ():
                if name in points:
                    marks.setdefault(name, {})[i] = float(points[name] > 0)
        for name, of in marks.items():
            mean, deviation = np.mean(list(of.values())), np.std(list(of.values()))
            for i, mark in of.items():
                begin, end = judged[i].program.spans[name]
                at = token_ends(tokenizer, ids[i])
                found[i][(at > begin) & (at <= end)] += weight * (mark - mean) / (deviation + SMALL)
    return found
