"""On-policy training, which several systems share: its arms, what each starts from, and the stage that trains them."""

from __future__ import annotations

from dataclasses import dataclass

from ziprc.config.load import Config
from ziprc.config.vocabulary import Expansion
from ziprc.errors import UserError, nearest
from ziprc.plan.stage import CHECKPOINT, Ref, Stage
from ziprc.systems.shared import BASE, check_grades, grader_modules, grading_keys, table

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
    """`expanded-<model>` and `warmed-<model>`."""
    models = config.expand.models
    found = {f"expanded-{name}": Start(Ref("expand", f"expanded-{name}"), own) for name, own in models.items()}
    for name, own in config.warm_up.models.items():
        found[f"warmed-{name}"] = Start(Ref("warm_up", f"warmed-{name}"), models.get(own.model or ""))
    return found


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
    """The policies of all arms."""
    return {name: Ref("train_online", name) for name in arms(config)}


def arm_params(config: Config, of: ArmOf) -> list[str]:
    """Keys that decide what an arm becomes."""
    own = config.train_online
    judged = [f"train_online.{key}" for key in (("judged_every", *JUDGED) if own.judged_every else ("judged_every",))]
    lengths = [f"rollouts.{key}" for key in ("max_model_len", "max_new_tokens", "dtype")]
    return [
        "seed", f"train_online.arms.{of.arm}", "train_online.engine", "train_online.thinking",
        *judged, *lengths, *grading_keys(config),
    ]  # fmt: skip


def arm_modules(config: Config) -> list[str]:
    """What training chooses by name: the engine that samples and what grades."""
    engine = config.train_online.engine
    return [*([f"ziprc.engines.{engine}"] if engine in ("hf", "vllm") else []), *grader_modules(config)]


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
        if arm.copies_rate != 1 and not known[arm.start].has_copies:
            raise UserError(f"{where}: copies_rate is {arm.copies_rate:g}, but {arm.start} has no copies.")
        if known[arm.start].has_copies and own.engine in ("colocate", "server"):
            raise UserError(
                f"{where}: {arm.start} has copies, which TRL's sampling would not keep to the thinking block. Set "
                "train_online.engine to vllm or hf."
            )
        if arm.prompts > config.prompts.train:
            raise UserError(
                f"{where}: a rollout asks {arm.prompts} different prompts, but prompts.train is {config.prompts.train}. "
                "Lower the one or raise the other."
            )
        if arm.prompts * arm.samples % arm.updates:
            raise UserError(
                f"{where}: {arm.prompts} × {arm.samples} responses cannot be shared among {arm.updates} updates. Make prompts × "
                "samples a multiple of updates."
            )
        arm.window.check_fits(cap, f"{where}.window")
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


TRAIN_ONLINE = Stage(
    "train_online", "the policy {name}, trained on-policy", CHECKPOINT, arms,
    reads=lambda c, v: {
        "base": v.start.checkpoint, **table("prompts", "train"),
        **(table("prompts", "validation") if c.train_online.judged_every else {}),
    },
    params=arm_params, machine="big-gpu", uses=lambda c, v: arm_modules(c), check=check_arms, held_out=True,
)  # fmt: skip
