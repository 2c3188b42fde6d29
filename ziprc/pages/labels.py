"""Looking at labels: the tokens of some rollouts coloured by their value, and behind each what else could have stood there.

The page is that of inspect.py, with the candidates of a state in place of the joint: how likely the reference finds each, and
what it is worth. Two rollouts a prompt, a right and a wrong one where there are both.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ziprc.errors import UserError, nearest
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.pages.html import fill
from ziprc.pages.inspect import MAX_TOKENS
from ziprc.store.files import write_text
from ziprc.store.layout import Layout
from ziprc.tables.grades import GRADES
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.qvalues import QVALUES
from ziprc.tables.rollouts import ROLLOUTS

Row = dict[str, Any]
NOTE = (
    "Each token is coloured by the score that is expected once it stands there, by one who has read other graded responses to "
    "the same prompt; small differences matter. Point at a token, or move with the arrow keys, to see its rivals."
)


def picked(labels: list[Row], rollouts: dict[str, Row], grades: dict[str, Row], count: int) -> Iterator[Row]:
    """Some labelled rollouts: of each prompt the first right and the first wrong one, prompts with both first."""
    prompts: dict[str, dict[bool, Row]] = {}
    for row in labels:
        right = (grades[row["rollout_id"]]["score"] or 0) >= 0.5
        prompts.setdefault(rollouts[row["rollout_id"]]["prompt_id"], {}).setdefault(right, row)
    both = sorted(prompts.values(), key=lambda of: -len(of))
    yield from itertools.islice((row for of in both for _, row in sorted(of.items(), reverse=True)), count)


def rivals(row: Row, numbers: range, taken: int, words: dict[int, str]) -> list[list[Any]]:
    """The candidates of a state, best first: text, probability under the reference, value, and whether it was taken."""
    best = [(row["q"][n], row["ids"][n], float(np.exp(row["log_prob"][n]))) for n in numbers]
    return [[words[i], round(p, 4), round(q, 3), i == taken] for q, i, p in sorted(best, key=lambda of: -of[0])]


def labels_html(home: Path, name: str, count: int = 8) -> Path:
    """Write `<home>/inspect-labels-<name>.html` about the labels `name` and return its path; UserError when there are none."""
    layout = Layout(home.parent, home.name)
    path = layout.table("qvalues", name)
    if not path.exists():
        there = sorted(found.stem for found in path.parent.glob("*.parquet"))
        raise UserError(f"{path} does not exist{nearest(name, there)}. Build it first: `make {path}`.")
    tokenizer = load_tokenizer(layout.checkpoint("base"))
    rollouts = {row["rollout_id"]: row for row in ROLLOUTS.read(layout.table("rollouts", "train")).to_pylist()}
    grades = {row["rollout_id"]: row for row in GRADES.read(layout.table("grades", "train")).to_pylist()}
    prompts = {row["prompt_id"]: row for row in PROMPTS.read(layout.table("prompts", "train")).to_pylist()}
    columns = ["rollout_id", "source", "siblings", "offsets", "ids", "log_prob", "q", "values"]
    chosen = list(picked(QVALUES.read(path).select(columns).to_pylist(), rollouts, grades, count))
    words = {i: tokenizer.decode([i]) for row in chosen for i in row["ids"]}
    records = []
    for row in chosen:
        rollout, score = rollouts[row["rollout_id"]], grades[row["rollout_id"]]["score"]
        taken = rollout["response_token_ids"][:MAX_TOKENS]
        states = list(itertools.pairwise(row["offsets"]))[: len(taken)]
        records.append(
            {
                "id": row["rollout_id"], "question": prompts[rollout["prompt_id"]]["messages"][-1]["content"],
                "difficulty": f"valued by {row['source']} after {row['siblings']} others",
                "verdict": "cut off" if rollout["finish_reason"] == "length" else "right" if (score or 0) >= 0.5 else "wrong",
                "length": len(rollout["response_token_ids"]), "tokens": [words[t] for t in taken],
                "expected": np.round(row["values"][1 : len(taken) + 1], 3).tolist(), "start": round(row["values"][0], 3),
                "candidates": [rivals(row, range(*state), t, words) for state, t in zip(states, taken, strict=True)],
            }
        )  # fmt: skip
    target = home / f"inspect-labels-{name}.html"
    write_text(
        target,
        fill("inspect.html", title=f"{layout.experiment} · labels {name}", note=NOTE, data={"rollouts": records}),
    )
    return target
