"""base: the policy that everything starts from. Trains a small one from scratch on the task's traces, or fetches one.

`base.model: scratch` makes a normal Transformers folder (Qwen3 architecture, byte-level BPE tokenizer, chat template);
nothing downstream knows that it is small. Otherwise the model is a local folder or a Hub id, copied as it is. With
`prompts`, the only stage that may touch the network.
"""

from __future__ import annotations

import shutil

from ziprc.errors import UserError
from ziprc.joint.hub import MODEL_FILES, check_model, commit_of, local_model
from ziprc.stages.context import Context, is_main_process, run_stage
from ziprc.store.digests import derived_seed, digest_file
from ziprc.store.files import atomic_folder
from ziprc.store.layout import CHECKPOINT_MANIFEST
from ziprc.store.manifest import write_sealed
from ziprc.tasks.base import TeachingTask, get_task
from ziprc.training.resume import world_size
from ziprc.training.scratch import base_batches, build_model, build_tokenizer
from ziprc.training.trainees import LanguageTrainee
from ziprc.training.trainer import train

SCRATCH = "scratch"


def from_scratch(context: Context) -> str:
    """Train the small model on the task's traces; returns the closing line."""
    config, settings, seed = context.config, context.config.base, derived_seed(context.config.seed, "base")
    task = get_task(config.prompts.task)
    if not isinstance(task, TeachingTask):
        raise UserError(
            f"Task '{config.prompts.task}' has no traces to learn from, so base.model cannot be '{SCRATCH}'."
        )
    tokenizer = build_tokenizer(task.vocabulary_corpus(), settings.architecture)
    batches = base_batches(settings, task, config.prompts.settings, tokenizer, world_size(), seed)

    def fresh() -> LanguageTrainee:
        return LanguageTrainee(build_model(settings.architecture, tokenizer, seed))

    base = {"model": SCRATCH}
    record = {"objective": "language", "params": context.params, "base": base, "parents": {}, "seed": seed}
    done = train(context.target, record, fresh(), fresh, batches, settings, config.runtime, "base", tokenizer)
    return f"trained a base model on {len(batches.data.names)} sequences, {done}"


def fetch(context: Context) -> str:
    """Copy a local or Hub model into the experiment; returns the closing line."""
    if not is_main_process():
        return ""
    settings = context.config.base
    source = local_model(settings.model, settings.revision, "base.model", download=True)
    check_model(source, settings.model, "base.model")
    base = {"model": settings.model, "revision": settings.revision, "commit": commit_of(source)}
    record = {"objective": "fetched", "params": context.params, "base": base, "parents": {}}
    names = {path.name for pattern in MODEL_FILES for path in source.glob(pattern)} - {CHECKPOINT_MANIFEST}
    with atomic_folder(context.target) as private:
        for name in sorted(names):
            shutil.copy2(source / name, private / name)  # files of the cache are links: their contents
        files = {p.name: digest_file(p) for p in sorted(private.iterdir())}
        write_sealed(private / CHECKPOINT_MANIFEST, {**record, "files": files})
    return f"copied {settings.model} ({len(files)} files) to {context.target}"


def run(context: Context) -> str:
    """Train the base, or fetch it; the closing line."""
    return from_scratch(context) if context.config.base.model == SCRATCH else fetch(context)


if __name__ == "__main__":
    run_stage("base", run)
