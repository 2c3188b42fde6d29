"""Rubric reward models: a grader that reads the work is taught, trained, served as the reward of a policy, and judged.

    prompts ─ rubrics ─ rollouts ─ assessments (teacher) ─ gradings ─ train_grader ─ train_online (the grader)
                                                                              └ train_online (policies, by a served grader)

A policy is judged by the teacher's assessments of its test responses, never by the grader that it was rewarded by.
"""

from __future__ import annotations

from dataclasses import dataclass

from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.plan.stage import CHECKPOINT, TABLE, Ref, Stage, System
from ziprc.systems.online import graders, is_assessed, trained, trained_graders
from ziprc.systems.shared import BASE, SCRATCH, RolloutsOf, engine_module, table, task_module, tested


@dataclass(frozen=True)
class AssessmentsOf:
    """The responses that the teacher assesses, and the split of their prompts."""

    rollouts: Ref
    prompts: str


@dataclass(frozen=True)
class GraderOf:
    """A grader by its name in the section."""

    grader: str


def judged(config: Config) -> dict[str, Ref]:
    """The policies that are judged."""
    return {"base": BASE, **trained(config)}


def tests(config: Config) -> dict[str, str]:
    """Every judged policy, and the name of its test responses."""
    return {name: "test" if name == "base" else f"test-{name}" for name in judged(config)}


def rollouts(config: Config) -> dict[str, RolloutsOf]:
    """Test prompts, as every policy answers them, with and without work; and what every grader says of the base's responses."""
    found = {f"test-{name}": tested(config, policy) for name, policy in trained(config).items()}
    if config.rollouts.recall:
        for name, policy in judged(config).items():
            found[f"recall-{name}"] = RolloutsOf("test", policy, ((False, 1),), (), greedy=True)
    for name, grader in (graders(config) | trained_graders(config)).items():
        found[f"gradings-{name}"] = RolloutsOf("test", grader, ((False, 1),), (), asks="gradings", greedy=True)
    return found


def assessed(config: Config) -> dict[str, AssessmentsOf]:
    """Responses to train prompts, which graders are taught by, and to test prompts, by which policies are judged."""
    taught = {"train": AssessmentsOf(Ref("rollouts", "train"), "train")} if config.train_grader.graders else {}
    return taught | {name: AssessmentsOf(Ref("rollouts", name), "test") for name in tests(config).values()}


def by_program(config: Config) -> list[str]:
    return [task_module(config)] if is_assessed(config.prompts.task) else []


def teacher_params(config: Config) -> list[str]:
    """Keys that decide what a teacher says."""
    model = ["assessments.max_unparseable", "rollouts.engine"] if config.assessments.teacher else []
    return ["prompts.task", "assessments.teacher", *model]


def writer_params(config: Config) -> list[str]:
    """Keys that decide what a rubric is."""
    model = ["rubrics.writer", "rubrics.tries", "rollouts.engine", "seed"] if config.rubrics.writer else []
    return ["prompts.task", "rubrics.source", "rubrics.max_invalid", *model]


def check_rubrics(config: Config) -> None:
    """UserError where nobody can write rubrics, or nobody assess responses."""
    if config.base.model == SCRATCH and config.prompts.task == "hub":
        return  # refused by the base
    if config.rubrics.source == "program" and not is_assessed(config.prompts.task):
        raise UserError(
            f"rubrics.source is program, but the task '{config.prompts.task}' has none that writes rubrics. Set it to "
            f"column (the data "
            "set has one) or model."
        )


def check_assessments(config: Config) -> None:
    """UserError where nobody can assess responses."""
    if config.assessments.teacher is None and not is_assessed(config.prompts.task):
        raise UserError(
            f"assessments.teacher is null, but the task '{config.prompts.task}' has no program that looks at work. Name a model."
        )


def evaluated(config: Config) -> dict[str, Ref]:
    """Test prompts and rubrics, all answers to them with both verdicts, what graders said, and how training went."""
    found = table("prompts", "train") | table("prompts", "test") | table("rubrics", "test")
    found |= trained(config) | trained_graders(config)
    for name in tests(config).values():
        found |= table("rollouts", name) | table("grades", name) | table("assessments", name)
    if config.rollouts.recall:
        for name in judged(config):
            found |= table("rollouts", f"recall-{name}") | table("grades", f"recall-{name}")
    for name in graders(config) | trained_graders(config):
        found |= table("gradings", "test") | table("rollouts", f"gradings-{name}")
    return found


def evaluate_params(config: Config) -> list[str]:
    """Keys that metrics/rubric.json depends on besides its tables."""
    return [*(f"evaluate.{key}" for key in ("bootstrap", "confidence", "targets")), "rollouts.recall", *_arms(config)]


def _arms(config: Config) -> list[str]:
    return [f"train_online.arms.{name}.{key}" for name in config.train_online.arms for key in ("rubric", "asks")]


RUBRIC = System(
    name="rubric",
    stages=(
        Stage(
            "rubrics", "what full marks are given for, split {name}", TABLE, lambda c: {name: name for name in ("train", "test")},
            reads=lambda c, split: table("prompts", split),
            params=lambda c, split: writer_params(c),
            machine=lambda c: "gpu" if c.rubrics.writer else "cpu",
            uses=lambda c, split: [*by_program(c), *([engine_module(c)] if c.rubrics.writer else [])], check=check_rubrics,
        ),
        Stage(
            "assessments", "the teacher's word on every response, {name}", TABLE, assessed,
            reads=lambda c, v: {
                "rollouts": v.rollouts, "prompts": Ref("prompts", v.prompts), "rubrics": Ref("rubrics", v.prompts),
            },
            params=lambda c, v: teacher_params(c), machine=lambda c: "gpu" if c.assessments.teacher else "cpu",
            uses=lambda c, v: [*by_program(c), *([engine_module(c)] if c.assessments.teacher else [])], check=check_assessments,
        ),
        Stage(
            "gradings", "what a grader is asked and should say, split {name}", TABLE,
            lambda c: {name: name for name in ("train", "test")},
            reads=lambda c, split: {
                "prompts": Ref("prompts", split), "rubrics": Ref("rubrics", split), "rollouts": Ref("rollouts", split),
                "grades": Ref("grades", split), "assessments": Ref("assessments", split), "base": BASE,
            },
            params=lambda c, split: [f"gradings.{key}" for key in ("responses", "max_model_len", "max_new_tokens")],
        ),
        Stage(
            "train_grader", "the grader {name}", CHECKPOINT, lambda c: {f"grader-{n}": GraderOf(n) for n in
            c.train_grader.graders}, reads=lambda c, v: {"base": BASE, **table("gradings", "train")}, params=lambda c, v:
            ["seed", f"train_grader.graders.{v.grader}"], machine="big-gpu", held_out=True,
        ),
    ),
    rollouts=rollouts,
    shows=lambda config: {"metrics/rubric": Ref("evaluate", "rubric"), **evaluated(config)},
    evaluated=evaluated,
    evaluate_params=evaluate_params,
    sections=("rubrics", "assessments", "gradings", "train_grader", "train_online"),
    evaluation="ziprc.evaluation.rl.rubric",
    page="ziprc.pages.rubric",
)  # fmt: skip
