"""`ziprc fetch`: download an experiment's models and data beforehand, for machines without a network."""

from __future__ import annotations

from ziprc.config.load import Config
from ziprc.joint.hub import check_model, commit_of, local_model
from ziprc.tasks.base import get_task


def fetch_experiment(config: Config) -> str:
    """Fill the Hugging Face cache with what the stages `prompts`, `base` and `grades` read; returns a summary line.

    UserError for data that give no prompts and for a model that those stages would refuse.
    """
    done, prompts = [], config.prompts
    if prompts.task == "hub":
        for split in ("train", "validation", "test"):
            found = get_task("hub").prompts(prompts.settings, split, getattr(prompts, split), config.seed)
            done.append(f"{len(found)} prompts of {split}")
    for key, model in (("base.model", config.base), ("grades.judge.model", config.grades.judge)):
        if model and model.model != "scratch":
            folder = local_model(model.model, model.revision, key, download=True)
            check_model(folder, model.model, key)
            commit = commit_of(folder)
            done.append(f"{model.model} at {commit}" if commit else f"{model.model}, a local folder")
    return f"fetch: {'; '.join(done)}" if done else "fetch: nothing to download, this experiment is offline"
