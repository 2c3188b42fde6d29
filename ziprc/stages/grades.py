"""grades: is each finished response right? A rule first, then, where one is configured, an LLM judge.

A response that did not end by itself has the status `unfinished` and no score. Equal answers to the same prompt are
graded once, and a grade follows from prompt, answer and settings alone, so the order of rollouts does not matter.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ziprc.chat import visible_answer
from ziprc.config.base import Sampling
from ziprc.config.load import Config
from ziprc.engines import start
from ziprc.engines.base import settings_for
from ziprc.errors import UserError
from ziprc.rewards.base import Decision, Grade, Grader, Question, decide, lacks_answer, ungraded
from ziprc.rewards.countdown import CountdownGrader
from ziprc.rewards.exact import ExactGrader
from ziprc.rewards.judge import JudgeGrader, check_unparseable
from ziprc.rewards.math import MathGrader
from ziprc.stages.context import Context, run_stage
from ziprc.tables.grades import GRADES, GradeStatus
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS, FinishReason

MOST_WORKERS = 8
NAMED_PROMPTS = 5
UNFINISHED = Decision("none", ungraded(GradeStatus.UNFINISHED))

Row = Mapping[str, Any]
Item = tuple[str, str]  # prompt_id, visible answer


@contextlib.contextmanager
def rule_grader(config: Config) -> Iterator[Grader | None]:
    """The rule that the experiment names."""
    rule = config.grades.rule
    if rule == "math":
        with MathGrader(config.grades.timeout_s, min(os.cpu_count() or 1, MOST_WORKERS)) as grader:
            yield grader
    else:
        yield {"exact": ExactGrader(), "countdown": CountdownGrader(), "none": None}[rule]


@contextlib.contextmanager
def judge_grader(config: Config) -> Iterator[Grader | None]:
    """The judge and its engine, if the experiment has one."""
    if config.grades.judge is None:
        yield None
        return
    from ziprc.joint.hub import local_model
    from ziprc.joint.tokenizer import load_tokenizer

    own, machine = config.grades.judge, config.runtime
    folder = local_model(own.model, own.revision, "grades.judge.model")
    tokenizer = load_tokenizer(folder)
    greedy = Sampling(temperature=0, min_p=0)
    settings = settings_for(folder, tokenizer, own, greedy, machine, machine.judge_tensor_parallel)
    with contextlib.closing(start(config.rollouts.engine, settings)) as engine:
        yield JudgeGrader(engine, tokenizer, own.max_model_len, own.max_new_tokens)


def items_of(rollouts: Sequence[Row], prompts: Mapping[str, Row]) -> dict[Item, Question]:
    """What has to be graded: each finished (prompt, visible answer) once, in an order that follows from the content."""
    finished = {(r["prompt_id"], visible_answer(r["response_text"])) for r in rollouts if is_finished(r)}
    return {(key, answer): question_of(prompts[key], answer) for key, answer in sorted(finished)}


def is_finished(rollout: Row) -> bool:
    return rollout["finish_reason"] == FinishReason.STOP


def question_of(prompt: Row, response: str) -> Question:
    return Question(tuple(prompt["messages"]), response, prompt["answer"], json.loads(prompt["extra"]))


def check_prompts(rollouts: Sequence[Row], prompts: Mapping[str, Row], source: Path) -> None:
    """UserError unless every rollout's prompt is in the table."""
    absent = sorted({r["prompt_id"] for r in rollouts} - set(prompts))
    if absent:
        raise UserError(
            f"{source}: {len(absent)} prompts of the rollouts are missing from column 'prompt_id': {_some(absent)}. "
            "The rollouts belong to other prompts: build them again."
        )


def check_needs(prompts: Mapping[str, Row], grader: str, lacks: Callable[[Question], str | None], source: Path) -> None:
    """UserError naming the prompts that lack what a grader compares with."""
    lacking = {key: what for key, row in sorted(prompts.items()) if (what := lacks(question_of(row, "")))}
    if lacking:
        raise UserError(
            f"{source}: {len(lacking)} prompts lack {next(iter(lacking.values()))}, which the grader '{grader}' needs: "
            f"{_some(list(lacking))}. Mend or drop them, or choose another grader (grades.rule)."
        )


def _some(prompt_ids: Sequence[str]) -> str:
    more = f" and {len(prompt_ids) - NAMED_PROMPTS} more" if len(prompt_ids) > NAMED_PROMPTS else ""
    return ", ".join(prompt_ids[:NAMED_PROMPTS]) + more


def grade_row(rollout: Row, decisions: Mapping[Item, Decision]) -> dict[str, Any]:
    """The row of the grades table for one rollout."""
    finished = is_finished(rollout)
    decision = decisions[rollout["prompt_id"], visible_answer(rollout["response_text"])] if finished else UNFINISHED
    return {"rollout_id": rollout["rollout_id"], "grader": decision.grader, **vars(decision.grade)}


def summary(grades: Sequence[Row]) -> str:
    """Counts by status and the mean score."""
    counts = Counter(str(row["status"]) for row in grades)
    scores = [row["score"] for row in grades if row["score"] is not None]
    mean = f"mean score {sum(scores) / len(scores):.3f}" if scores else "no score"
    return ", ".join(f"{counts[status]} {status}" for status in GradeStatus if counts[status]) + f"; {mean}"


def grade(config: Config, rollouts: Sequence[Row], prompts: Mapping[str, Row], source: Path) -> list[dict[str, Any]]:
    """Rows of the grades table; UserError before anything is graded when a prompt lacks what a grader needs."""
    settings = config.grades
    if settings.rule == "none" and settings.judge is None:
        raise UserError("grades.rule is 'none' and there is no grades.judge: nobody is left to grade. Name one.")
    if settings.judge:
        check_needs(prompts, JudgeGrader.name, lacks_answer, source)
    with rule_grader(config) as rule:
        if rule:
            check_needs(prompts, rule.name, rule.lacks, source)
        with judge_grader(config) as judge:
            decisions = decide(items_of(rollouts, prompts), rule, judge)
    if settings.judge:
        judged: list[Grade] = [d.grade for d in decisions.values() if d.grader == JudgeGrader.name]
        check_unparseable(judged, settings.judge.max_unparseable)
    return [grade_row(rollout, decisions) for rollout in rollouts]


def run(context: Context) -> str:
    source, target = context.reads["prompts"], context.target
    prompts = {row["prompt_id"]: row for row in PROMPTS.read(source).to_pylist()}
    wanted = ["rollout_id", "prompt_id", "response_text", "finish_reason"]
    rollouts = ROLLOUTS.read(context.reads["rollouts"]).select(wanted).to_pylist()
    check_prompts(rollouts, prompts, source)
    grades = grade(context.config, rollouts, {r["prompt_id"]: prompts[r["prompt_id"]] for r in rollouts}, source)
    context.write(GRADES, GRADES.make(grades))
    return f"wrote {len(grades)} grades to {target}: {summary(grades)}"


if __name__ == "__main__":
    run_stage("grades", run)
