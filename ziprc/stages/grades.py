"""grades: is each finished response right? A rule first, then, where one is configured, an LLM judge.

A response that did not end by itself has the status `unfinished` and no score. A grade follows from prompt, answer and
settings alone (ziprc/rewards/grading.py), so the order of rollouts does not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ziprc.chat import visible_answer
from ziprc.errors import UserError, first_few
from ziprc.rewards.base import Verdict, ungraded
from ziprc.rewards.grading import VERDICTS, check_gradable, grade_answers, parts_of
from ziprc.stages.context import Context, run_stage
from ziprc.tables.grades import GRADES, GradeStatus
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS, FinishReason

UNFINISHED = Verdict("none", ungraded(GradeStatus.UNFINISHED))

Row = Mapping[str, Any]


def summary(grades: Sequence[Row]) -> str:
    """Counts by status and the mean score."""
    counts = Counter(str(row["status"]) for row in grades)
    scores = [row["score"] for row in grades if row["score"] is not None]
    mean = f"mean score {sum(scores) / len(scores):.3f}" if scores else "no score"
    return ", ".join(f"{counts[status]} {status}" for status in GradeStatus if counts[status]) + f"; {mean}"


def run(context: Context) -> str:
    """Grade every finished response and write the table; the closing line."""
    source = context.reads["prompts"]
    prompts = {row["prompt_id"]: row for row in PROMPTS.read(source).to_pylist()}
    wanted = ["rollout_id", "prompt_id", "response_text", "finish_reason"]
    rollouts = ROLLOUTS.read(context.reads["rollouts"]).select(wanted).to_pylist()
    if absent := sorted({r["prompt_id"] for r in rollouts} - set(prompts)):
        raise UserError(
            f"{source}: {len(absent)} prompts of the rollouts are missing from column 'prompt_id': {first_few(absent)}. "
            "The rollouts belong to other prompts: build them again."
        )
    check_gradable(context.config, {r["prompt_id"]: prompts[r["prompt_id"]] for r in rollouts}, source)
    answers = {
        r["rollout_id"]: (r["prompt_id"], visible_answer(r["response_text"]))
        for r in rollouts
        if r["finish_reason"] == FinishReason.STOP
    }
    pieces = context.pieces(VERDICTS, parts_of(answers.values()))
    verdicts = grade_answers(context.config, prompts, pieces)
    decided = {r["rollout_id"]: verdicts.get(answers.get(r["rollout_id"]), UNFINISHED) for r in rollouts}
    grades = [{"rollout_id": key, "grader": v.grader, **vars(v.grade)} for key, v in decided.items()]
    context.write(GRADES, GRADES.make(grades))
    pieces.remove()
    return f"wrote {len(grades)} grades to {context.target}: {summary(grades)}"


if __name__ == "__main__":
    run_stage("grades", run)
