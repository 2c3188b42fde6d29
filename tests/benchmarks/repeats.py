"""Can a base look back? Nats a token of held-out repeated segments, where chance is the log of the tokens that there are.

python -m tests.benchmarks.repeats smoke
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import torch

from ziprc.config.load import load
from ziprc.joint.checkpoint import load_model
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.tasks.base import get_task
from ziprc.training.scratch import repeated_segments, text_data, traces
from ziprc.training.trainees import LanguageTrainee

TRACES, TOKENS, SEED = 500, 20_000, 99  # a seed that no base is trained with


def main(experiment: str) -> None:
    config, folder = load(Path("config.yaml"), experiment), Path("results", experiment, "checkpoints", "base")
    rows = traces(load_tokenizer(folder), get_task(config.prompts.task), config.prompts.settings, TRACES, SEED)
    alphabet = sorted({i for _, ids, _ in rows for i in ids})
    data = text_data(repeated_segments(alphabet, TOKENS, SEED))
    batch = data.batch(np.arange(len(data)))
    with torch.inference_mode():
        loss = LanguageTrainee(load_model(folder))(**batch)["loss"]
    print(f"{folder}: {loss / batch['count']:.3f} nats a repeated token, chance {math.log(len(alphabet)):.2f}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
