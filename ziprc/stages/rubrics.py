"""rubrics: what full marks are given for, one rubric a prompt, from the task's program, the data set or a model.

Every rubric is checked: whole points that sum to ten, no two items of one name, nothing of it in the policy's own prompt, and,
where a program is there to tell, full marks for its reference. A model gets several tries. Invalid ones stay in the table with
their reason, and nobody is graded by them; a larger share than `rubrics.max_invalid` fails the stage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from ziprc.errors import UserError, first_few
from ziprc.rewards.rubric import items_of, problem_of, question_of, rubric_text
from ziprc.rewards.writing import WrittenBy
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rubrics import RUBRICS
from ziprc.tasks.base import AssessedTask, get_task

Row = dict[str, Any]
LEAST_REFERENCE = 0.9  # score of a reference solution under a valid rubric
INSTRUCTION = """\
Write a rubric by which a teacher grades how a student has solved the problem below. Reply with a JSON list and nothing \
else; each item is {{"name": "1", "points": 2, "requirement": "…", "failure": "…"}}. Between 4 and 8 items, whole points that \
sum to 10.

Each item names one result that the solution has to derive, and in `failure` the mistake that loses its points. Where other \
methods are valid, say what any of them has to show. One item is that the final answer is the reference answer. Say of the key \
results that they earn nothing where they appear without derivation.

<problem>
{question}
</problem>

<reference_answer>
{answer}
</reference_answer>"""


def row_of(prompt: Row, rubric: str | None, text: str, problem: str | None) -> Row:
    return {
        "prompt_id": prompt["prompt_id"],
        "rubric": rubric,
        "text": text,
        "valid": problem is None,
        "problem": problem,
    }


def by_program(task: AssessedTask, prompt: Row) -> Row:
    """The task's own rubric, which its reference solution has to satisfy."""
    extra = json.loads(prompt["extra"])
    items = task.rubric(extra)
    problem = problem_of(items, prompt["messages"])
    score = task.assess(extra, task.reference(extra)).score
    if problem is None and score < LEAST_REFERENCE:
        problem = f"the reference solution gets {score:g}"
    return row_of(prompt, json.dumps([asdict(item) for item in items]), rubric_text(items), problem)


def by_column(prompt: Row) -> Row:
    """The data set's own text, or JSON items where it has these."""
    criteria = json.loads(prompt["extra"]).get("criteria")
    if isinstance(criteria, list):
        return read(prompt, json.dumps(criteria))
    if not isinstance(criteria, str) or not criteria.strip():
        return row_of(prompt, None, "", "the data set has no criteria for it")
    text = criteria.strip()
    return read(prompt, text) if text.startswith("[") else row_of(prompt, None, text, None)


def read(prompt: Row, text: str) -> Row:
    """A rubric of JSON items, as a model or a data set wrote it."""
    found = re.search(r"\[.*\]", text, re.DOTALL)
    try:
        items = items_of(found[0] if found else "")
    except (ValueError, RecursionError) as error:
        return row_of(prompt, None, text[:2000], f"it is no list of items: {error}"[:300])
    return row_of(
        prompt, json.dumps([asdict(i) for i in items]), rubric_text(items), problem_of(items, prompt["messages"])
    )


def by_model(context: Context, prompts: list[Row]) -> list[Row]:
    """A model's rubrics; an invalid one is written anew."""
    config, own = context.config, context.config.rubrics
    found: dict[str, Row] = {}
    assert own.writer is not None, "checked by the configuration"
    with WrittenBy(config, own.writer, "rubrics.writer") as writer:
        for attempt in range(own.tries):
            missing = [p for p in prompts if not found.get(p["prompt_id"], {"valid": False})["valid"]]
            questions = [
                [
                    {
                        "role": "user",
                        "content": INSTRUCTION.format(
                            question=question_of(p["messages"]), answer=p["answer"] or "unknown"
                        ),
                    }
                ]
                for p in missing
            ]
            texts = writer.ask(
                questions, f"rubrics, try {attempt + 1}", derived_seed(config.seed, "rubrics", attempt) >> 16
            )
            for prompt, text in zip(missing, texts, strict=True):
                found[prompt["prompt_id"]] = (
                    read(prompt, text[0])
                    if text
                    else row_of(prompt, None, "", "the problem leaves no room for a rubric")
                )
    return [found[p["prompt_id"]] for p in prompts]


def check_valid(rows: list[Row], allowed: float, source: Any) -> None:
    """UserError when more rubrics than the share `allowed` are invalid; it names prompts and reasons."""
    bad: Mapping[str, str] = {row["prompt_id"]: row["problem"] for row in rows if not row["valid"]}
    if len(bad) > allowed * len(rows):
        shown = first_few([f"{name}: {problem}" for name, problem in sorted(bad.items())])
        raise UserError(
            f"{len(bad)} of {len(rows)} rubrics for {source} are invalid, and rubrics.max_invalid allows {allowed:.1%}: {shown}. "
            "Mend the criteria of these prompts, drop the prompts, or allow more; nothing was written."
        )


def run(context: Context) -> str:
    """Write the rubrics of a split; the closing line."""
    config, own, source = context.config, context.config.rubrics, context.reads[f"prompts/{context.variant}"]
    prompts = PROMPTS.read(source).to_pylist()
    task = get_task(config.prompts.task)
    if own.source == "model":
        rows = by_model(context, prompts)
    elif own.source == "column":
        rows = [by_column(prompt) for prompt in prompts]
    else:
        assert isinstance(task, AssessedTask), "checked by the declaration"
        rows = [by_program(task, prompt) for prompt in prompts]
    check_valid(rows, own.max_invalid, source)
    context.write(RUBRICS, RUBRICS.make(rows))
    return f"wrote {len(rows)} rubrics, {sum(row['valid'] for row in rows)} valid, to {context.target}"


if __name__ == "__main__":
    run_stage("rubrics", run)
