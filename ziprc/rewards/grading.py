"""Is each answer right? The one way in which finished responses are graded, recorded and live ones alike.

Equal answers to the same prompt are graded once, in an order that follows from their content: the rule first, then the
judge for what the rule does not call right. What prompts need is checked before anything is graded. Verdicts are kept in
pieces, so that a kill costs the verdicts of one piece, not of a whole night of a large judge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa

from ziprc.config.load import Config
from ziprc.errors import UserError, first_few
from ziprc.progress import progress
from ziprc.rewards.base import QUIET_S, Grade, Item, Verdict, decide, lacks_answer
from ziprc.systems.shared import check_grades
from ziprc.tables.check import TEXT, TableSchema, column
from ziprc.tables.grades import GRADES, GradeStatus
from ziprc.tables.pieces import Pieces, cut

ANSWERS_PER_PIECE = 2048

Row = Mapping[str, Any]
Answer = tuple[str, str]  # prompt_id, visible answer
VERDICTS = TableSchema(
    "verdicts",
    pa.schema([column("prompt_id", TEXT), column("answer", TEXT), *list(GRADES.columns)[1:]]),
    key=("prompt_id", "answer"),
    unit_range=GRADES.unit_range,
    choices=GRADES.choices,
    rule=GRADES.rule,
)


def check_gradable(config: Config, prompts: Mapping[str, Row], source: Path) -> None:
    """UserError when nobody is there to grade, or when prompts of the table `source` lack what a grader compares with."""
    check_grades(config)
    with rule_grader(config) as rule:
        if rule:
            _check_needs(prompts, rule.name, rule.lacks, source)
    if config.grades.judge:
        _check_needs(prompts, "judge", lacks_answer, source)


def _check_needs(prompts: Mapping[str, Row], grader: str, lacks: Callable[[Item], str | None], source: Path) -> None:
    lacking = {key: what for key, row in sorted(prompts.items()) if (what := lacks(Item.of(row, "")))}
    if lacking:
        missing = first_few(list(dict.fromkeys(lacking.values())))
        raise UserError(
            f"{source}: {len(lacking)} prompts lack {missing}, which the grader '{grader}' needs: "
            f"{first_few(list(lacking))}. Mend or drop them, or choose another grader (grades.rule)."
        )


def parts_of(answers: Iterable[Answer]) -> list[list[Answer]]:
    """What there is to grade, once each, in an order that follows from the content, cut into the parts of pieces."""
    wanted = sorted(set(answers))
    return [wanted[start:stop] for start, stop in cut(len(wanted), ANSWERS_PER_PIECE)]


def grade_answers(config: Config, prompts: Mapping[str, Row], pieces: Pieces) -> dict[Answer, Verdict]:
    """The verdict on every answer of the pieces (of VERDICTS, see `parts_of`); only missing ones are worked out.

    UserError when the judge is not at hand, or when more of its verdicts than allowed cannot be read.
    """
    missing, parts = pieces.missing(), pieces.parts
    total = sum(len(parts[number]) for number in missing)
    with (
        rule_grader(config) as rule,
        judge_grader(config) as judge,
        progress(total, "grades", "answers", after_s=QUIET_S) as bar,
    ):
        for number in missing:
            found = decide({(key, text): Item.of(prompts[key], text) for key, text in parts[number]}, rule, judge)
            rows = (
                {"prompt_id": key, "answer": text, "grader": verdict.grader, **vars(verdict.grade)}
                for (key, text), verdict in found.items()
            )
            pieces.write(number, VERDICTS.make(rows))
            bar.update(len(found))
        verdicts = dict(_verdict(row) for group in pieces.groups() for row in group.to_pylist())
        if judge:
            judge.check(verdict.grade for verdict in verdicts.values() if verdict.grader == judge.name)
    return verdicts


def _verdict(row: dict[str, Any]) -> tuple[Answer, Verdict]:
    answer, grader = (row.pop("prompt_id"), row.pop("answer")), row.pop("grader")
    return answer, Verdict(grader, Grade(**row | {"status": GradeStatus(row["status"])}))


def rule_grader(config: Config) -> AbstractContextManager[Any]:
    """The rule that the experiment names, or None. Its module is found by name: another rule is no change of this code."""
    rule = config.grades.rule
    return nullcontext() if rule == "none" else import_module(f"ziprc.rewards.{rule}").grader(config)


def judge_grader(config: Config) -> AbstractContextManager[Any]:
    """The judge, if the experiment has one, or None; its engine starts with the first question."""
    return import_module("ziprc.rewards.judge").grader(config) if config.grades.judge else nullcontext()
