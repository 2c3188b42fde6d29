"""The record of metrics/rubric.json: what rewards of answers, of work and of both made of a policy, and what graders are worth.

    policies  {base | online-<arm>: {accuracy, verified, gap, unsound, tokens, finished, recall, kinds, pass_at, cells,
               difference: {rival: {accuracy, verified, unsound}}, setup, by, training}}
    pass_at   {k: {standard, verified, gap}}: unbiased, 1 − C(n−c, k)/C(n, k), of the mean over prompts
    cells     {cell: {accuracy, verified, unsound, ways: {kind: chance to be right}, responses}}
    graders   {grader-<name> | online-<arm>: see evaluation/grader.py}

A response is *verified* when its answer is right and the teacher, who is not the grader that it was rewarded by, gives full
marks to its work. `unsound` is the share of right answers that are not. `ways` are the chances to be right of work that is
written out and of short cuts: which of them leads decides whether an outcome reward can be expected to breed short cuts.
`recall` is the accuracy without any work. All on test prompts with the same seeds, paired over prompts; rivals are the base
and the arm that is rewarded for answers alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziprc.config.load import Config
from ziprc.evaluation import grader
from ziprc.evaluation.answered import Answered, answered
from ziprc.evaluation.bootstrap import Estimate, Resampling, quotient, rounded, target_record
from ziprc.evaluation.outcomes import align
from ziprc.evaluation.rl.record import training
from ziprc.rewards.rubric import half_an_item
from ziprc.systems.online import graders, trained, trained_graders
from ziprc.systems.rubric import tests
from ziprc.tables.grades import GRADES
from ziprc.tables.progress import PROGRESS
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.rubrics import RUBRICS

COMPARED = ("accuracy", "verified", "unsound")
SERIES = (
    "success", "verified", "unsound", "rubric_score", "suspected_hacking", "suspected_false", "grader_gap", "asked", "saved",
    "unscored", "unreadable", "length_mean", "entropy",
)  # fmt: skip
PLAIN = {"setup": "outcome", "by": None, "credit": "response"}  # of an arm without a rubric
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verified:
    """Test responses of a policy with both verdicts: `right` and `sound` [n] of the graded ones, and how each goes about it."""

    answered: Answered
    right: NDArray[np.bool_]
    sound: NDArray[np.bool_]
    kinds: NDArray[Any]
    cells: NDArray[Any]
    unassessed: int

    @property
    def boot(self) -> Resampling:
        return self.answered.boot

    def found(self, among: NDArray[np.bool_] | None = None) -> dict[str, Estimate]:
        """Estimates over all responses, or over those of one cell."""
        kept = np.ones(len(self.right), bool) if among is None else among
        boot, right, sound = self.boot.subset(kept), self.right[kept], self.sound[kept]
        all_right, verified, every = boot.totals(right, right & sound, np.ones(len(right)))
        unsound = Estimate(1 - quotient(verified, all_right).values)
        return {
            "accuracy": quotient(all_right, every), "verified": quotient(verified, every), "unsound": unsound,
            "gap": quotient(all_right - verified, every),
        }  # fmt: skip

    def ways(self, among: NDArray[np.bool_], confidence: float) -> dict[str, Any]:
        """The chance to be right by how a response goes about it."""
        found = {}
        for kind in sorted({kind for kind in self.kinds[among].tolist() if kind is not None}):
            kept = among & (self.kinds == kind)
            found[kind] = self.boot.subset(kept).ratio(self.right[kept]).interval(confidence)
        return found


def pass_at(k: int, samples: NDArray[np.int64], good: NDArray[np.int64]) -> NDArray[np.float64]:
    """[P] chance that one of k responses of a prompt is good, unbiased, from its n samples of which c are good."""
    return np.array(
        [1 - comb(int(n - c), k) / comb(int(n), k) if n >= k else np.nan for n, c in zip(samples, good, strict=True)]
    )


def verified(
    config: Config, reads: Mapping[str, Path], test: str, prompts: Sequence[Row], full: Mapping[str, float]
) -> Verified:
    """Join a policy's test responses with both verdicts. A response without the teacher's word is unsound, and counted."""
    own = answered(reads, test, [row["prompt_id"] for row in prompts], config.evaluate.bootstrap, config.seed)
    where = reads[f"assessments/{test}"]
    said = align(GRADES.read(where), own.outcomes.rollout_ids, str(where))
    names = own.outcomes.prompt_ids.to_pylist()
    asked = [names[g] for g in own.outcomes.group]
    limit = np.array([full.get(name, 1.0) for name in asked])
    score = said["score"].to_numpy().astype(float)
    cells = {row["prompt_id"]: row["difficulty"] for row in prompts}
    return Verified(
        own, own.outcomes.success, np.nan_to_num(score, nan=-1.0) >= limit,
        np.array(said["extracted_answer"].to_pylist(), dtype=object), np.array([cells[name] for name in asked], dtype=object),
        int((np.isnan(score) & own.outcomes.finished).sum()),
    )  # fmt: skip


def policy(one: Verified, confidence: float) -> dict[str, Any]:
    """What does not need a rival."""
    boot, group = one.boot, one.boot.group
    samples = np.bincount(group, minlength=boot.prompts)
    good = [np.bincount(group, mask, boot.prompts).astype(int) for mask in (one.right, one.right & one.sound)]
    ks = [k for k in (2**i for i in range(12)) if k <= samples[samples > 0].min()]
    at = {}
    for k in ks:
        asked = (samples >= k).astype(float)
        every = [quotient(*boot.prompt_totals(np.nan_to_num(pass_at(k, samples, c)), asked)) for c in good]
        at[str(k)] = {
            "standard": every[0].interval(confidence), "verified": every[1].interval(confidence),
            "gap": (every[0] - every[1]).interval(confidence),
        }  # fmt: skip
    cells = {}
    for cell in sorted(set(one.cells.tolist())):
        among = one.cells == cell
        cells[cell] = {name: of.interval(confidence) for name, of in one.found(among).items() if name != "gap"}
        cells[cell] |= {"ways": one.ways(among, confidence), "responses": int(among.sum())}
    kinds = sorted({kind for kind in one.kinds.tolist() if kind is not None})
    return {name: of.interval(confidence) for name, of in one.found().items()} | {
        "tokens": one.answered.found["tokens"].interval(confidence),
        "finished": one.answered.found["finished"].interval(confidence),
        "ungraded": one.answered.outcomes.ungraded, "unassessed": one.unassessed, "rollouts": one.answered.rollouts.num_rows,
        "kinds": {kind: rounded(float((one.kinds == kind).mean())) for kind in kinds}, "pass_at": at, "cells": cells,
    }  # fmt: skip


def trained_arm(
    config: Config, folder: Path, name: str, estimates: Mapping[str, Mapping[str, Estimate]], prompts: int
) -> dict[str, Any]:
    """What the reward of an arm was, how it compares with its rivals, and how its training went."""
    own, arm = config.evaluate, config.train_online.arms[name.removeprefix("online-")]
    rows = PROGRESS.read(folder / "progress.parquet").to_pylist()
    said = {"setup": arm.rubric.setup, "by": arm.rubric.by, "credit": arm.rubric.credit} if arm.rubric else PLAIN
    return said | {
        "difference": {
            rival: {key: (estimates[name][key] - estimates[rival][key]).interval(own.confidence) for key in COMPARED}
            for rival in rivals(config)
            if rival != name
        },
        "training": training(rows, prompts, own.bootstrap, config.seed, own.confidence),
        "series": {key: [row[key] for row in rows if row["rollout"]] for key in SERIES},
    }


def graders_record(config: Config, reads: Mapping[str, Path]) -> dict[str, Any]:
    """Every grader on the base's test responses; of those trained on-policy, what they were paid rollout by rollout."""
    own, found = config.evaluate, {}
    for name in graders(config) | trained_graders(config):
        asked, said = PROMPTS.read(reads["gradings/test"]), ROLLOUTS.read(reads[f"rollouts/gradings-{name}"])
        found[name] = grader.graded(asked, said, own.bootstrap, config.seed, own.confidence)
        if name in trained_graders(config):
            rows = PROGRESS.read(reads[name] / "progress.parquet").to_pylist()
            found[name] |= {"rollouts": len(rows), "paid": [row["score"] for row in rows if row["rollout"]]}
    return found


def metrics(config: Config, reads: Mapping[str, Path]) -> dict[str, Any]:
    """The whole record, from tables and checkpoints by role."""
    own = config.evaluate
    prompts = PROMPTS.read(reads["prompts/test"]).to_pylist()
    train = PROMPTS.read(reads["prompts/train"]).num_rows
    rubrics = RUBRICS.read(reads["rubrics/test"]).to_pylist()
    full = {row["prompt_id"]: 1 - half_an_item(row["rubric"]) for row in rubrics if row["valid"]}
    seen = {name: verified(config, reads, test, prompts, full) for name, test in tests(config).items()}
    estimates = {name: one.found() for name, one in seen.items()}
    policies: dict[str, Any] = {}
    for name, one in seen.items():
        policies[name] = policy(one, own.confidence) | {"recall": None}
        if config.rollouts.recall:
            ids = [row["prompt_id"] for row in prompts]
            recalled = answered(reads, f"recall-{name}", ids, own.bootstrap, config.seed)
            policies[name]["recall"] = recalled.found["accuracy"].interval(own.confidence)
        if name != "base":
            policies[name] |= trained_arm(config, reads[name], name, estimates, train)
    valid = sum(row["valid"] for row in rubrics)
    record = {
        "confidence": own.confidence, "replicates": own.bootstrap, "rivals": rivals(config), "policies": policies,
        "graders": graders_record(config, reads),
        "counts": {
            "prompts": {"test": len(prompts), "train": train},
            "rubrics": {"all": len(rubrics), "valid": valid, "tell_apart": tell_apart(seen["base"])},
        },
    }  # fmt: skip
    return record | {"headline": headline(record)}


def tell_apart(base: Verified) -> float | None:
    """The share of prompts whose rubric does not give the same verdict to all of the base's responses."""
    group, sound = base.boot.group, base.sound
    samples, good = np.bincount(group), np.bincount(group, sound)
    several = samples > 1
    return rounded(float(((good > 0) & (good < samples))[several].mean())) if several.any() else None


def rivals(config: Config) -> list[str]:
    """The base, and the first arm that is rewarded for answers alone."""
    asked = config.train_online.arms
    plain = [
        n for n in trained(config) if (r := asked[n.removeprefix("online-")].rubric) is None or r.setup == "outcome"
    ]
    return ["base", *plain[:1]]


def headline(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gates of the toy scale."""
    rows, plain = [], record["rivals"][-1]
    for name, of in record["policies"].items():
        if of.get("setup") == "gated" and of["by"] != "program" and plain in of["difference"] and plain != "base":
            what = f"verified accuracy of {name.removeprefix('online-')}, minus {plain.removeprefix('online-')}'s"
            rows.append(target_record(what, 0.2, of["difference"][plain]["verified"]))
    if best := record["graders"].get("grader-main"):
        rows.append(target_record("mean distance of grader-main from the teacher", 0.1, best["mae"], False))
        rows.append(target_record("F1 of right but unsound, grader-main", 0.9, best["f1"]))
    return rows
