"""ICL-V: a critic that reads graded rollouts of a prompt before it values the next one."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.plan.stage import CHECKPOINT, TABLE, Ref, Stage, System
from ziprc.systems.shared import BASE, GradesOf, RolloutsOf, base_rollouts, table


@dataclass(frozen=True)
class CriticOf:
    """A critic in context, and the fold (of how many) that it must not see."""

    fold: tuple[int, int] | None = None


def critics(config: Config) -> dict[str, CriticOf]:
    """One per fold; `critic` alone where nothing is cross-fitted."""
    folds = config.train_critic.folds
    return {f"critic-fold{i}": CriticOf((i, folds)) for i in range(folds)} if folds > 1 else {"critic": CriticOf()}


@dataclass(frozen=True)
class PolicyOf:
    """A student by its name in the configuration, in one of its rounds: where it starts, and what it learns from.

    `start` is the policy that sampled the `rollouts`; the base in the first round. `labels` None: from grades alone.
    """

    student: str
    start: Ref
    rollouts: str
    labels: Ref | None


TABLES = {"critic": "", "trie": "-trie"}  # how labels are named after the rollouts, by source


def policies(config: Config) -> dict[str, PolicyOf]:
    """`policy-<student>` each; before its last round it is `policy-<student>-round<i>`."""
    found: dict[str, PolicyOf] = {}
    for student, own in config.train_policy.students.items():
        start, rollouts = BASE, "train"
        for number in range(1, own.rounds + 1):
            name = f"policy-{student}" + (f"-round{number}" if number < own.rounds else "")
            labels = None if own.labels == "none" else Ref("qvalues", rollouts + TABLES[own.labels])
            found[name] = PolicyOf(student, start, rollouts, labels)
            start, rollouts = Ref("train_policy", name), f"train-{name}"
    return found


def students(config: Config) -> dict[str, Ref]:
    """The policies that are compared: every student after its last round."""
    return {name: Ref("train_policy", name) for name, of in policies(config).items() if name == f"policy-{of.student}"}


def policy_rollouts(config: Config) -> dict[str, RolloutsOf]:
    """Test prompts, as every student answers them; training prompts, as one does that learns from its own rollouts next."""
    asked, counts = config.rollouts, ("student_samples", "test_thinking")
    samples = ((asked.test_thinking, asked.student_samples),)
    found = {f"test-{name}": RolloutsOf("test", policy, samples, counts) for name, policy in students(config).items()}
    again = [of for of in policies(config).values() if of.start != BASE]
    return found | {of.rollouts: replace(base_rollouts(config)["train"], policy=of.start) for of in again}


@dataclass(frozen=True)
class LabelsOf:
    """Whose tokens are valued, sampled by which policy, and by whom: the `critic` in context or the `trie`."""

    rollouts: str
    policy: Ref
    source: str


def labels(config: Config) -> dict[str, LabelsOf]:
    known = {"train": BASE} | {of.rollouts: of.start for of in policies(config).values()}
    return {
        rollouts + suffix: LabelsOf(rollouts, policy, source)
        for rollouts, policy in known.items()
        for source, suffix in TABLES.items()
    }


def labelling(config: Config) -> dict[str, Ref]:
    """The critics that are needed: of the folds that are labelled."""
    folds = config.qvalues.folds
    wanted = [name for name, of in critics(config).items() if folds is None or of.fold is None or of.fold[0] < folds]
    return {name: Ref("train_critic", name) for name in wanted}


def label_params(config: Config, of: LabelsOf) -> list[str]:
    own = ["qvalues", "train_critic.folds"]
    packs = [f"train_critic.{key}" for key in ("pack_rollouts", "layout", "feedback", "end_weight", "max_length")]
    return own if of.source == "trie" else ["seed", *own, *packs]


@dataclass(frozen=True)
class GuidedOf:
    """A mode of guided decoding, and the critic that guides."""

    mode: str
    critic: Ref


def guided(config: Config) -> dict[str, GuidedOf]:
    critic = next(iter(labelling(config).values()))
    return {f"test-guided-{mode}": GuidedOf(mode, critic) for mode in config.guided.modes}


def guided_grades(config: Config) -> dict[str, GradesOf]:
    return {name: GradesOf(Ref("guided", name), "test") for name in guided(config)}


def evaluated(config: Config) -> dict[str, Ref]:
    """Test rollouts, and training grades for what is expected of a prompt before anything is known of it."""
    found = table("prompts", "test")
    for split in ("train", "test"):
        found |= table("rollouts", split) | table("grades", split)
    for name in students(config):
        found |= table("rollouts", f"test-{name}") | table("grades", f"test-{name}")
    for name in guided(config):
        found |= table("guided", name) | table("grades", name)
    for of in policies(config).values():
        found |= table("qvalues", of.labels.name) if of.labels else {}
    return found | labelling(config) | students(config) | ({"base": BASE} if students(config) else {})


def evaluate_params(config: Config) -> list[str]:
    """Keys that metrics/icl-v.json depends on besides its tables."""
    judged = [f"evaluate.{key}" for key in ("bootstrap", "confidence", "ece_bins", "targets")]
    critic = [
        f"train_critic.{key}"
        for key in ("pack_rollouts", "layout", "feedback", "end_weight", "max_length", "judged_prompts")
    ]
    names, said = config.train_policy.students, ("method", "labels", "learning_rate")
    compared = [f"train_policy.students.{name}.{key}" for name in names for key in said]
    guides = [f"guided.modes.{name}.{key}" for name in config.guided.modes for key in ("siblings", "scores")]
    return [
        *judged, *critic, *compared, *(["rollouts.student_samples"] if compared else []),
        *guides, *(["guided.samples"] if guides else []),
    ]  # fmt: skip


def _params(config: Config, of: CriticOf) -> list[str]:
    """Not where it is judged, and of the folds only whether it has one."""
    apart = {"judged_prompts", *(() if of.fold else ("folds",))}
    return ["seed", *(f"train_critic.{key}" for key in type(config.train_critic).model_fields if key not in apart)]


def check_packs(config: Config) -> None:
    """UserError where packs cannot be full, of training prompts or of those that the critic is judged on."""
    own, asked = config.train_critic, config.rollouts
    if (trained := asked.thinking_samples + asked.non_thinking_samples) < 2:
        raise UserError(
            f"rollouts.thinking_samples and non_thinking_samples give {trained} response a training prompt; a critic in "
            "context learns from several. Raise one of them."
        )
    if asked.test_samples <= own.pack_rollouts:
        raise UserError(
            f"rollouts.test_samples is {asked.test_samples}; the critic is judged on responses beyond the "
            f"{own.pack_rollouts - 1} that a full pack has before its last, and needs two at least, so more than "
            f"train_critic.pack_rollouts={own.pack_rollouts}. Raise the one or lower the other."
        )


def check_students(config: Config) -> None:
    """UserError where students are asked more often than the base that they are compared with, or named as a round is."""
    if rounds := [name for name in config.train_policy.students if re.search(r"-round\d+$", name)]:
        raise UserError(f"train_policy.students: '{rounds[0]}' ends as the name of a round does. Name it otherwise.")
    if (asked := config.rollouts).student_samples > asked.test_samples:
        raise UserError(
            f"rollouts.student_samples is {asked.student_samples}, but the base that students are compared with answers "
            f"every test prompt {asked.test_samples} times (rollouts.test_samples). Lower the one or raise the other."
        )


def check_folds(config: Config) -> None:
    """UserError where folds are to be labelled that there are no critics for."""
    if (config.qvalues.folds or 1) > config.train_critic.folds:
        raise UserError(
            f"qvalues.folds is {config.qvalues.folds}, but train_critic.folds cuts the prompts into "
            f"{config.train_critic.folds}. Lower the one or raise the other."
        )


def check_guides(config: Config) -> None:
    """UserError where there are too few test rollouts to read, and to compare with, or where nothing is drawn."""
    own, asked = config.guided, config.rollouts
    for name, guide in own.modes.items():
        if guide.siblings + own.samples > asked.test_samples:
            raise UserError(
                f"guided.modes.{name} reads {guide.siblings} test rollouts of a prompt and is compared with {own.samples} "
                f"others, but rollouts.test_samples is {asked.test_samples}. Raise it, or lower `siblings` or guided.samples."
            )
        if guide.siblings >= config.train_critic.pack_rollouts:
            raise UserError(
                f"guided.modes.{name} reads {guide.siblings} siblings; the critic has been trained with at most "
                f"{config.train_critic.pack_rollouts - 1} (train_critic.pack_rollouts), and knows less with more than without."
            )
    if own.modes and asked.sampling.temperature == 0:
        raise UserError("Guided decoding draws tokens, so rollouts.sampling.temperature must be above 0.")


STAGES = (
    Stage(
        "train_critic", "the critic in context {name}", CHECKPOINT, critics,
        reads=lambda c, v: {"base": BASE, "rollouts": Ref("rollouts", "train"), "grades": Ref("grades", "train")},
        params=_params, machine="big-gpu", check=check_packs, held_out=True,
    ),
    Stage(
        "train_policy", "the policy {name}", CHECKPOINT, policies,
        reads=lambda c, v: {
            "base": v.start, "rollouts": Ref("rollouts", v.rollouts), "grades": Ref("grades", v.rollouts),
            **({"qvalues": v.labels} if v.labels else {}),
        },
        params=lambda c, v: ["seed", f"train_policy.students.{v.student}"], machine="big-gpu", check=check_students,
        held_out=True,
    ),
    Stage(
        "guided", "test prompts answered under guidance, {name}", TABLE, guided,
        reads=lambda c, v: {
            "base": BASE, "rollouts": Ref("rollouts", "test"), "grades": Ref("grades", "test"), "critic": v.critic
        },
        params=lambda c, v: [
            "seed", *(f"rollouts.{key}" for key in ("sampling", "max_new_tokens")), "guided.prompts", "guided.samples",
            f"guided.modes.{v.mode}", *(f"train_critic.{key}" for key in ("pack_rollouts", "layout", "feedback", "max_length")),
        ],
        machine="gpu", check=check_guides,
    ),
    Stage(
        "qvalues", "what every plausible token is worth, {name}", TABLE, labels,
        reads=lambda c, v: {
            "base": v.policy, "rollouts": Ref("rollouts", v.rollouts), "grades": Ref("grades", v.rollouts),
            **(labelling(c) if v.source == "critic" else {}),
        },
        params=label_params, machine="gpu", check=check_folds,
    ),
)  # fmt: skip

ICL_V = System(
    name="icl-v",
    stages=STAGES,
    rollouts=policy_rollouts,
    graded=guided_grades,
    shows=lambda config: {"metrics/icl-v": Ref("evaluate", "icl-v")},
    evaluated=evaluated,
    evaluate_params=evaluate_params,
    sections=("train_critic", "qvalues", "train_policy", "guided"),
    evaluation="ziprc.evaluation.critic.record",
    page="ziprc.pages.icl_v",
)
