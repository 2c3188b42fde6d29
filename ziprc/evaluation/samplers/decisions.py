"""The decisions of live runs as a table, and what came of them.

One row per decision and branch: what the branch was before the decision, and what was decided about it. The rows of the
last decision of a prompt have the action `stop`; they hold the answers of finished branches, their grades, and which was
selected. A prompt that failed has a row with the action `failed` instead. `signals` is what the policy saw, so that its
decisions can be taken again without a model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ziprc.errors import UserError
from ziprc.evaluation.bootstrap import Resampling
from ziprc.evaluation.calibration import calibration_metrics
from ziprc.rewards.base import Verdict
from ziprc.sampling.controller import NONE
from ziprc.sampling.families import Setting
from ziprc.sampling.live.records import Answered, Decided
from ziprc.sampling.tree import NO_ANSWER, ROOT, Status
from ziprc.tables.check import TEXT
from ziprc.tables.grades import GradeStatus
from ziprc.tables.samples import SAMPLES

ECE_BINS = 10
JUDGED = (GradeStatus.GRADED, GradeStatus.UNFINISHED)  # what did not end by itself is wrong, as in replay


def decision_table(
    answers: Sequence[Answered], texts: Mapping[tuple[int, int], str], setting: Setting, budget: str
) -> pa.Table:
    """Rows of the samples table for one run, not graded yet.

    `texts` are the visible answers of the branches that ended by themselves, by (index of the question, slot).
    """
    rows = [row for a in answers for row in _rows(a, texts, setting, budget)]
    return SAMPLES.make(rows)


def _rows(
    answered: Answered, texts: Mapping[tuple[int, int], str], setting: Setting, budget: str
) -> Iterator[dict[str, Any]]:
    known = 0
    run = {"prompt_id": answered.question.key, "policy": setting.name, "budget": budget}
    last = None if answered.error else len(answered.decisions) - 1
    for number, decided in enumerate(answered.decisions):
        trees = decided.trees
        expected, remaining = (x[0] for x in setting.policy.expectations(trees))
        for slot in np.flatnonzero(trees.used[0]).tolist():
            row = run | {
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
            yield row | (_outcome(answered, texts, slot) if number == last else {})
        known = int(trees.used[0].sum())
    if answered.error:
        yield run | _failed(answered)


def _outcome(answered: Answered, texts: Mapping[tuple[int, int], str], slot: int) -> dict[str, Any]:
    """What the rows of the last decision say besides."""
    answer = texts.get((answered.index, slot))
    return {
        "answer": answer,
        "grade_status": GradeStatus.UNFINISHED if answer is None else None,
        "selected": slot == answered.slot,
        "probability": answered.probability,
        "prefill": answered.prefill,
        "lost": answered.lost,
    }


def _failed(answered: Answered) -> dict[str, Any]:
    """The row of a prompt that has no answer: why, and what it cost."""
    nothing = {"branch_id": NONE, "parent": ROOT, "fork": 0, "length": 0, "signals": [], "answer_number": NO_ANSWER}
    spent = {"step": answered.latency, "tokens_spent": answered.tokens, "prefill": answered.prefill}
    outcome = {
        "status": "failed",
        "action": "failed",
        "selected": False,
        "error": answered.error,
        "lost": answered.lost,
    }
    return {"decision": len(answered.decisions), **nothing, **spent, **outcome}


def ungraded_answers(table: pa.Table) -> set[tuple[str, str]]:
    """Prompt and visible answer of every branch that ended by itself: what there is to grade."""
    finished = table.filter(pc.is_valid(table["answer"]))
    return set(zip(finished["prompt_id"].to_pylist(), finished["answer"].to_pylist(), strict=True))


def with_grades(table: pa.Table, verdicts: Mapping[tuple[str, str], Verdict]) -> pa.Table:
    """The table with score and status of every finished branch; no score where a grader gave none."""
    pairs = list(zip(table["prompt_id"].to_pylist(), table["answer"].to_pylist(), strict=True))
    before = table["grade_status"].to_pylist()
    grades = [verdicts[pair].grade if pair[1] is not None else None for pair in pairs]
    columns = {
        "grade_status": [grade.status if grade else old for grade, old in zip(grades, before, strict=True)],
        "score": [grade.score if grade else None for grade in grades],
    }
    for name, values in columns.items():
        field = SAMPLES.columns.field(name)
        table = table.set_column(table.column_names.index(name), field, pa.array(values, field.type))
    return table


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
    """A prompt that failed counts as wrong, and what it spent as spent, tokens of lost attempts too.

    As in replay, a prompt with a finished branch that no grader could tell right from wrong is left out, and counted.
    """
    blank = table.filter(pc.invert(pc.is_in(table["grade_status"], pa.array([None, *JUDGED], TEXT))))
    ungraded = pc.unique(blank["prompt_id"])
    table = table.filter(pc.invert(pc.is_in(table["prompt_id"], ungraded)))
    if not table.num_rows:
        raise UserError(f"Not one of {len(ungraded)} live prompts could be graded. Look at the column grade_status.")
    final = table.filter(pc.or_(table["selected"], pc.equal(table["action"], "failed")))  # one row per prompt
    prompts = len(pc.unique(table["prompt_id"]))
    assert final.num_rows == prompts, "every prompt has ended, once"
    score, probability, tokens, lost, prefill = (
        pc.fill_null(final[c], 0).to_numpy().astype(np.float64)
        for c in ("score", "probability", "tokens_spent", "lost", "prefill")
    )
    boot = Resampling(np.arange(prompts), replicates, 0)
    branches = table.filter(pc.not_equal(table["action"], "failed")).group_by(["prompt_id", "branch_id", "parent"])
    parents, actions = branches.aggregate([])["parent"].to_numpy(), table["action"].to_pylist()
    counts = {name: actions.count(name) for name in ("pause", "resume")}
    counts |= {"start": int((parents == ROOT).sum()), "branch": int((parents != ROOT).sum())}
    record = {
        "setting": table["policy"][0].as_py(),
        "prompts": prompts,
        "failed": actions.count("failed"),
        "ungraded": len(ungraded),
        "accuracy": boot.ratio(score).interval(confidence),
        "ece": calibration_metrics(boot, probability, score, ECE_BINS)["ece"].interval(confidence),
        "tokens": float(np.mean(tokens + lost)),
        "prefill": float(np.mean(prefill)),
        "latency": float(np.mean(final["step"].to_numpy())),
        "samples": len(parents) / prompts,
        "actions": {name: count / prompts for name, count in sorted(counts.items())},
    }
    for key in ("together", "one_by_one"):
        if timing.get(key):
            record[key] = timing[key]
    return record | {"alone": timing.get("alone", 0)}
