"""Looking at single rollouts: tokens coloured by the expected score, with the joint behind each of them.

Token t is coloured by the state that emitted it, which has seen the prompt and the tokens before t. Model text is data: it
reaches the page only as JSON whose angle brackets are escaped and as `textContent` (templates/inspect.js), and it reaches
the terminal without control characters.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ziprc.evaluation.outcomes import MOMENTS, Outcomes, join_outcomes, moment_positions
from ziprc.joint.bins import BinGrid
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.head import read_joint_head
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.pages.html import fill
from ziprc.reading.recorded import read_states
from ziprc.store.files import write_text
from ziprc.store.layout import Layout
from ziprc.tables.grades import GRADES
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS

NOTE = (
    "Each token is coloured by the expected score just before it was sampled. Point at a token, or move with the arrow keys, to "
    "see the joint distribution over final score and remaining tokens."
)
MAX_TOKENS = 1500  # shown of one rollout: a page with every joint of a 30,000-token response helps nobody


@dataclass(frozen=True)
class InspectedRollout:
    """One rollout with what the head said before each token (all arrays [m, …])."""

    rollout_id: str
    question: str
    difficulty: str
    score: float
    finished: bool
    length: int
    tokens: Sequence[str]
    joint: JointDistribution

    @property
    def remaining(self) -> NDArray[np.int64]:
        """[m] tokens that really were still to come."""
        return self.length - np.arange(len(self.tokens))

    @property
    def verdict(self) -> str:
        return "cut off" if not self.finished else "right" if self.score >= 0.5 else "wrong"


def pick_rollouts(outcomes: Outcomes, difficulty: Sequence[str], count: int) -> NDArray[np.int64]:
    """Indices of `count` rollouts: cells of difficulty and outcome in turn, one prompt as rarely twice as possible."""
    cells: dict[tuple[str, bool], list[int]] = {}
    for i, (good, group) in enumerate(zip(outcomes.success.tolist(), outcomes.group.tolist(), strict=True)):
        cells.setdefault((difficulty[group], not good), []).append(i)
    chosen: list[int] = []
    while len(chosen) < count and any(cells.values()):
        for _, cell in sorted(cells.items()):
            if cell:
                seen = set(outcomes.group[chosen])
                chosen.append(next((i for i in cell if outcomes.group[i] not in seen), cell[0]))
                cell.remove(chosen[-1])
    return np.array(chosen[:count], dtype=np.int64)


def load_rollouts(layout: Layout, checkpoint: str, count: int) -> list[InspectedRollout]:
    """Some test rollouts, spread over difficulty and outcome, with the joints of `checkpoint`."""
    rollouts = ROLLOUTS.read(layout.table("rollouts", "test"))
    grades = layout.table("grades", "test")
    outcomes = join_outcomes(rollouts, GRADES.read(grades), str(grades))
    prompts = {row["prompt_id"]: row for row in PROMPTS.read(layout.table("prompts", "test")).to_pylist()}
    asked = [prompts[p] for p in outcomes.prompt_ids.to_pylist()]
    chosen = pick_rollouts(outcomes, [prompt["difficulty"] for prompt in asked], count)
    length = np.minimum(outcomes.length[chosen], MAX_TOKENS)
    positions = np.minimum(np.arange(int(length.max(initial=1))), length[:, None] - 1)
    folder = layout.checkpoint(checkpoint)
    grid, tokenizer = read_joint_head(folder).grid, load_tokenizer(folder)
    ids = outcomes.rollout_ids.take(pa.array(chosen))
    states = read_states(layout.table("introspection", checkpoint), ids, outcomes.length[chosen], positions, grid.size)
    tokens = rollouts["response_token_ids"].take(pa.array(outcomes.rows[chosen])).to_pylist()
    return [
        InspectedRollout(
            rollout_id=ids[row].as_py(),
            question=asked[outcomes.group[i]]["messages"][-1]["content"],
            difficulty=asked[outcomes.group[i]]["difficulty"],
            score=float(outcomes.score[i]),
            finished=bool(outcomes.finished[i]),
            length=int(outcomes.length[i]),
            tokens=[tokenizer.decode([t]) for t in tokens[row][: length[row]]],
            joint=JointDistribution(grid, states.at[row, : length[row]]),
        )
        for row, i in enumerate(chosen.tolist())
    ]


def length_labels(grid: BinGrid) -> list[str]:
    """What the length bins hold, in whole tokens; the last is open."""
    *closed, (last, _) = pairwise(grid.length_edges)
    return [f"{a}" if b - a == 1 else f"{a}–{b - 1}" for a, b in closed] + [f"{last}+"]


def inspect_html(home: Path, checkpoint: str = "ziprc", count: int = 8) -> Path:
    """Write `<home>/inspect.html` (`inspect-<checkpoint>.html` for another head) and return its path."""
    layout = Layout(home.parent, home.name)
    rollouts = load_rollouts(layout, checkpoint, count)
    grid = read_joint_head(layout.checkpoint(checkpoint)).grid
    records = [
        {
            "id": rollout.rollout_id,
            **{name: getattr(rollout, name) for name in ("question", "difficulty", "verdict", "length", "tokens")},
            "expected": np.round(rollout.joint.expected_reward(), 3).tolist(),
            "median": np.round(rollout.joint.median_remaining(), 1).tolist(),
            "joint": np.round(rollout.joint.probabilities.astype(np.float64), 3).tolist(),
        }
        for rollout in rollouts
    ]
    rewards = [f"{c:.2f}" for c in grid.reward_centres]
    data = {"rewards": rewards, "lengths": length_labels(grid), "rollouts": records}
    target = home / ("inspect.html" if checkpoint == "ziprc" else f"inspect-{checkpoint}.html")
    write_text(target, fill("inspect.html", title=f"{layout.experiment} · {checkpoint}", note=NOTE, data=data))
    return target


RAMP = (203, 209, 215, 222, 229, 194, 159, 117, 75)  # xterm colours from low to high expected score


def _printable(text: str) -> str:
    """Without control characters, so that model text cannot steer the terminal."""
    return "".join(c if c == "\n" or c.isprintable() else "·" for c in text)


def _coloured(rollout: InspectedRollout) -> str:
    level = np.minimum((rollout.joint.expected_reward() * len(RAMP)).astype(int), len(RAMP) - 1)
    start = (f"\x1b[30;48;5;{RAMP[k]}m" for k in level)
    pieces = (_printable(token).split("\n") for token in rollout.tokens)
    return "".join("\n".join(f"{s}{part}\x1b[0m" for part in piece) for s, piece in zip(start, pieces, strict=True))


def inspect_text(home: Path, checkpoint: str = "ziprc", count: int = 2) -> str:
    """Some rollouts for a terminal: coloured tokens when the output is one, plain text otherwise."""
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    blocks = []
    for rollout in load_rollouts(Layout(home.parent, home.name), checkpoint, count):
        title = _printable(f"{rollout.question}   [{rollout.difficulty}; {rollout.length} tokens; {rollout.verdict}]")
        text = _coloured(rollout) if colours else _printable("".join(rollout.tokens))
        rows = [f"  {'moment':<8}{'E[score]':>9}{'median left':>13}{'really left':>13}"]
        expected, median = rollout.joint.expected_reward(), rollout.joint.median_remaining()
        at = moment_positions(np.array([len(rollout.tokens)]))[0]
        for moment, j in zip(MOMENTS, at.tolist(), strict=True):
            rows.append(f"  {moment:<8}{expected[j]:>9.2f}{median[j]:>13.0f}{rollout.remaining[j]:>13}")
        blocks += [title, text, "\n".join(rows)]
    return "\n\n".join(blocks)
