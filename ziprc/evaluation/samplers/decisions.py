"""The decisions of live runs as a table, and what came of them.

One row per decision and branch: what the branch was before the decision, and what was decided about it. The rows of the
last decision of a prompt have the action `stop`; they hold the answers of finished branches, their scores, and which was
selected. `signals` is what the policy saw, so that its decisions can be taken again without a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ziprc.evaluation.bootstrap import Resampling
from ziprc.evaluation.calibration import calibration_metrics
from ziprc.sampling.controller import NONE
from ziprc.sampling.families import Setting
from ziprc.sampling.live.records import Answered, Decided
from ziprc.sampling.tree import ROOT, Status
from ziprc.tables.samples import SAMPLES

ECE_BINS = 10


@dataclass(frozen=True)
class Asked:
    """Visible answer and score of every finished branch, by (question, slot)."""

    answers: Mapping[tuple[int, int], tuple[str, float]]


def decision_table(answers: Sequence[Answered], asked: Asked, setting: Setting, budget: str) -> pa.Table:
    """Rows of the samples table for one run."""
    rows = [row for a in answers for row in _rows(a, asked, setting, budget)]
    return SAMPLES.make(rows)


def _rows(answered: Answered, asked: Asked, setting: Setting, budget: str) -> list[dict[str, Any]]:
    out: list[dict[str, Any]] = []
    known = 0
    last = len(answered.decisions) - 1
    for number, decided in enumerate(answered.decisions):
        trees = decided.trees
        expected, remaining = (x[0] for x in setting.policy.expectations(trees))
        for slot in np.flatnonzero(trees.used[0]).tolist():
            row = {
                "prompt_id": answered.question.key,
                "policy": setting.name,
                "budget": budget,
                "decision": number,
                "step": decided.step,
                "branch_id": slot,
                "parent": int(trees.parent[0, slot]),
                "fork": int(trees.fork[0, slot]),
                "length": int(trees.length[0, slot]),
                "status": Status(int(trees.status[0, slot])).name.lower(),
                "action": "stop" if number == last else _action(decided, slot, known),
                "expected_reward": _number(expected[slot]),
                "expected_remaining": _number(remaining[slot]),
                "tokens_spent": decided.tokens,
                "utility": _number(decided.decision.utility[0]),
                "signals": trees.signals[0, slot].tolist(),
                "answer_number": int(trees.answer[0, slot]),
                "spot": int(trees.spot[0, slot]) if trees.spot.size else None,
                "spot_signals": trees.spot_signals[0, slot].tolist() if trees.spot.size else None,
                "selected": False,
            }
            out.append(row | (_outcome(answered, asked, slot) if number == last else {}))
        known = int(trees.used[0].sum())
    return out


def _outcome(answered: Answered, asked: Asked, slot: int) -> dict[str, Any]:
    """What the rows of the last decision say besides."""
    answer, score = asked.answers.get((answered.index, slot), (None, None))
    return {
        "answer": answer,
        "score": score,
        "selected": slot == answered.slot,
        "probability": answered.probability,
        "prefill": answered.prefill,
    }


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _action(decided: Decided, slot: int, known: int) -> str:
    """What was decided about a branch; one seen for the first time, if it goes on, is reported as started or branched."""
    trees, decision = decided.trees, decided.decision
    status = Status(int(trees.status[0, slot]))
    runs = bool(decision.run[0, slot])
    if slot >= known and (runs or status is Status.FINISHED):
        return "branch" if trees.parent[0, slot] != NONE else "start"
    if status is Status.FINISHED:
        return "done"
    if status is Status.RUNNING:
        return "continue" if runs else "pause"
    return "resume" if runs else "wait"


def live_record(table: pa.Table, timing: Mapping[str, Any], replicates: int, confidence: float) -> dict[str, Any]:
    """By budget: accuracy with interval, costs per prompt, how often each action was taken, and measured times."""
    return {
        budget: _budget_record(
            table.filter(pc.equal(table["budget"], budget)), timing.get(budget, {}), replicates, confidence
        )
        for budget in dict.fromkeys(table["budget"].to_pylist())
    }


def _budget_record(table: pa.Table, timing: Mapping[str, Any], replicates: int, confidence: float) -> dict[str, Any]:
    """A prompt that failed counts as wrong."""
    final = table.filter(pc.equal(table["action"], "stop"))
    chosen = final.filter(final["selected"])
    prompts = len(pc.unique(table["prompt_id"]))
    failed = prompts - chosen.num_rows
    score, probability = (
        np.concatenate([np.nan_to_num(chosen[c].to_numpy().astype(np.float64)), np.zeros(failed)])
        for c in ("score", "probability")
    )
    boot = Resampling(np.arange(prompts), replicates, 0)
    actions, parents = table["action"].to_pylist(), final["parent"].to_numpy()
    counts = {name: actions.count(name) for name in ("pause", "resume")}
    counts |= {"start": int((parents == ROOT).sum()), "branch": int((parents != ROOT).sum())}
    record = {
        "setting": table["policy"][0].as_py(),
        "prompts": prompts,
        "failed": failed,
        "accuracy": boot.ratio(score).interval(confidence),
        "ece": calibration_metrics(boot, probability, score, ECE_BINS)["ece"].interval(confidence),
        "tokens": float(np.mean(chosen["tokens_spent"].to_numpy())),
        "prefill": float(np.mean(chosen["prefill"].to_numpy())),
        "latency": float(np.mean(chosen["step"].to_numpy())),
        "samples": final.num_rows / prompts,
        "actions": {name: count / prompts for name, count in sorted(counts.items())},
    }
    for key in ("together", "one_by_one"):
        if timing.get(key):
            record[key] = timing[key]
    return record | {"alone": timing.get("alone", 0)}
