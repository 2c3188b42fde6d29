"""One question to one checkpoint: everything is checked before the engine starts, then adaptive sampling runs live.

A checkpoint in `results/<experiment>/checkpoints/` is asked as its experiment asked it: manifests beside it say the task,
how responses were sampled and whether they think, and frontier.json the policy's settings for a budget. A checkpoint that
was copied elsewhere is asked with the defaults of config.yaml's keys; what the caller names goes before either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ziprc.chat import prompt_token_ids, visible_answer
from ziprc.config.load import Config
from ziprc.config.zip_rc import Samples
from ziprc.errors import UserError
from ziprc.joint.head import read_joint_head, read_manifest
from ziprc.joint.tokenizer import load_tokenizer, text_ids
from ziprc.sampling.controller import Budget, Controller
from ziprc.sampling.families import PLUS, PUBLISHED, Setting, live_setting
from ziprc.sampling.fitting import read_fitted
from ziprc.sampling.live.bench import AnswerBook, open_engine
from ziprc.sampling.live.records import Answered, Event, Question
from ziprc.sampling.live.runner import Runner
from ziprc.sampling.policies.zip_rc import ZipRC
from ziprc.store.digests import derived_seed, digest_file
from ziprc.store.files import read_json
from ziprc.store.layout import CHECKPOINT_MANIFEST
from ziprc.tasks.base import get_task

# Stands in for frontier.json beside a copy: where `toy` spends some 3 samples.
OWN = {"interval": Setting.interval, "window": Setting.window, "tokens": 1.0}
DEFAULTS = {
    "one_sample": 1.0,
    "chosen": {
        PLUS: [OWN | {"price": 1e-3, "width": 1}],
        PUBLISHED: [OWN | {"alpha": 1.0, "beta": 0.03, "samples": ZipRC.k_max, "calibrated": False}],
    },
}
ROLLOUT_TABLES = tuple(f"rollouts/{name}" for name in ("test-ziprc", "validation-ziprc", "test", "train"))
PROMPT_TABLES = tuple(f"prompts/{name}" for name in ("test", "validation", "train"))
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

    def named(self, *fields: str, **others: str) -> dict[str, Any]:
        """Those of some fields that the caller named; `others` by the names that they have elsewhere."""
        pairs = [*zip(fields, fields, strict=True), *others.items()]
        return {name: value for name, field in pairs if (value := getattr(self, field)) is not None}


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


class AsWritten:
    """Stands in for a task that nobody named: answers are equal when they are written alike."""

    name = "as written"

    def canonical_answer(self, response: str) -> str | None:
        return visible_answer(response) or None


def prepare(wishes: Wishes) -> Ready:
    """Check everything; UserError for what the engine could only refuse later, or not at all."""
    folder = wishes.checkpoint
    _check_wishes(wishes)
    tokenizer = _checked_tokenizer(folder)
    beside = folder.resolve().parent
    home = beside.parent if beside.name == "checkpoints" else None
    setting = _setting_of(wishes, home)
    limits = wishes.named(branches="max_branches", tokens="max_tokens", latency="max_steps")
    budget = Budget(**{"branches": Samples().branches, "interval": setting.interval} | limits)
    config = _config_of(wishes, _params(home, ROLLOUT_TABLES), budget.branches)
    own = config.rollouts
    if own.max_new_tokens < setting.interval:
        raise UserError(
            f"A response may have {own.max_new_tokens} tokens, less than one decision interval of {setting.interval}. "
            "Raise --max-new-tokens, or lower --interval."
        )
    ids = tuple(prompt_token_ids(tokenizer, [{"role": "user", "content": wishes.prompt}], own.test_thinking))
    room = {"max_model_len": _room(len(ids), own.max_new_tokens, folder)}
    config = config.model_copy(update={"rollouts": own.model_copy(update=room)})
    question = Question("prompt", ids, derived_seed(wishes.seed, "sample", wishes.prompt))
    named = wishes.task or _params(home, PROMPT_TABLES).get("prompts.task")
    task = get_task(named) if named else AsWritten()
    return Ready(wishes, config, tokenizer, Controller(setting.policy, budget), setting, question, task)


def _params(home: Path | None, tables: tuple[str, ...]) -> dict[str, Any]:
    """Params of the first table of an experiment that is there; none for a copy of a checkpoint."""
    manifests = (home / f"{table}.manifest.json" for table in tables) if home else ()
    return next((read_json(path)["params"] for path in manifests if path.exists()), {})


def _check_wishes(wishes: Wishes) -> None:
    """What `ziprc sample` has not refused before anything heavy was imported."""
    policy = wishes.policy
    if not wishes.prompt.strip():
        raise UserError('The prompt is empty. Write the question, for example `ziprc sample "Compute 47+91+85" …`.')
    understood = ("alpha", "beta") if policy == PUBLISHED else ("price",) if policy.startswith(PLUS) else ()
    for option in wishes.named("price", "alpha", "beta"):
        if option not in understood:
            raise UserError(f"--{option} means nothing to the policy '{policy}'. Leave it out, or change --policy.")


def _checked_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder with a joint head, which must be the one with which it was saved."""
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
    tokenizer = load_tokenizer(folder)
    highest, text = max(text_ids(folder)), int(manifest["joint"]["layout"]["text_size"])
    if highest >= text:
        raise UserError(
            f"{folder} has another tokenizer than it was trained with: token {highest} is in use, but text ends at row "
            f"{text - 1} of its output matrix and the joint head lies above. Put the original tokenizer back."
        )
    return tokenizer


def _setting_of(wishes: Wishes, home: Path | None) -> Setting:
    """The policy's setting: what validation chose for the budget, or defaults; then whatever was named."""
    fitted = read_fitted(wishes.checkpoint, read_joint_head(wishes.checkpoint).grid)
    chosen = home / "frontier.json" if home else None
    frontier = read_json(chosen) if chosen and chosen.exists() else DEFAULTS
    setting = live_setting(wishes.policy, wishes.samples, frontier, fitted)
    policy = replace(setting.policy, **wishes.named("price", "alpha", "beta"))  # type: ignore[type-var]
    return replace(setting, policy=policy, **wishes.named("interval"))


def _config_of(wishes: Wishes, params: dict[str, Any], branches: int) -> Config:
    """The settings of the experiment's rollouts with whatever was named; UserError for what they cannot be."""
    rollouts = {key: params[f"rollouts.{key}"] for key in ROLLOUT_KEYS if f"rollouts.{key}" in params}
    rollouts |= wishes.named("engine", "max_new_tokens", test_thinking="thinking")
    rollouts["sampling"] = rollouts.get("sampling", {}) | wishes.named("temperature", "min_p")
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


def _room(prompt: int, response: int, folder: Path) -> int:
    """Tokens that the engine must hold: the prompt and a whole response; UserError when the model cannot."""
    model, needed = read_json(folder / "config.json"), prompt + response
    limit = model.get("max_position_embeddings")
    if limit and needed > limit and not model.get("rope_scaling"):
        raise UserError(
            f"The prompt has {prompt} tokens and a response may have {response}, {needed} in all, but the model has "
            f"{limit} positions. Shorten the prompt, or lower --max-new-tokens."
        )
    return needed


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
