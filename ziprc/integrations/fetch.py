"""`ziprc fetch`: download an experiment's models and data beforehand, for machines without a network."""

from __future__ import annotations

from pathlib import Path

from ziprc.config.load import Config
from ziprc.tasks.base import get_task


def fetch_experiment(config: Config) -> str:
    """Fill the Hugging Face cache with what the stages `prompts`, `base` and `grades` read; returns a summary line."""
    done = []
    if config.prompts.task == "hub":
        for split, count in (("train", config.prompts.train), ("test", config.prompts.test)):
            get_task("hub").prompts(config.prompts.settings, split, count, config.seed)
        done.append("data sets")
    models = [(config.base.model, config.base.revision)] if config.base.model != "scratch" else []
    if config.grades.judge:
        models.append((config.grades.judge.model, config.grades.judge.revision))
    for model, revision in models:
        if not Path(model).exists():
            from huggingface_hub import snapshot_download

            snapshot_download(model, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.gguf", "original/*"])
            done.append(model)
    return (
        f"fetch: {', '.join(done)} in the cache" if done else "fetch: nothing to download, this experiment is offline"
    )
