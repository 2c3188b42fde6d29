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
from ziprc.evaluation.head import metrics as records
from ziprc.evaluation.head.description import describe_base, describe_cells
from ziprc.evaluation.outcomes import MOMENTS, Outcomes, align, join_outcomes, moment_positions, response_lengths
from ziprc.joint.bins import BinGrid
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.head import read_joint_head
from ziprc.reading.logits import kl_drift
from ziprc.reading.recorded import read_states
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
        self.config, self.reads, self.own = config, reads, config.evaluate
        self.seed = derived_seed(config.seed, "evaluate")
        self.heads = [role.partition("/")[2] for role in reads if role.startswith("introspection/")]
        splits = ("train", "test", "test-ziprc", "test-many")
        self.rollouts = {split: self._table(ROLLOUTS, split) for split in splits}
        self.train, self.outcomes, self.tuned = (self._outcomes(split) for split in splits[:3])
        ids, length = self.outcomes.rollout_ids, self.outcomes.length
        self.positions = moment_positions(length)
        self.boot = Resampling(self.outcomes.group, self.own.bootstrap, self.seed)
        self.grids = {head: read_joint_head(reads[head]).grid for head in self.heads}
        self.states = {
            head: read_states(reads[f"introspection/{head}"], ids, length, self.positions, grid.size)
            for head, grid in self.grids.items()
        }

    def _table(self, schema: TableSchema, name: str) -> pa.Table:
        return schema.read(self.reads[f"{schema.name}/{name}"])

    def _outcomes(self, split: str) -> Outcomes:
        return join_outcomes(self.rollouts[split], self._table(GRADES, split), str(self.reads[f"grades/{split}"]))

    def predictions(self) -> dict[tuple[str, str], NDArray[np.float64]]:
        """Expected reward [n] by (predictor, moment); what a head says at the end is the mean over its last states."""
        out = {}
        for head, states in self.states.items():
            expected = JointDistribution(self.grids[head], states.at).expected_reward().T
            out |= {(head, moment): values for moment, values in zip(MOMENTS, expected, strict=True)}
            out[head, "end"] = states.last_mean(self.own.last_k)
        table, where = self._table(BASELINES, "test"), str(self.reads["baselines/test"])
        for predictor in sorted(set(table["predictor"].to_pylist())):
            mine = table.filter(pc.equal(table["predictor"], predictor))
            for moment in MOMENTS:
                rows = align(mine.filter(pc.equal(mine["moment"], moment)), self.outcomes.rollout_ids, where)
                out[predictor, moment] = rows["expected_reward"].to_numpy().astype(np.float64)
        return out

    def length_record(self, head: str) -> dict[str, Any]:
        """How well a head foretells lengths, of finished rollouts."""
        done, trained = self.outcomes.finished, self.train.length[self.train.finished]
        joint = JointDistribution(self.grids[head], self.states[head].at[done])
        remaining = (self.outcomes.length[:, None] - self.positions)[done]
        reference = trained[:, None] - moment_positions(trained)
        return records.length_records(self.boot.subset(done), joint, remaining, reference, self.own.confidence)

    def _labelled_cells(self, split: str, grid: BinGrid) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of the labelled rollouts of a split, and the grid cell of the final head's label at the start."""
        rollouts, where = self.rollouts[split], str(self.reads[f"values/{split}"])
        values = align(self._table(VALUES, split), rollouts["rollout_id"].combine_chunks(), where)
        unfinished = ~np.asarray(pc.equal(rollouts["finish_reason"], FinishReason.STOP.value))
        value = values["value"].to_numpy().astype(np.float64)
        rule = self.config.train_joint.ziprc.unfinished
        if rule == "zero":
            value = np.where(unfinished, 0.0, value)
        cell = grid.flat_index(grid.reward_bin(value), grid.length_bin(response_lengths(rollouts)))
        kept = np.flatnonzero(~unfinished if rule == "drop" else np.ones(len(value), bool))
        return kept, cell[kept]

    def _prompt_keys(self, split: str, rows: NDArray[np.int64]) -> list[tuple[str, bool]]:
        """A prompt and its template: the same question with and without thinking are two prompts to the model."""
        chosen = self.rollouts[split].select(["prompt_id", "thinking"]).take(pa.array(rows))
        return list(zip(chosen["prompt_id"].to_pylist(), chosen["thinking"].to_pylist(), strict=True))

    def joint_record(self, head: str) -> dict[str, Any]:
        """Start joints against the histograms of test-many; the constant is the histogram of the training rollouts."""
        grid = self.grids[head]
        rows, cell = self._labelled_cells("test-many", grid)
        _, train_cell = self._labelled_cells("train", grid)
        constant = np.bincount(train_cell, minlength=grid.size) / len(train_cell)
        keys = self._prompt_keys("test-many", rows)
        first = {key: i for i, key in reversed(list(enumerate(self._prompt_keys("test", self.outcomes.rows))))}
        names = sorted(set(keys) & set(first))
        if not names:
            raise UserError(f"{self.reads['rollouts/test-many']} holds no prompt of the test rollouts.")
        number = {name: i for i, name in enumerate(names)}
        group = np.array([number.get(key, -1) for key in keys])
        predicted = JointDistribution(grid, self.states[head].at[[first[name] for name in names], 0])
        return records.joint_record(predicted, group[group >= 0], cell[group >= 0], constant, self.own, self.seed)

    def drift_record(self) -> dict[str, Any]:
        """KL(base ‖ ziprc) per token over one rollout of each test prompt."""
        _, first = np.unique(self.outcomes.group, return_index=True)
        chosen = np.sort(first)[:DRIFT_ROLLOUTS]
        pairs = token_pairs(self.rollouts["test"].take(pa.array(self.outcomes.rows[chosen])))
        reference, model = (load_for_reading(self.reads[name]) for name in ("base", "ziprc"))
        layout, runtime = read_joint_head(self.reads["ziprc"]).layout, self.config.runtime
        sums = kl_drift(reference, model, layout, pairs, runtime.forward_tokens, runtime.position_chunk)
        boot, length = Resampling(np.arange(len(chosen)), self.own.bootstrap, self.seed), self.outcomes.length[chosen]
        kl = boot.ratio(sums, length).interval(self.own.confidence)
        return {"kl": kl, "rollouts": len(chosen), "states": int(length.sum())}

    def base_record(self) -> dict[str, Any]:
        """What the base can do: overall, per cell, per style."""
        task = get_task(self.config.prompts.task)
        texts = self.rollouts["test"]["response_text"].take(pa.array(self.outcomes.rows)).to_pylist()
        style_of = getattr(task, "style_of", lambda _: None)
        answers, styles = ([of(text) for text in texts] for of in (task.canonical_answer, style_of))
        prompts = self._table(PROMPTS, "test")
        cell_of = dict(zip(prompts["prompt_id"].to_pylist(), prompts["difficulty"].to_pylist(), strict=True))
        cells = np.array([cell_of[p] for p in self.outcomes.prompt_ids.to_pylist()])
        found = describe_base(self.boot, self.outcomes, answers, self.own.confidence)
        return found | {"cells": describe_cells(self.boot, self.outcomes, cells, answers, styles, self.own.confidence)}

    def counts(self) -> dict[str, Any]:
        """Prompts, rollouts and tokens behind the numbers."""
        tables, known, trained = self.rollouts, self.train.length, {}
        for head in self.heads:
            own = self.config.train_joint.head(head)
            whole, most = own.epochs * len(known), own.max_steps * own.batch_size
            trained[head] = round((min(whole, most) if most > 0 else whole) * float(known.mean()))
        return {
            "prompts": {split: len(pc.unique(table["prompt_id"])) for split, table in tables.items()},
            "rollouts": {split: table.num_rows for split, table in tables.items()},
            "tokens_generated": {split: int(response_lengths(table).sum()) for split, table in tables.items()},
            "tokens_trained": trained,
            "base_tokens": self.config.base.tokens if self.config.base.model == "scratch" else None,
            "without_score": {"train": self.train.ungraded, "test": self.outcomes.ungraded},
            "unfinished_test": rounded(1 - self.outcomes.finished.mean()),
        }


def metrics(config: Config, reads: Mapping[str, Path]) -> dict[str, Any]:
    """The whole of metrics/zip-rc.json, from tables and checkpoints by role; its fields are described in metrics.py."""
    read, own = Evaluation(config, reads), config.evaluate
    prediction, difference = records.prediction_records(read.boot, read.predictions(), read.outcomes, own)
    found: dict[str, Any] = {
        "confidence": own.confidence,
        "replicates": own.bootstrap,
        "last_k": own.last_k,
        "counts": read.counts(),
        "prediction": prediction,
        "difference": difference,
        "length": {head: read.length_record(head) for head in read.heads},
        "joint": {head: read.joint_record(head) for head in read.heads},
        "drift": read.drift_record(),
        "policy": records.policy_record(read.outcomes, read.tuned, own, read.seed),
        "base": read.base_record(),
    }
    return found | {"headline": records.headline(found)}
