"""One experiment's tables, read once and joined, and the record of metrics/zip-rc.json made from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.evaluation.bootstrap import Resampling, rounded
from ziprc.evaluation.head.description import describe_base, describe_cells
from ziprc.evaluation.head.metrics import (
    LengthReference,
    ManyRollouts,
    Measure,
    headline,
    joint_record,
    length_records,
    policy_record,
    prediction_records,
)
from ziprc.evaluation.outcomes import (
    MOMENTS,
    Outcomes,
    align,
    column,
    join_outcomes,
    moment_positions,
    response_lengths,
)
from ziprc.joint.bins import BinGrid
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.head import read_joint_head
from ziprc.reading.logits import kl_drift
from ziprc.reading.recorded import States, read_states
from ziprc.reading.states import load_for_reading, token_pairs
from ziprc.store.digests import derived_seed
from ziprc.tables.baselines import BASELINES
from ziprc.tables.check import TableSchema
from ziprc.tables.grades import GRADES
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS, FinishReason
from ziprc.tables.values import VALUES
from ziprc.tasks.base import get_task

DRIFT_ROLLOUTS = 2000  # one of each test prompt, up to this many


class Evaluation:
    """The tables of one experiment, read once, and the records made from them."""

    def __init__(self, config: Config, reads: Mapping[str, Path]) -> None:
        self.config, self.reads = config, reads
        self.settings = config.evaluate
        self.seed = derived_seed(self.config.seed, "evaluate")
        self.heads = [role.partition("/")[2] for role in reads if role.startswith("introspection/")]
        self.rollouts = self._table(ROLLOUTS, "test")
        self.outcomes = self._outcomes("test")
        self.positions = moment_positions(self.outcomes.length)
        self.boot = Resampling(self.outcomes.group, self.settings.bootstrap, self.seed)

    def _table(self, schema: TableSchema, name: str) -> pa.Table:
        return schema.read(self.reads[f"{schema.name}/{name}"])

    def _outcomes(self, split: str) -> Outcomes:
        rollouts = self.rollouts if split == "test" else self._table(ROLLOUTS, split)
        return join_outcomes(rollouts, self._table(GRADES, split), str(self.reads[f"grades/{split}"]))

    def grid(self, head: str) -> BinGrid:
        return read_joint_head(self.reads[head]).grid

    def states(self, head: str) -> States:
        path = self.reads[f"introspection/{head}"]
        return read_states(path, self.outcomes.rollout_ids, self.outcomes.length, self.positions, self.grid(head).size)

    def head_predictions(self, head: str, states: States) -> dict[tuple[str, str], NDArray[np.float64]]:
        """Expected reward at every moment; at the end the mean over the last states."""
        joint = JointDistribution(self.grid(head), states.at)
        by_moment = dict(zip(MOMENTS, joint.expected_reward().T, strict=True))
        by_moment["end"] = states.last_mean(self.settings.last_k)
        return {(head, moment): values for moment, values in by_moment.items()}

    def baseline_predictions(self) -> dict[tuple[str, str], NDArray[np.float64]]:
        """Expected reward by (predictor, moment), in the order of the outcomes."""
        table = self._table(BASELINES, "test")
        where = str(self.reads["baselines/test"])
        out = {}
        for predictor in sorted(set(table["predictor"].to_pylist())):
            mine = table.filter(pc.equal(table["predictor"], predictor))
            for moment in MOMENTS:
                rows = align(mine.filter(pc.equal(mine["moment"], moment)), self.outcomes.rollout_ids, where)
                out[predictor, moment] = column(rows, "expected_reward").astype(np.float64)
        return out

    def length_record(self, head: str, states: States, train: Outcomes) -> dict[str, Any]:
        grid, done = self.grid(head), self.outcomes.finished
        train_length = train.length[train.finished]
        reference = LengthReference.fit(train_length[:, None] - moment_positions(train_length), grid)
        joint = JointDistribution(grid, states.at[done])
        remaining = (self.outcomes.length[:, None] - self.positions)[done]
        return length_records(self.boot.subset(done), joint, remaining, reference, self.settings.confidence)

    def _labelled_cells(self, split: str, grid: BinGrid) -> tuple[pa.Table, NDArray[np.int64]]:
        """Rollouts of a split with the grid cell that the final head's label puts them in at the start."""
        rollouts = self._table(ROLLOUTS, split)
        where = str(self.reads[f"values/{split}"])
        values = align(self._table(VALUES, split), rollouts["rollout_id"].combine_chunks(), where)
        unfinished = ~np.asarray(pc.equal(rollouts["finish_reason"], FinishReason.STOP.value))
        value = column(values, "value").astype(np.float64)
        rule = self.config.train_joint.ziprc.unfinished
        if rule == "zero":
            value = np.where(unfinished, 0.0, value)
        cell = grid.flat_index(grid.reward_bin(value), grid.length_bin(response_lengths(rollouts)))
        kept = np.flatnonzero(~unfinished if rule == "drop" else np.ones(len(value), bool))
        return rollouts.select(["prompt_id", "thinking"]).take(pa.array(kept)), cell[kept]

    def joint_records(self, states: dict[str, States]) -> dict[str, Any]:
        """Start joints against the histograms of test-many; the constant is the histogram of the training rollouts."""
        out = {}
        for head in self.heads:
            grid = self.grid(head)
            many, cell = self._labelled_cells("test-many", grid)
            _, train_cell = self._labelled_cells("train", grid)
            constant = np.bincount(train_cell, minlength=grid.size) / len(train_cell)
            keys = _prompt_keys(many)
            known = _prompt_keys(self.rollouts.take(pa.array(self.outcomes.rows)))
            first = {key: i for i, key in reversed(list(enumerate(known)))}
            names = sorted(set(keys) & set(first))
            if not names:
                raise UserError(f"{self.reads['rollouts/test-many']} holds no prompt of the test rollouts.")
            number = {name: i for i, name in enumerate(names)}
            mine = np.array([key in number for key in keys])
            group = np.array([number[key] for key in keys if key in number])
            predicted = JointDistribution(grid, states[head].at[[first[name] for name in names], 0])
            out[head] = joint_record(
                predicted,
                ManyRollouts(group, cell[mine]),
                constant,
                self.settings.bootstrap,
                self.seed,
                self.settings.confidence,
            )
        return out

    def drift_record(self) -> dict[str, Any]:
        """KL(base ‖ ziprc) per token over one rollout of each test prompt."""
        _, first = np.unique(self.outcomes.group, return_index=True)
        chosen = np.sort(first)[:DRIFT_ROLLOUTS]
        pairs = token_pairs(self.rollouts.take(pa.array(self.outcomes.rows[chosen])))
        reference, model = (load_for_reading(self.reads[name]) for name in ("base", "ziprc"))
        rows = read_joint_head(self.reads["ziprc"]).layout
        runtime = self.config.runtime
        sums = kl_drift(reference, model, rows, pairs, runtime.forward_tokens, runtime.position_chunk)
        boot = Resampling(np.arange(len(chosen)), self.settings.bootstrap, self.seed)
        length = self.outcomes.length[chosen]
        kl = boot.ratio(sums, length).interval(self.settings.confidence)
        return {"kl": kl, "rollouts": len(chosen), "states": int(length.sum())}

    def base_record(self) -> dict[str, Any]:
        """What the base can do: overall, per cell, per style."""
        task = get_task(self.config.prompts.task)
        texts = self.rollouts["response_text"].take(pa.array(self.outcomes.rows)).to_pylist()
        answers = [task.canonical_answer(text) for text in texts]
        style_of = getattr(task, "style_of", lambda _: None)
        prompts = self._table(PROMPTS, "test")
        cell_of = dict(zip(prompts["prompt_id"].to_pylist(), prompts["difficulty"].to_pylist(), strict=True))
        cells = np.array([cell_of[p] for p in self.outcomes.prompt_ids.to_pylist()])
        confidence = self.settings.confidence
        styles = [style_of(text) for text in texts]
        return {
            **describe_base(self.boot, self.outcomes, answers, confidence),
            "cells": describe_cells(self.boot, self.outcomes, cells, answers, styles, confidence),
        }

    def counts(self, train: Outcomes) -> dict[str, Any]:
        """Prompts, rollouts and tokens behind the numbers."""
        splits = ["train", "test", "test-ziprc", "test-many"]
        tables = {split: self._table(ROLLOUTS, split) for split in splits}
        per_rollout = float(train.length.mean())
        seen = {head: _rollouts_seen(self.config, head, len(train.length)) for head in self.heads}
        return {
            "prompts": {split: len(pc.unique(table["prompt_id"])) for split, table in tables.items()},
            "rollouts": {split: table.num_rows for split, table in tables.items()},
            "tokens_generated": {split: int(response_lengths(table).sum()) for split, table in tables.items()},
            "tokens_trained": {head: round(count * per_rollout) for head, count in seen.items()},
            "base_tokens": self.config.base.tokens if self.config.base.model == "scratch" else None,
            "without_score": {"train": train.ungraded, "test": self.outcomes.ungraded},
            "unfinished_test": rounded(1 - self.outcomes.finished.mean()),
        }

    def metrics(self) -> dict[str, Any]:
        """The whole of metrics/zip-rc.json; its fields are described in metrics.py."""
        train = self._outcomes("train")
        states = {head: self.states(head) for head in self.heads}
        predictions = {}
        for head in self.heads:
            predictions |= self.head_predictions(head, states[head])
        predictions |= self.baseline_predictions()
        measure = Measure(self.settings.confidence, self.settings.ece_bins)
        prediction, difference = prediction_records(self.boot, predictions, self.outcomes, measure)
        tuned = self._outcomes("test-ziprc")
        found: dict[str, Any] = {
            "confidence": self.settings.confidence,
            "replicates": self.settings.bootstrap,
            "last_k": self.settings.last_k,
            "counts": self.counts(train),
            "prediction": prediction,
            "difference": difference,
            "length": {head: self.length_record(head, states[head], train) for head in self.heads},
            "joint": self.joint_records(states),
            "drift": self.drift_record(),
            "policy": policy_record(self.outcomes, tuned, self.settings.bootstrap, self.seed, self.settings.confidence),
            "base": self.base_record(),
        }
        return found | {"headline": headline(found)}


def _prompt_keys(rollouts: pa.Table) -> list[tuple[str, bool]]:
    """A prompt and its template: the same question with and without thinking are two prompts to the model."""
    return list(zip(rollouts["prompt_id"].to_pylist(), rollouts["thinking"].to_pylist(), strict=True))


def _rollouts_seen(config: Any, head: str, rollouts: int) -> float:
    settings = getattr(config.train_joint, head)
    whole, most = settings.epochs * rollouts, settings.max_steps * settings.batch_size
    return min(whole, most) if most > 0 else whole


def metrics(config: Config, reads: Mapping[str, Path]) -> dict[str, Any]:
    """The record of ZIP-RC, from its tables and checkpoints by role."""
    return Evaluation(config, reads).metrics()
