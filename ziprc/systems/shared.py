"""The stages that several systems share: what is asked, the policy to start from, responses and their grades, numbers, page.

Responses are named by the systems that need them (`System.rollouts`); `train` and `test` of the base are everybody's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.plan.stage import CHECKPOINT, TABLE, Ref, Stage, System, many, one

SPLITS = ("train", "validation", "test")
SCRATCH = "scratch"
BASE = Ref("base", "base")
TASK = ("prompts.task", "prompts.settings")
# How a policy is run: what rollouts and live samples read of the section `rollouts`.
SAMPLING = tuple(f"rollouts.{key}" for key in ("engine", "sampling", "max_model_len", "max_new_tokens", "dtype"))
LENGTHS = ("max_model_len", "max_new_tokens", "dtype")
SECTIONS = ("seed", "prompts", "base", "rollouts", "grades", "evaluate", "report")


@dataclass(frozen=True)
class RolloutsOf:
    """What a table of responses is: whose prompts, whose responses, how many with and without thinking.

    `limit` is the number of prompts, the first ones (None: all); `counts` the keys of the section `rollouts` behind it.
    `thoughts`: of a policy with a reasoning vocabulary, what is done to its copies: `banned` from the start, or the first
    half of each thought of the rollouts `before` is `kept`, or `swapped` for sources, and the rest is sampled anew. `asks` is
    the stage whose prompts these are, and the section that says how long a response may be. `greedy`: the likeliest token.
    """

    prompts: str
    policy: Ref
    samples: tuple[tuple[bool, int], ...]
    counts: tuple[str, ...]
    limit: int | None = None
    thoughts: Literal["own", "banned", "kept", "swapped"] = "own"
    before: Ref | None = None
    asks: Literal["prompts", "gradings"] = "prompts"
    greedy: bool = False

    @property
    def section(self) -> str:
        return "rollouts" if self.asks == "prompts" else self.asks

    @property
    def params(self) -> list[str]:
        """Keys of the configuration behind it, the seed apart."""
        drawn = [] if self.greedy else ["rollouts.sampling"]
        lengths = [f"{self.section}.{key}" for key in LENGTHS]
        return ["rollouts.engine", *drawn, *lengths, *(f"rollouts.{key}" for key in self.counts)]


@dataclass(frozen=True)
class GradesOf:
    """The responses that are graded, and whose prompts they answer."""

    rollouts: Ref
    prompts: str


def table(kind: str, name: str) -> dict[str, Ref]:
    """A table as a parent, in the role of its own name."""
    return {f"{kind}/{name}": Ref(kind, name)}


def tested(config: Config, policy: Ref) -> RolloutsOf:
    """The test prompts, as every policy is asked them."""
    own = config.rollouts
    return RolloutsOf("test", policy, ((own.test_thinking, own.test_samples),), ("test_samples", "test_thinking"))


def base_rollouts(config: Config) -> dict[str, RolloutsOf]:
    own = config.rollouts
    train = ((True, own.thinking_samples), (False, own.non_thinking_samples))
    return {
        "train": RolloutsOf("train", BASE, train, ("thinking_samples", "non_thinking_samples")),
        "test": tested(config, BASE),
    }


def task_module(config: Config) -> str:
    return f"ziprc.tasks.{config.prompts.task}"


def engine_module(config: Config) -> str:
    return f"ziprc.engines.{config.rollouts.engine}"


def grader_modules(config: Config) -> list[str]:
    """What grades an answer: the rule and, where there is a judge, the engine that it runs on."""
    rule = [] if config.grades.rule == "none" else [f"ziprc.rewards.{config.grades.rule}"]
    return [*rule, *(["ziprc.rewards.judge", engine_module(config)] if config.grades.judge else [])]


OWN_KEYS = {
    "math": ["grades.timeout_s"], "countdown": ["grades.style"], "prime": ["grades.timeout_s", "grades.style"],
    "by_source": ["grades.timeout_s", "grades.style"],
}  # fmt: skip


def grading_keys(config: Config) -> list[str]:
    """Keys that decide a grade: a rule's own, and the judge's engine, which is that of the rollouts."""
    own = OWN_KEYS.get(config.grades.rule, [])
    return ["grades.rule", "grades.judge", *own, *(["rollouts.engine"] if config.grades.judge else [])]


def check_grades(config: Config) -> None:
    if config.grades.rule == "none" and config.grades.judge is None:
        raise UserError("grades.rule is 'none' and there is no grades.judge: nobody is left to grade. Name one.")


def _trains(config: Config) -> bool:
    return config.base.model == SCRATCH


def of_experiment(systems: Sequence[System], config: Config) -> list[System]:
    """The systems that an experiment builds."""
    return [system for system in systems if system.name in config.systems]


def responses(systems: Sequence[System]) -> tuple[Stage[Any], ...]:
    """The stages up to graded responses, in a package with these systems."""

    def rollouts(config: Config) -> dict[str, RolloutsOf]:
        found = base_rollouts(config)
        for system in of_experiment(systems, config):
            found |= system.rollouts(config)
        return found

    def grades(config: Config) -> Mapping[str, GradesOf]:
        asked = {name: v for name, v in rollouts(config).items() if v.asks == "prompts"}
        found = {name: GradesOf(Ref("rollouts", name), v.prompts) for name, v in asked.items()}
        for system in of_experiment(systems, config):
            found |= system.graded(config)
        return found

    return (
        Stage(
            "prompts", "what is asked, split {name}", TABLE, many(*SPLITS),
            params=lambda c, split: ["seed", *TASK, f"prompts.{split}"],
            uses=lambda c, split: [task_module(c)],
        ),
        Stage(
            "base", "the policy to start from", CHECKPOINT, one("base"),
            params=lambda c, _: ["seed", "base", *TASK] if _trains(c) else ["base.model", "base.revision"],
            machine=lambda c: "big-gpu" if _trains(c) else "cpu",
            uses=lambda c, _: [task_module(c)] if _trains(c) else [],
        ),
        Stage(
            "rollouts", "responses for {name}", TABLE, rollouts,
            reads=lambda c, v: {
                "prompts": Ref(v.asks, v.prompts), "policy": v.policy, **({"before": v.before} if v.before else {})
            },
            params=lambda c, v: ["seed", *v.params],
            machine="gpu", uses=lambda c, v: [engine_module(c)],
        ),
        Stage(
            "grades", "is the answer right? {name}", TABLE, grades,
            reads=lambda c, v: {"rollouts": v.rollouts, "prompts": Ref("prompts", v.prompts)},
            params=lambda c, v: grading_keys(c),
            machine=lambda c: "gpu" if c.grades.judge else "cpu",
            uses=lambda c, v: grader_modules(c), check=check_grades,
        ),
    )  # fmt: skip


def results(systems: Sequence[System]) -> tuple[Stage[Any], ...]:
    """The stages that say what came out, in a package with these systems."""

    def of(config: Config) -> list[System]:
        return of_experiment(systems, config)

    def shown(config: Config, _: str) -> dict[str, Ref]:
        return {role: ref for system in of(config) for role, ref in system.shows(config).items()}

    return (
        Stage(
            "evaluate", "what the numbers of {name} mean", "metrics/{name}.json",
            lambda c: {system.name: system for system in of(c)},
            reads=lambda c, system: system.evaluated(c),
            params=lambda c, system: ["seed", *system.evaluate_params(c)],
            machine="gpu", uses=lambda c, system: [*system.evaluate_uses(c), system.evaluation], held_out=True,
        ),
        Stage(
            "report", "the page", "report.html", one("report"), reads=shown,
            params=lambda c, _: [*SECTIONS, *(key for system in of(c) for key in system.sections)],
            uses=lambda c, _: [system.page for system in of(c)],
        ),
    )  # fmt: skip
