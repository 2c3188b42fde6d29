"""On-policy training, which several systems share: its arms, what each starts from and is rewarded by, and their stage."""

from __future__ import annotations

from dataclasses import dataclass

from ziprc.config import load
from ziprc.config.load import Config
from ziprc.config.vocabulary import Expansion
from ziprc.errors import UserError, nearest
from ziprc.plan.stage import CHECKPOINT, Ref, Stage
from ziprc.systems.shared import BASE, LENGTHS, check_grades, grader_modules, grading_keys, table, task_module

GRADERS = "ziprc.training.graders"
JUDGED = ("judged_prompts", "judged_samples")


@dataclass(frozen=True)
class Start:
    """A checkpoint that an arm may start from, and what the base was given on the way to it."""

    checkpoint: Ref
    expansion: Expansion | None = None
    has_head: bool = False

    @property
    def has_copies(self) -> bool:
        return self.expansion is not None and self.expansion.adds == "copies"


def given(config: Config) -> dict[str, Start]:
    """`expanded-<model>`, `warmed-<model>` and `grader-<name>`."""
    models = config.expand.models
    found = {f"expanded-{name}": Start(Ref("expand", f"expanded-{name}"), own) for name, own in models.items()}
    for name, own in config.warm_up.models.items():
        found[f"warmed-{name}"] = Start(Ref("warm_up", f"warmed-{name}"), models.get(own.model or ""))
    return found | {name: Start(ref) for name, ref in graders(config).items()}


def graders(config: Config) -> dict[str, Ref]:
    """Graders as they are taught, `grader-<name>` each."""
    return {f"grader-{name}": Ref("train_grader", f"grader-{name}") for name in config.train_grader.graders}


def trained_graders(config: Config) -> dict[str, Ref]:
    """Graders that were trained on-policy after that, `online-<arm>` each."""
    return _asking(config, "gradings")


def _asking(config: Config, what: str) -> dict[str, Ref]:
    found = [f"online-{name}" for name, arm in config.train_online.arms.items() if arm.asks == what]
    return {name: Ref("train_online", name) for name in found}


def starts(config: Config) -> dict[str, Start]:
    """`base`, the joint heads, of which `lite` answers as the base does, and what the base was `given` more."""
    heads = ("ziprc", *(("lite",) if config.train_joint.lite else ()))
    found = {"base": Start(BASE)} | {name: Start(Ref("train_joint", name), has_head=True) for name in heads}
    return found | given(config)


@dataclass(frozen=True)
class ArmOf:
    """A policy trained on-policy, by its name in the configuration, and what it starts from."""

    arm: str
    start: Start


def arms(config: Config) -> dict[str, ArmOf]:
    """`online-<arm>` each. A start that is not there is for `check_arms` to refuse."""
    known = starts(config)
    return {f"online-{n}": ArmOf(n, known.get(arm.start, known["base"])) for n, arm in config.train_online.arms.items()}


def trained(config: Config) -> dict[str, Ref]:
    """The policies of all arms, graders apart."""
    return _asking(config, "prompts")


def arm_reads(config: Config, of: ArmOf) -> dict[str, Ref]:
    """What an arm starts from, what it is asked and judged on, and the grader and rubrics of its reward."""
    arm = config.train_online.arms[of.arm]
    found = {"base": of.start.checkpoint, **table(arm.asks, "train")}
    if config.train_online.judged_every and arm.asks == "prompts":
        found |= table("prompts", "validation")
    known = graders(config) | trained_graders(config)
    if arm.rubric is not None and arm.rubric.by in known:
        found |= table("rubrics", "train") | {"grader": known[arm.rubric.by]}
    return found


def arm_params(config: Config, of: ArmOf) -> list[str]:
    """Keys that decide what an arm becomes."""
    own, arm = config.train_online, config.train_online.arms[of.arm]
    found = ["seed", f"train_online.arms.{of.arm}", "train_online.engine"]
    if arm.asks == "gradings":
        return [*found, *(f"gradings.{key}" for key in LENGTHS)]
    judged = [f"train_online.{key}" for key in (("judged_every", *JUDGED) if own.judged_every else ("judged_every",))]
    lengths = [f"rollouts.{key}" for key in LENGTHS]
    if arm.rubric is not None:
        found += ["prompts.task"]
        found += [f"gradings.{key}" for key in LENGTHS] if arm.rubric.by != "program" else []
    return [*found, "train_online.thinking", *judged, *lengths, *grading_keys(config)]


def arm_modules(config: Config, of: ArmOf) -> list[str]:
    """What training chooses by name: the engine that samples, what grades, and the task whose program looks at work."""
    engine, arm = config.train_online.engine, config.train_online.arms[of.arm]
    found = [f"ziprc.engines.{engine}"] if engine in ("hf", "vllm") else []
    if arm.asks == "gradings":
        return [*found, "ziprc.rewards.grade"]
    work = [GRADERS, task_module(config)] if arm.rubric is not None else []
    work += ["ziprc.engines.serving"] if arm.rubric is not None and arm.rubric.by != "program" else []
    return [*found, *grader_modules(config), *work]


def check_arms(config: Config) -> None:
    """UserError for arms that cannot be trained as they are."""
    check_grades(config)
    own, cap, known = config.train_online, config.rollouts.max_new_tokens, starts(config)
    for name, arm in own.arms.items():
        where = f"train_online.arms.{name}"
        if arm.start not in known:
            raise UserError(
                f"{where}: there is no checkpoint '{arm.start}' to start from{nearest(arm.start, list(known))}. It is one of "
                f"{', '.join(known)}."
            )
        if arm.window.rule == "predicted" and not (known[arm.start].has_head and own.engine in ("hf", "vllm")):
            raise UserError(
                f"{where}: a predicted window is read from a joint head by our engines. Start from lite or ziprc, with "
                f"train_online.engine hf or vllm (now {arm.start}, {own.engine})."
            )
        _check_rubric(config, name, where)
        if arm.copies_rate != 1 and not known[arm.start].has_copies:
            raise UserError(f"{where}: copies_rate is {arm.copies_rate:g}, but {arm.start} has no copies.")
        if known[arm.start].has_copies and own.engine in ("colocate", "server"):
            raise UserError(
                f"{where}: {arm.start} has copies, which TRL's sampling would not keep to the thinking block. Set "
                "train_online.engine to vllm or hf."
            )
        if arm.asks == "prompts" and arm.prompts > config.prompts.train:
            raise UserError(
                f"{where}: a rollout asks {arm.prompts} different prompts, but prompts.train is {config.prompts.train}. "
                "Lower the one or raise the other."
            )
        if arm.prompts * arm.samples % arm.updates:
            raise UserError(
                f"{where}: {arm.prompts} × {arm.samples} responses cannot be shared among {arm.updates} updates. Make prompts × "
                "samples a multiple of updates."
            )
        arm.window.check_fits(cap if arm.asks == "prompts" else config.gradings.max_new_tokens, f"{where}.window")
    if own.judged_every and own.engine in ("colocate", "server"):
        raise UserError(
            f"train_online.engine is {own.engine}, where TRL samples; validation prompts are judged by our engines alone. Set "
            "train_online.judged_every=0, or the engine to vllm or hf."
        )
    if own.engine == "vllm" and config.runtime.gpus * config.runtime.nodes > 1:
        raise UserError(
            "train_online.engine=vllm runs in one process. With several GPUs set it to colocate (TRL's vLLM, a copy per GPU) "
            "or server."
        )


def _check_rubric(config: Config, name: str, where: str) -> None:
    """UserError where an arm's work is to be graded by nobody, or a grader is to be trained that is none."""
    arm, known = config.train_online.arms[name], graders(config) | trained_graders(config)
    if (arm.asks == "gradings") != (arm.start in graders(config)):
        raise UserError(
            f"{where}: it asks {arm.asks} and starts from {arm.start}. Graders start from grader-<name> and ask "
            f"gradings, policies "
            "start from something else and ask prompts."
        )
    if arm.rubric is None:
        return
    if arm.rubric.by != "program" and arm.rubric.by not in known:
        raise UserError(
            f"{where}.rubric.by: there is no grader '{arm.rubric.by}'{nearest(arm.rubric.by, ['program', *known])}. It "
            f"is program, or "
            f"one of {', '.join(known) or 'none'}."
        )
    if (arm.rubric.by == "program" or arm.rubric.credit == "steps") and not is_assessed(config.prompts.task):
        raise UserError(
            f"{where}.rubric: the task '{config.prompts.task}' has no program that looks at work. Name a grader in "
            f"`by`, with credit: "
            "response."
        )


def is_assessed(task: str) -> bool:
    """Whether the task's program writes rubrics and looks at work."""
    return hasattr(load.task_module(task).TASK, "assess")


TRAIN_ONLINE = Stage(
    "train_online", "the policy {name}, trained on-policy", CHECKPOINT, arms,
    reads=arm_reads, params=arm_params, machine="big-gpu", uses=arm_modules, check=check_arms, held_out=True,
)  # fmt: skip
