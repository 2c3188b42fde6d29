"""base: the policy that everything starts from. Trains a small one from scratch on the task's traces, or fetches one.

`base.model: scratch` makes a normal Transformers folder (Qwen3 architecture, byte-level BPE tokenizer, chat template);
nothing downstream knows that it is small. Otherwise the model is a local folder or a Hub id, copied as it is. With
`prompts`, the only stage that may touch the network.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ziprc.errors import UserError
from ziprc.joint.checkpoint import load_tokenizer, save_checkpoint
from ziprc.stages.context import Context, is_main_process, run_stage
from ziprc.store.digests import derived_seed, digest_file
from ziprc.store.files import atomic_folder
from ziprc.store.layout import CHECKPOINT_MANIFEST
from ziprc.store.manifest import write_sealed
from ziprc.tasks.base import TeachingTask, get_task
from ziprc.training.optimizers import OptimizerSettings
from ziprc.training.order import MicroBatches, plan_by_tokens
from ziprc.training.scratch import build_model, build_tokenizer, traces_for
from ziprc.training.trainees import LanguageTrainee
from ziprc.training.trainer import fit, forget_states, state_folder, world_size

WANTED_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer*",
    "vocab*",
    "merges*",
    "*.model",
]
SCRATCH = "scratch"


def run(context: Context) -> str:
    return train(context) if context.config.base.model == SCRATCH else fetch(context)


def train(context: Context) -> str:
    """Train the small model on the task's traces; returns the closing line."""
    config, target = context.config, context.target
    settings, runtime, seed = config.base, config.runtime, derived_seed(config.seed, "base")
    task = get_task(config.prompts.task)
    if not isinstance(task, TeachingTask):
        raise UserError(
            f"Task '{config.prompts.task}' has no traces to learn from, so base.model cannot be '{SCRATCH}'."
        )
    record = {
        "objective": "language",
        "params": context.params,
        "base": {"model": SCRATCH},
        "parents": {},
        "seed": seed,
    }

    tokenizer = build_tokenizer(task.vocabulary_corpus(), settings.architecture)
    model = build_model(settings.architecture, tokenizer, seed)
    data = traces_for(settings.tokens, task, config.prompts.settings, tokenizer, seed)
    plan = plan_by_tokens(data.sequences.lengths, settings.batch_tokens, settings.tokens, world_size(), seed)
    optimizer = OptimizerSettings(
        "muon", settings.learning_rate, settings.adamw_learning_rate, warmup=settings.warmup, schedule="linear"
    )
    trainee = LanguageTrainee(model)
    outcome = fit(trainee, MicroBatches(data, plan), optimizer, runtime, state_folder(target, record), seed)
    if is_main_process():
        save_checkpoint(target, trainee.merged(), tokenizer, record)
        forget_states(target)
    return f"trained a base model on {len(data.sequences)} traces, {outcome.text()}, wrote {target}"


def fetch(context: Context) -> str:
    """Copy a local or Hub model into the experiment; returns the closing line."""
    settings, target = context.config.base, context.target
    if not is_main_process():
        return ""
    record: dict[str, Any] = {
        "objective": "fetched",
        "params": context.params,
        "base": {"model": settings.model, "revision": settings.revision},
        "parents": {},
    }
    with atomic_folder(target) as private:
        if Path(settings.model).is_dir():
            copy_model(Path(settings.model), private)
        else:
            download_model(settings.model, settings.revision, private, context.graph.layout.experiment)
        check_model(private, settings.model)
        files = {p.name: digest_file(p) for p in sorted(private.iterdir()) if p.is_file()}
        write_sealed(private / CHECKPOINT_MANIFEST, {**record, "files": files})
    return f"copied {settings.model} ({len(files)} files) to {target}"


def copy_model(source: Path, private: Path) -> None:
    for pattern in WANTED_FILES:
        for path in source.glob(pattern):
            if path.name != CHECKPOINT_MANIFEST:
                shutil.copy2(path, private / path.name)


def download_model(name: str, revision: str | None, private: Path, experiment: str) -> None:
    """Fetch a model from the Hub (or from its local cache), safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        snapshot_download(
            name, revision=revision, allow_patterns=WANTED_FILES, ignore_patterns=["*/*"], local_dir=private
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"The model '{name}' (revision {revision or 'newest'}) could not be fetched from the Hugging Face Hub "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}), and base.model is no local folder. "
            f"Stage `base` needs the network. On a machine that has it, run `make fetch EXPERIMENT={experiment}` "
            "beforehand and take the cache along, or set base.model to a local folder; a private model needs HF_TOKEN."
        ) from None
    shutil.rmtree(private / ".cache", ignore_errors=True)


def check_model(folder: Path, name: str) -> None:
    """Refuse a folder that later stages could not use."""
    if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
        raise UserError(
            f"base.model '{name}' needs config.json and weights in safetensors; found: "
            f"{', '.join(sorted(p.name for p in folder.iterdir())) or 'nothing'}."
        )
    if not load_tokenizer(folder).chat_template:
        raise UserError(
            f"base.model '{name}' has no chat template, so prompts cannot be formatted. Use a chat model, or add "
            "`chat_template.jinja` to a local copy and set base.model to that folder."
        )


if __name__ == "__main__":
    run_stage("base", run)
