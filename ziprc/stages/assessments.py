"""assessments: the teacher's word on every response, the whole of it and not its answer alone.

A table of grades whose `rationale` is the teacher's text (what a grader is taught to write), whose `parts` are points by item,
and whose `extracted_answer` is, where a program is the teacher, how the response goes about it. Full marks are sound work.
Unlike in `grades`, responses with the same answer are not one response: that would hide the very thing that is measured.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from ziprc.errors import UserError, first_few
from ziprc.rewards.base import Grade, ungraded
from ziprc.rewards.rubric import assessed, question_of, read_total, render
from ziprc.rewards.writing import WrittenBy
from ziprc.stages.context import Context, run_stage
from ziprc.tables.grades import GRADES, GradeStatus
from ziprc.tables.pieces import cut
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS, FinishReason
from ziprc.tables.rubrics import RUBRICS
from ziprc.tasks.base import AssessedTask, get_task

PER_PIECE = 4096
Row = dict[str, Any]


def by_program(task: AssessedTask, rows: list[Row], prompts: dict[str, Row]) -> list[Grade]:
    """The program of the task looks at the work."""
    extras = {name: json.loads(prompts[name]["extra"]) for name in {row["prompt_id"] for row in rows}}
    return [assessed(task.assess(extras[row["prompt_id"]], row["response_text"])) for row in rows]


def by_model(writer: WrittenBy, rows: list[Row], prompts: dict[str, Row], rubrics: dict[str, Row]) -> list[Grade]:
    """A language model reads question, rubric and response."""
    questions = [
        render(
            question_of(prompts[row["prompt_id"]]["messages"]), rubrics[row["prompt_id"]]["text"], row["response_text"],
            writer.forbidden,
        )
        for row in rows
    ]  # fmt: skip
    texts = writer.ask(questions, "assessments")
    return [
        read_total(*text) if text else ungraded(GradeStatus.ERROR, "the question is longer than the teacher's context")
        for text in texts
    ]


def check_readable(rows: list[Row], allowed: float) -> None:
    """UserError when more than the share `allowed` of a teacher's totals could not be read, or were cut."""
    unread = [row["rationale"] for row in rows if row["status"] in (GradeStatus.UNPARSEABLE, GradeStatus.UNFINISHED)]
    if len(unread) > allowed * len(rows):
        raise UserError(
            f"{len(unread)} of {len(rows)} totals of the teacher could not be read, and assessments.max_unparseable allows "
            f"{allowed:.1%}. Expected: a last line such as 'Total Score: 7/10 points'. Found, for example: "
            f"{'; '.join(map(repr, unread[:3]))}. Raise assessments.teacher.max_new_tokens if they are cut, or take another."
        )


def run(context: Context) -> str:
    """Assess every finished response to a prompt with a valid rubric, and write the table; the closing line."""
    config, reads = context.config, context.reads
    prompts = {row["prompt_id"]: row for row in PROMPTS.read(reads["prompts"]).to_pylist()}
    rubrics = {row["prompt_id"]: row for row in RUBRICS.read(reads["rubrics"]).to_pylist() if row["valid"]}
    wanted = ["rollout_id", "prompt_id", "response_text", "finish_reason"]
    rollouts = ROLLOUTS.read(reads["rollouts"]).select(wanted).to_pylist()
    if absent := sorted({row["prompt_id"] for row in rollouts} - set(prompts)):
        raise UserError(
            f"{reads['prompts']}: {len(absent)} prompts of the rollouts are missing: {first_few(absent)}. The rollouts belong to "
            "other prompts: build them again."
        )
    asked = [r for r in rollouts if r["finish_reason"] == FinishReason.STOP and r["prompt_id"] in rubrics]
    pieces = context.pieces(GRADES, cut(len(asked), PER_PIECE))
    own, task = config.assessments.teacher, get_task(config.prompts.task)
    if own is None:
        assert isinstance(task, AssessedTask), "checked by the declaration"
        for number in pieces.missing():
            rows = asked[slice(*pieces.parts[number])]
            pieces.write(number, table(rows, by_program(task, rows, prompts), "program"))
    else:
        with WrittenBy(config, own, "assessments.teacher") as writer:
            for number in pieces.missing():
                rows = asked[slice(*pieces.parts[number])]
                pieces.write(number, table(rows, by_model(writer, rows, prompts, rubrics), "teacher"))
    found = {row["rollout_id"]: row for group in pieces.groups() for row in group.to_pylist()}
    if own is not None:
        check_readable(list(found.values()), config.assessments.max_unparseable)
    nothing = {"grader": "none", "score": None, "extracted_answer": None, "rationale": None, "parts": None}
    rows = [
        found.get(r["rollout_id"])
        or nothing
        | {
            "rollout_id": r["rollout_id"],
            "status": GradeStatus.UNFINISHED if r["prompt_id"] in rubrics else GradeStatus.ERROR,
        }
        for r in rollouts
    ]
    context.write(GRADES, GRADES.make(rows))
    pieces.remove()
    counts = Counter(row["status"] for row in rows)
    sound = sum(row["score"] == 1 for row in rows)
    return f"wrote {len(rows)} assessments ({dict(counts)}, {sound} with full marks) to {context.target}"


def table(rows: list[Row], grades: list[Grade], grader: str) -> Any:
    return GRADES.make(
        [
            {"rollout_id": row["rollout_id"], "grader": grader, **vars(grade)}
            for row, grade in zip(rows, grades, strict=True)
        ]
    )


if __name__ == "__main__":
    run_stage("assessments", run)
