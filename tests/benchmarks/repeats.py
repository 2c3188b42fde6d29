"""Can a base look back? Nats a token of segments that come again, at once and after other tokens; chance is shown beside.

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
from ziprc.training.scratch import Row, repeated_segments, text_data, traces
from ziprc.training.trainees import LanguageTrainee

TRACES, TOKENS, SEED = 500, 20_000, 99  # a seed that no base is trained with
GAPS, LENGTH, EACH = (0, 20, 100, 400), 12, 60  # tokens between a segment and its copy; tokens of it; how many


def copied_once(alphabet: list[int], gap: int) -> list[Row]:
    """A segment, `gap` random tokens, the segment again; the targets are the copy's tokens but the first."""
    rng = np.random.default_rng([SEED, gap])
    found = []
    for number in range(EACH):
        segment, between = rng.permutation(alphabet)[:LENGTH].tolist(), rng.choice(alphabet, gap).tolist()
        found.append((f"copy-{number}", [*segment, *between, *segment], LENGTH + gap + 1))
    return found


def nats(trainee: LanguageTrainee, rows: list[Row]) -> float:
    data = text_data(rows)
    batch = data.batch(np.arange(len(data)))
    with torch.inference_mode():
        return float(trainee(**batch)["loss"] / batch["count"])


def main(experiment: str) -> None:
    config, folder = load(Path("config.yaml"), experiment), Path("results", experiment, "checkpoints", "base")
    rows = traces(load_tokenizer(folder), get_task(config.prompts.task), config.prompts.settings, TRACES, SEED)
    alphabet = sorted({i for _, ids, _ in rows for i in ids})
    trainee = LanguageTrainee(load_model(folder))
    again = nats(trainee, repeated_segments(alphabet, TOKENS, SEED))
    print(f"{folder}: {again:.3f} nats a repeated token, chance {math.log(len(alphabet)):.2f}")
    for gap in GAPS:
        print(f"  one copy, after {gap} other tokens: {nats(trainee, copied_once(alphabet, gap)):.2f}")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        main(name)
