"""One question to one checkpoint: everything is checked before the engine starts, then adaptive sampling runs live.

A checkpoint in `results/<experiment>/checkpoints/` is asked as its experiment asked it: manifests beside it say the task,
how responses were sampled and whether they think, and frontier.json the policy's settings for a budget. A checkpoint that
was copied elsewhere is asked with the defaults of config.yaml's keys; what the caller names goes before either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ziprc.chat import prompt_token_ids, visible_answer
from ziprc.config.load import Config
from ziprc.config.zip_rc import LIVE_POLICIES, Samples
from ziprc.errors import UserError, nearest
from ziprc.joint.head import read_joint_head, read_manifest
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.sampling.controller import Budget, Controller
from ziprc.sampling.families import PLUS, PUBLISHED, WIDE, Setting, live_setting
from ziprc.sampling.fitting import Fitted, read_fitted
from ziprc.sampling.live.bench import AnswerBook, open_engine
from ziprc.sampling.live.records import Answered, Event, Question
from ziprc.sampling.live.runner import Runner
from ziprc.sampling.policies.zip_rc import ZipRC
from ziprc.sampling.policies.zip_rc_plus import ZipRCPlus
from ziprc.store.digests import derived_seed, digest_file
from ziprc.store.files import read_json
from ziprc.store.layout import CHECKPOINT_MANIFEST
from ziprc.tasks.base import get_task

PRICE, ALPHA, BETA = 1e-3, 1.0, 0.03  # without a frontier.json: where `toy` spends some 3 samples
ROLLOUT_TABLES = ("test-ziprc", "validation-ziprc", "test", "train")
ROLLOUT_KEYS = ("engine", "sampling", "max_model_len", "max_new_tokens", "dtype", "test_thinking")


@dataclass(frozen=True)
class Wishes:
    """What the caller asks for; None leaves it to the experiment, or to the defaults."""

    prompt: str
    checkpoint: Path
    policy: str = PLUS
    samples: float = 4
    price: float | None = None
    alpha: float | None = None
    beta: float | None = None
    interval: int | None = None
    max_tokens: int | None = None  # of all branches together
    max_steps: int | None = None  # serial
    max_branches: int | None = None
    max_new_tokens: int | None = None  # of one response
    temperature: float | None = None
    min_p: float | None = None
    thinking: bool | None = None
    task: str | None = None
    engine: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Ready:
    """A checked question, with all that is needed to answer it."""

    wishes: Wishes
    config: Config
    tokenizer: Any
    controller: Controller
    setting: Setting
    question: Question
    task: Any

    def book(self, stops: tuple[int, ...]) -> AnswerBook:
        return AnswerBook(self.task, self.tokenizer, stops)


@dataclass(frozen=True)
class AsWritten:
    """Stands in for a task that nobody named: answers are equal when they are written alike."""

    name: str = "as written"

    def canonical_answer(self, response: str) -> str | None:
        return visible_answer(response) or None


@dataclass(frozen=True)
class Experiment:
    """What lies beside a checkpoint: the records of the experiment that trained it, empty ones for a copy."""

    rollouts: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    frontier: dict[str, Any] | None = None

    @classmethod
    def around(cls, checkpoint: Path) -> Experiment:
        """Read the manifests of the experiment that a checkpoint folder belongs to."""
        folder = checkpoint.resolve()
        if folder.parent.name != "checkpoints":
            return cls()
        home = folder.parent.parent
        tables = [home / "rollouts" / f"{name}.manifest.json" for name in ROLLOUT_TABLES]
        prompts = [home / "prompts" / f"{name}.manifest.json" for name in ("test", "validation", "train")]
        frontier = home / "frontier.json"
        params = _params(tables)
        return cls(
            {key: params[f"rollouts.{key}"] for key in ROLLOUT_KEYS if f"rollouts.{key}" in params},
            _params(prompts).get("prompts.task"),
            read_json(frontier) if frontier.exists() else None,
        )


def _params(manifests: list[Path]) -> dict[str, Any]:
    """Params of the first manifest that is there."""
    return next((read_json(path)["params"] for path in manifests if path.exists()), {})


# --- checks -----------------------------------------------------------------------------------------------------------


def prepare(wishes: Wishes) -> Ready:
    """Check everything; UserError for what the engine could only refuse later, or not at all."""
    folder = wishes.checkpoint
    _check_wishes(wishes)
    _check_checkpoint(folder)
    head = read_joint_head(folder)
    fitted = read_fitted(folder, head.grid)
    experiment = Experiment.around(folder)
    setting = setting_of(wishes, experiment, fitted)
    limits = {
        "branches": wishes.max_branches,
        "tokens": wishes.max_tokens,
        "latency": wishes.max_steps,
    }
    named = {name: limit for name, limit in limits.items() if limit is not None}
    budget = Budget(**{"branches": Samples().branches, "interval": setting.interval} | named)
    config = config_of(wishes, experiment, budget.branches)
    _check_response(config, setting)
    tokenizer = load_tokenizer(folder)
    messages = [{"role": "user", "content": wishes.prompt}]
    ids = tuple(prompt_token_ids(tokenizer, messages, config.rollouts.test_thinking))
    config = _make_room(config, len(ids), folder)
    name = wishes.task or experiment.task
    return Ready(
        wishes=wishes,
        config=config,
        tokenizer=tokenizer,
        controller=Controller(setting.policy, budget),
        setting=setting,
        question=Question("prompt", ids, derived_seed(wishes.seed, "sample", wishes.prompt)),
        task=get_task(name) if name else AsWritten(),
    )


def _check_wishes(wishes: Wishes) -> None:
    if not wishes.prompt.strip():
        raise UserError('The prompt is empty. Write the question, for example `ziprc sample "Compute 47+91+85" …`.')
    if wishes.policy not in LIVE_POLICIES:
        raise UserError(f"There is no live policy '{wishes.policy}'{nearest(wishes.policy, LIVE_POLICIES)} (--policy).")
    if not wishes.samples >= 1:
        raise UserError(f"--budget counts samples and must be at least 1, found {wishes.samples:g}.")
    plus, published = wishes.policy.startswith(PLUS), wishes.policy == PUBLISHED
    for option, value, fits in (
        ("--price", wishes.price, plus),
        ("--alpha", wishes.alpha, published),
        ("--beta", wishes.beta, published),
    ):
        if value is not None and not fits:
            raise UserError(
                f"{option} means nothing to the policy '{wishes.policy}'. Leave it out, or change --policy."
            )


def _check_checkpoint(folder: Path) -> None:
    """A folder with a joint head, and the tokenizer with which it was saved."""
    if not folder.is_dir():
        raise UserError(f"There is no checkpoint {folder}. Give a folder such as results/toy/checkpoints/ziprc.")
    manifest = read_manifest(folder)
    if "joint" not in manifest:
        raise UserError(
            f"{folder} has no joint head: its {CHECKPOINT_MANIFEST} names no grid of bins, so it cannot say what a sample "
            "is worth. Use a checkpoint of train_joint, such as checkpoints/ziprc."
        )
    named = manifest.get("files", {}).get("tokenizer.json")
    file = folder / "tokenizer.json"
    if named and file.exists() and digest_file(file) != named:
        raise UserError(
            f"{folder} was saved with another tokenizer: the digest of its tokenizer.json is not the one in "
            f"{CHECKPOINT_MANIFEST}. Put the original file back, or train a head with this tokenizer."
        )
    highest, text = max(load_tokenizer(folder).get_vocab().values()), int(manifest["joint"]["layout"]["text_size"])
    if highest >= text:
        raise UserError(
            f"{folder} has another tokenizer than it was trained with: token {highest} is in use, but text ends at row "
            f"{text - 1} of its output matrix and the joint head lies above. Put the original tokenizer back."
        )


def setting_of(wishes: Wishes, experiment: Experiment, fitted: Fitted) -> Setting:
    """The policy's setting: what validation chose for the budget, or defaults; then whatever was named."""
    if experiment.frontier is None:
        setting = Setting(_default_policy(wishes, fitted)) if wishes.policy != "majority" else None
    else:
        setting = live_setting(wishes.policy, wishes.samples, experiment.frontier, fitted)
    setting = setting or live_setting("majority", wishes.samples, {}, fitted)
    named = {"price": wishes.price, "alpha": wishes.alpha, "beta": wishes.beta}
    changes = {name: value for name, value in named.items() if value is not None}
    policy = replace(setting.policy, **changes) if changes else setting.policy  # type: ignore[type-var]
    return replace(setting, policy=policy, interval=setting.interval if wishes.interval is None else wishes.interval)


def _default_policy(wishes: Wishes, fitted: Fitted) -> ZipRC | ZipRCPlus:
    if wishes.policy == PUBLISHED:
        return ZipRC(fitted.grid, ALPHA, BETA)
    width = WIDE if wishes.policy.endswith("wide") else 1
    branching = wishes.policy.endswith("branching")
    return ZipRCPlus(fitted.fused, fitted.grid, PRICE, width=width, can_branch=branching, label=wishes.policy)


def config_of(wishes: Wishes, experiment: Experiment, branches: int) -> Config:
    """The rollouts' settings with whatever was named; UserError for what they cannot be."""
    named = {"temperature": wishes.temperature, "min_p": wishes.min_p}
    sampling = experiment.rollouts.get("sampling", {}) | {k: v for k, v in named.items() if v is not None}
    own = {"engine": wishes.engine, "max_new_tokens": wishes.max_new_tokens, "test_thinking": wishes.thinking}
    rollouts = experiment.rollouts | {k: v for k, v in own.items() if v is not None} | {"sampling": sampling}
    cap = rollouts.get("max_new_tokens", 0)
    if isinstance(cap, int) and cap >= rollouts.get("max_model_len", 512):
        rollouts["max_model_len"] = cap + 1
    try:
        return Config.model_validate({"rollouts": rollouts, "runtime": {"max_num_seqs": branches}})
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']}, found {e['input']!r}" for e in error.errors()
        )
        raise UserError(f"These settings cannot be: {found}.") from None


def _check_response(config: Config, setting: Setting) -> None:
    cap = config.rollouts.max_new_tokens
    if cap < setting.interval:
        raise UserError(
            f"A response may have {cap} tokens, less than one decision interval of {setting.interval}. Raise "
            "--max-new-tokens, or lower --interval."
        )


def _make_room(config: Config, prompt: int, folder: Path) -> Config:
    """Let the engine hold the prompt and a whole response; UserError when the model cannot."""
    own, model = config.rollouts, read_json(folder / "config.json")
    needed, limit = prompt + own.max_new_tokens, model.get("max_position_embeddings")
    if limit and needed > limit and not model.get("rope_scaling"):
        raise UserError(
            f"The prompt has {prompt} tokens and a response may have {own.max_new_tokens}, {needed} in all, but the model "
            f"has {limit} positions. Shorten the prompt, or lower --max-new-tokens."
        )
    return config.model_copy(update={"rollouts": own.model_copy(update={"max_model_len": needed})})


# --- asking -----------------------------------------------------------------------------------------------------------


def answer(ready: Ready, book: AnswerBook, on_event: Callable[[Event], None]) -> Answered:
    """Start the engine and answer the question."""
    folder, own = ready.wishes.checkpoint, ready.config.rollouts
    with open_engine(ready.config, folder, ready.tokenizer) as engine, contextlib.closing(engine.session()) as session:
        runner = Runner(
            session, ready.controller, [ready.question], book, window=ready.setting.window,
            max_new_tokens=own.max_new_tokens, cells=engine.settings.joint.grid.size, in_flight=1, on_event=on_event,
        )  # fmt: skip
        (answered,) = runner.run()
    if answered.error is not None:
        raise RuntimeError(answered.error)
    return answered
