"""The record of metrics/countdown-rl.json: what on-policy training was worth, and what each window took for it.

    policies      {base | online-<arm>: {accuracy, tokens, finished, window, within, difference: {rival: …}, training}}
    training      {rollouts, prompts, seen, tokens, windows, moves, mismatch, …, curve: [{rollout, tokens, held_out}]}
    equal_tokens  {online-<arm>: {tokens, rollout, held_out, difference}}

`accuracy` is at the largest window and `within` at the last one of training, on test prompts with the same seeds for all;
differences are paired over prompts, with the base and with the arm `fixed`. `seen` is how often a training prompt was asked.
The curve is on validation prompts, asked the same way each time; at equal tokens every arm is taken at its last judgement
before it had sampled more than the thriftiest arm did in all. Every token that was sampled for training counts; those of
judgements are not training's, and are given apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ziprc.config.load import Config
from ziprc.evaluation.answered import answered
from ziprc.evaluation.bootstrap import Resampling, rounded, target_record
from ziprc.systems.online import trained
from ziprc.tables.progress import PROGRESS
from ziprc.tables.prompts import PROMPTS

FIXED, ADAPTIVE = "online-fixed", "online-adaptive"
COMPARED = ("accuracy", "tokens", "finished")
Row = Mapping[str, Any]


def training(rows: Sequence[Row], prompts: int, replicates: int, seed: int, confidence: float) -> dict[str, Any]:
    """What one arm did, of its progress table; `prompts` of the training split."""
    done = [row for row in rows if row["rollout"]]
    windows = [row["window"] for row in done]
    curve = []
    for row in rows:
        if row["held_out"] is not None:
            boot = Resampling(np.arange(len(row["held_out_scores"])), replicates, seed)
            curve.append({
                "rollout": row["rollout"], "tokens": row["tokens_total"],
                "held_out": boot.ratio(row["held_out_scores"]).interval(confidence),
            })  # fmt: skip
    mismatch = [row["mismatch_kl"] for row in done if row["mismatch_kl"] is not None]
    return {
        "rollouts": len(done), "prompts": sum(row["prompts"] for row in done), "tokens": done[-1]["tokens_total"],
        "seen": rounded(sum(row["prompts"] for row in done) / prompts),
        "windows": windows, "mean_window": rounded(float(np.mean(windows))), "probes": sum(bool(row["probe"]) for row in done),
        "success": [rounded(row["success"]) for row in done], "truncated": [rounded(row["truncated"]) for row in done],
        "right_length": [row["right_length_q95"] for row in done], "moves": moves(done),
        "ungraded": sum(row["ungraded"] for row in done), "mismatch": max(mismatch, default=None),
        "ratio_std": rounded(max(row["ratio_std"] for row in done)), "curve": curve,
        "held_out_tokens": sum(row["held_out_tokens"] or 0 for row in rows),
    }  # fmt: skip


def moves(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every change of the window: after which rollout, from what to what, and why."""
    return [
        {"rollout": row["rollout"], "window": row["window"], "next": row["next_window"], "decision": row["decision"]}
        for row in rows
        if row["next_window"] != row["window"]
    ]


def at_equal_tokens(
    tables: Mapping[str, Sequence[Row]], replicates: int, seed: int, confidence: float
) -> dict[str, Any]:
    """Every arm's last judgement before it had sampled more than the thriftiest did in all, minus the `fixed` arm's."""
    judged = {name: [row for row in rows if row["held_out"] is not None] for name, rows in tables.items()}
    if not all(judged.values()) or FIXED not in tables:
        return {}
    budget = min(rows[-1]["tokens_total"] for rows in tables.values())
    last = {name: [row for row in rows if row["tokens_total"] <= budget][-1] for name, rows in judged.items()}
    boot = Resampling(np.arange(len(last[FIXED]["held_out_scores"])), replicates, seed)
    found = {name: boot.ratio(row["held_out_scores"]) for name, row in last.items()}
    return {
        name: {
            "tokens": row["tokens_total"], "rollout": row["rollout"], "held_out": found[name].interval(confidence),
            "difference": (found[name] - found[FIXED]).interval(confidence) if name != FIXED else None,
        }
        for name, row in last.items()
    }  # fmt: skip


def metrics(config: Config, reads: Mapping[str, Path]) -> dict[str, Any]:
    """The whole record, from tables and checkpoints by role."""
    own, seed = config.evaluate, config.seed
    prompts = PROMPTS.read(reads["prompts/test"])["prompt_id"].to_pylist()
    seen_prompts = PROMPTS.read(reads["prompts/train"]).num_rows
    arms = {name: config.train_online.arms[name.removeprefix("online-")] for name in trained(config)}
    tables = {name: PROGRESS.read(reads[name] / "progress.parquet").to_pylist() for name in arms}
    tests = {"base": "test", **{name: f"test-{name}" for name in arms}}
    seen = {name: answered(reads, test, prompts, own.bootstrap, seed) for name, test in tests.items()}
    policies: dict[str, Any] = {}
    for name, one in seen.items():
        policies[name] = {key: one.found[key].interval(own.confidence) for key in COMPARED}
        policies[name] |= {"ungraded": one.outcomes.ungraded, "rollouts": one.rollouts.num_rows}
        if name in arms:
            window = tables[name][-1]["next_window"]
            rivals = [rival for rival in ("base", FIXED) if rival in seen and rival != name]
            policies[name] |= {
                "rule": arms[name].window.rule, "window": window, "within": one.within(window).interval(own.confidence),
                "difference": {
                    rival: {key: (one.found[key] - seen[rival].found[key]).interval(own.confidence) for key in COMPARED}
                    for rival in rivals
                },
                "training": training(tables[name], seen_prompts, own.bootstrap, seed, own.confidence),
            }  # fmt: skip
    record = {
        "confidence": own.confidence, "replicates": own.bootstrap, "largest": config.rollouts.max_new_tokens,
        "policies": policies, "equal_tokens": at_equal_tokens(tables, own.bootstrap, seed, own.confidence),
        "counts": {"prompts": {"test": len(prompts), "train": seen_prompts}},
    }  # fmt: skip
    return record | {"headline": headline(record)}


def headline(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gates of the toy scale."""
    arms = {name: of for name, of in found["policies"].items() if name != "base"}
    if not {FIXED, ADAPTIVE} <= set(arms):
        return []
    fixed, ours = arms[FIXED], arms[ADAPTIVE]
    share = ours["training"]["tokens"] / fixed["training"]["tokens"]
    rows = [
        target_record("accuracy of the arm fixed, minus the base's", 0.2, fixed["difference"]["base"]["accuracy"]),
        target_record("accuracy of the arm adaptive, minus fixed's", -0.03, ours["difference"][FIXED]["accuracy"]),
        target_record("tokens of the arm adaptive, as a share of fixed's", 0.55, share, False),
    ]
    short = [of["training"]["tokens"] for of in arms.values() if of["rule"] == "fixed" and of is not fixed]
    if short:
        ratio = ours["training"]["tokens"] / min(short)
        rows.append(
            target_record(
                "tokens of the arm adaptive, as a multiple of the thriftiest fixed window's", 1.1, ratio, False
            )
        )
    if found["equal_tokens"]:
        rows.append(
            target_record("adaptive minus fixed at equal tokens", 0.0, found["equal_tokens"][ADAPTIVE]["difference"])
        )
    return rows
