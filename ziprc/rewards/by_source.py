"""Which rule grades a prompt, by the data set that it is from: the registry of public reward data, as an explicit table.

Where a prompt is from is its `data_source` (of the column `extra`, as veRL's data have it), else its `source`. Rows are tried
in order and the first that names it decides. A name is a whole name, and a suffix has to stand at the end. The published
registry looks for suffixes anywhere and grades whatever it does not know as competition mathematics, so that a typo changes
rewards in silence; here an unknown name is an error before anything is graded. Code is not executed, and what needs a model
as grader is not asked for here: both are refused by name.

`compute_score` is the same for other trainers.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from ziprc.config.load import Config
from ziprc.config.shared import Grades
from ziprc.errors import UserError, nearest
from ziprc.rewards.base import Grade, Grader, Item
from ziprc.rewards.children import workers
from ziprc.rewards.grade import GradeGrader
from ziprc.rewards.gsm8k import Gsm8kGrader
from ziprc.rewards.hendrycks import HendrycksGrader
from ziprc.rewards.math import MathGrader
from ziprc.rewards.prime import PrimeGrader


@dataclass(frozen=True)
class Row:
    """Sources that are graded by `rule`, or why they are `refused`."""

    rule: str = ""
    names: tuple[str, ...] = ()
    suffix: str = ""
    any_case: bool = False
    refused: str = ""

    def has(self, source: str) -> bool:
        if self.suffix and source.endswith(self.suffix) and source != self.suffix:
            return True
        return (source.strip().lower() if self.any_case else source) in self.names


A_MODEL = "it is graded by a model, which is no rule: see train_online.arms.<name>.rubric and grades.judge"
TABLE = (
    Row("gsm8k", ("openai/gsm8k",)),
    Row("grade", ("grade",), any_case=True),
    Row("hendrycks", ("math",), any_case=True),
    Row("hendrycks", ("lighteval/MATH", "DigitalLearningGmbH/MATH-lighteval", "simplelr_qwen")),
    Row("math", suffix="_mathverify"),
    Row("prime", (
        "numina_aops_forum", "numina_synthetic_math", "numina_amc_aime", "numina_synthetic_amc", "numina_cn_k12",
        "numina_olympiads",
    )),
    Row(names=("codecontests", "apps", "codeforces", "taco"), refused="it is graded by running the code of a response"),
    Row(names=("HardVerify-Math",), suffix="_tinyv", refused=A_MODEL),
    Row("prime", suffix="_prime"),
    Row("prime", ("OLYMPIAD_BENCH", "MINERVA", "AMC", "AIME")),
    Row("math", ("aime2024", "amc2023", "gsm8k", "math500")),  # benchmarks of the task hub, which no published row names
)  # fmt: skip


def rule_of(source: str) -> tuple[str | None, str]:
    """The rule of a source, and why there is none."""
    row = next((row for row in TABLE if row.has(source)), None)
    if row is None:
        known = [
            name for row in TABLE if row.rule for name in (*row.names, *([f"…{row.suffix}"] if row.suffix else []))
        ]
        return None, f"no rule is known for it{nearest(source, known)}"
    return row.rule or None, row.refused


def source_of(item: Item) -> str:
    """Where the prompt of a response is from."""
    return str(item.extra.get("data_source") or item.source)


class BySourceGrader:
    """Every response by the rule of its prompt's source, whose name begins the rationale. It owns two rules' processes."""

    name = "by_source"

    def __init__(self, timeout_s: float, workers: int = 1, legacy: bool = False) -> None:
        self.symbolic = [MathGrader(timeout_s, workers), PrimeGrader(timeout_s, workers, legacy=legacy)]
        graders: list[Grader] = [Gsm8kGrader(), HendrycksGrader(), GradeGrader(), *self.symbolic]
        self.graders: Mapping[str, Grader] = {grader.name: grader for grader in graders}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for grader in self.symbolic:
            grader.__exit__(*error)

    def lacks(self, item: Item) -> str | None:
        rule, why = rule_of(source_of(item))
        if rule is None:
            return f"a source with a rule ('{source_of(item)}': {why})"
        return self.graders[rule].lacks(item)

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grades in the order of the items. UserError for a source without a rule."""
        by_rule: dict[str, list[int]] = defaultdict(list)
        for i, item in enumerate(items):
            rule, why = rule_of(source_of(item))
            if rule is None:
                raise UserError(f"grades.rule by_source: the source '{source_of(item)}': {why}.")
            by_rule[rule].append(i)
        found: dict[int, Grade] = {}
        for rule, rows in by_rule.items():
            grades = self.graders[rule].grade([items[i] for i in rows])
            for i, grade in zip(rows, grades, strict=True):
                why = f"{rule}: {grade.rationale}" if grade.rationale else rule
                found[i] = replace(grade, rationale=why)
        return [found[i] for i in range(len(items))]


def grader(config: Config) -> BySourceGrader:
    own = config.grades
    return BySourceGrader(own.timeout_s, workers(), own.style == "legacy")


# --- for other trainers ----------------------------------------------------------------------------------------------


class NoScore(RuntimeError):
    """A response that could not be graded: a time limit or a failure, of which nothing follows about the answer."""


class _Shared:
    """One grader of a process, asked by one thread at a time."""

    def __init__(self) -> None:
        self.lock, self.grader = threading.Lock(), BySourceGrader(Grades().timeout_s)

    def grade(self, item: Item) -> Grade:
        with self.lock, contextlib.ExitStack() as stack:
            stack.push(self.grader)  # whatever is interrupted half-way leaves no child that still answers it
            grade = self.grader.grade([item])[0]
            stack.pop_all()
        return grade


@functools.cache
def _shared(process: int) -> _Shared:
    return _Shared()  # a forked process must not talk to its parent's children


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any] | None = None
) -> float:
    """The score in [0, 1] of a response, by the rule of its data source: veRL's `custom_reward_function`.

    `ground_truth` is compared as text. `extra_info` is accepted and not read. Raises UserError for a source without a rule and
    for a truth that its rule cannot use, and NoScore where a time limit (5 s of CPU time) or a failure left the response without
    a grade: what that is worth is the trainer's to say.
    """
    item = Item((), solution_str, str(ground_truth), source=data_source)
    shared = _shared(os.getpid())
    if (lacking := shared.grader.lacks(item)) is not None:
        raise UserError(f"A response cannot be graded; what is missing is {lacking}.")
    grade = shared.grade(item)
    if grade.score is None:
        raise NoScore(f"{grade.status}: {grade.rationale}")
    return grade.score
