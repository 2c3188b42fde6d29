"""Labelled rollouts as training data: which of them a method sees, and what it is told of their tokens.

Methods differ in their data as much as in their loss: `rft` sees right responses, `dpo` pairs of a better and a worse one to
the same prompt, the others every rollout that has labels. What a table cannot give is refused here, before anything runs.
Advantages: of `awr` and `ppo` from values, A_t = δ_t + λ·A_{t+1} with δ_t = V_{t+1} − V_t, and at the end the score itself
minus the last value (the published code leaves the score out); of `grpo` the score against those of the same prompt.

U rollouts, T tokens of all responses, N candidates of all states, B rollouts and P states of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from scipy.signal import lfilter

from ziprc.config.icl_v import Student
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.tilt import Tilt, log_weight
from ziprc.training.data import Sequences, within
from ziprc.training.objectives.policy import LEAST_MASS
from ziprc.training.packs import Graded, by_prompt_of


@dataclass(frozen=True)
class Responses(Sequences):
    """Rollouts whose states are labelled by the number of the token that they emit, of all T, and by their row."""

    max_length: int

    def input_lengths(self) -> NDArray[np.int64]:
        return np.minimum(self.lengths - 1, self.max_length)

    def labels(self, picked: NDArray[np.int64], counts: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        responses = self.lengths - self.prompt_lengths
        start = (np.cumsum(responses) - responses)[picked]
        return {"token": np.repeat(start, counts) + within(counts), "row": np.repeat(np.arange(len(picked)), counts)}


@dataclass(frozen=True)
class Targets:
    """Of `kl`: the candidates of token t are offsets[t] … offsets[t + 1] − 1; log-probabilities in the target."""

    offsets: NDArray[np.int64]  # [T + 1]
    ids: NDArray[np.int64]  # [N]
    target: NDArray[np.float32]  # [N]
    tail: NDArray[np.float32]  # [T] of everything that is no candidate
    everywhere: bool  # whether states with a single candidate count


@dataclass(frozen=True)
class LabelledData:
    """Units of one rollout or, in pairs, two, [n, 1 or 2] numbers of rollouts."""

    responses: Responses
    units: NDArray[np.int64]
    taken: NDArray[np.int64]  # [T] ids
    reference: NDArray[np.float32]  # [T]
    advantage: NDArray[np.float32]  # [T]
    targets: Targets | None = None

    @property
    def names(self) -> Sequence[str]:
        return [self.responses.names[i] for i in self.units[:, 0]]

    def __len__(self) -> int:
        return len(self.units)

    def input_lengths(self) -> NDArray[np.int64]:
        found: NDArray[np.int64] = self.responses.input_lengths()[self.units].sum(-1)
        return found

    def batch(self, picked: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """What a PolicyTrainee takes; `count` is states or, in pairs, pairs."""
        batch = self.responses.batch(self.units[picked].ravel())
        token = batch.pop("token").numpy()
        if self.targets is None:
            own: dict[str, Any] = {
                "ids": self.taken[token], "reference": self.reference[token], "advantage": self.advantage[token],
                "count": len(picked) if self.units.shape[1] > 1 else len(token),
            }  # fmt: skip
            return batch | {name: torch.as_tensor(value) for name, value in own.items()}
        counts = np.diff(self.targets.offsets)[token]
        kept = np.flatnonzero((counts > 1) | self.targets.everywhere)
        token, counts = token[kept], counts[kept]
        of = np.repeat(self.targets.offsets[token], counts) + within(counts)
        own = {
            "ids": self.targets.ids[of], "target": self.targets.target[of], "tail": self.targets.tail[token],
            "state": np.repeat(np.arange(len(token)), counts), "count": len(token),
        }  # fmt: skip
        batch |= {name: batch[name][kept] for name in ("positions", "row")}
        return batch | {name: torch.as_tensor(value) for name, value in own.items()}


def labelled_data(
    rollouts: Sequence[Graded], table: pa.Table | None, own: Student, grid: BinGrid | None, where: str
) -> LabelledData:
    """The rollouts that have labels, or all where `table` is None, as `own.method` learns from them.

    Raises UserError when the labels are of other rollouts, hold not what the method needs, or nothing is left to learn.
    """
    known = list(rollouts)
    if table is not None:
        by_id = {r.rollout_id: r for r in rollouts}
        ids = table["rollout_id"].to_pylist()
        if lost := [name for name in ids if name not in by_id]:
            raise UserError(
                f"{where}: {len(lost)} rollouts are none of those given, for example {lost[0]}. Label these again."
            )
        known = [by_id[name] for name in ids]
    fits = np.array([len(r.prompt) <= own.max_length for r in known], dtype=bool)
    known = [r for r, fit in zip(known, fits, strict=True) if fit]
    labels = None if table is None else read_labels(table.filter(pa.array(fits)), known, where)
    units = units_of(known, own)
    if own.method == "kl":
        assert labels is not None, "the configuration refuses kl without labels"
        targets = targets_of(labels, own, grid, where)
        if not own.tail:
            choice = np.add.reduceat(
                np.diff(targets.offsets) > 1, np.cumsum([0, *(len(r.response) for r in known)])[:-1]
            )
            units = units[choice[units[:, 0]] > 0]
    if not len(units):
        raise UserError(
            f"{where}: nothing is left that {own.method} could learn from: of {len(known)} rollouts {_lacking(own)}."
        )
    parts = [of for r in known for of in (r.prompt, r.response)]
    responses = Responses(
        names=[r.rollout_id for r in known], tokens=np.concatenate(parts),
        offsets=np.cumsum([0, *(len(r.prompt) + len(r.response) for r in known)]),
        prompt_lengths=np.array([len(r.prompt) for r in known]), max_length=own.max_length,
    )  # fmt: skip
    taken = np.concatenate([r.response for r in known]).astype(np.int64)
    nothing = np.zeros(len(taken), np.float32)
    return LabelledData(
        responses, units, taken, nothing if labels is None else labels.reference, advantages(known, labels, own),
        targets if own.method == "kl" else None,
    )  # fmt: skip


def _lacking(own: Student) -> str:
    needs = {
        "rft": f"none has a score above {own.success_threshold}",
        "dpo": "no two of a prompt differ in their score",
        "grpo": "no two of a prompt differ in their score",
    }
    return needs.get(own.method, "none has a state with a choice")


def units_of(rollouts: Sequence[Graded], own: Student) -> NDArray[np.int64]:
    """[n, 1 or 2] the rollouts that the method sees; of `dpo` best and worst of a prompt, second best and second worst …"""
    scores = np.array([r.score for r in rollouts])
    groups = [np.array(of) for of in by_prompt_of(rollouts).values()]
    if own.method == "rft":
        return np.flatnonzero(scores > own.success_threshold)[:, None]
    if own.method == "grpo":  # where all score alike nothing is learned
        return np.concatenate([np.zeros(0, np.int64), *(g for g in groups if np.ptp(scores[g]) > 0)])[:, None]
    if own.method != "dpo":
        return np.arange(len(rollouts))[:, None]
    pairs = [np.zeros((0, 2), np.int64)]
    for group in groups:
        order = group[np.argsort(-scores[group], kind="stable")]
        both = np.stack([order[: len(order) // 2], order[::-1][: len(order) // 2]], -1)
        pairs.append(both[scores[both[:, 0]] > scores[both[:, 1]]])
    return np.concatenate(pairs)


@dataclass(frozen=True)
class LabelArrays:
    """The labels of U rollouts in flat arrays; candidates of token t are offsets[t] … offsets[t + 1] − 1."""

    offsets: NDArray[np.int64]  # [T + 1]
    ids: NDArray[np.int64]  # [N]
    log_prob: NDArray[np.float32]  # [N] of the reference
    q: NDArray[np.float32]  # [N]
    cells: NDArray[np.float16]  # [N·R·L], or none
    values: list[NDArray[np.float32]]  # [m + 1] of every rollout
    reference: NDArray[np.float32]  # [T] of the token taken
    kind: str


def read_labels(table: pa.Table, rollouts: Sequence[Graded], where: str) -> LabelArrays:
    """Labels in the order of the rollouts; UserError when they are of other responses."""
    lengths = np.array([len(r.response) for r in rollouts])
    flat = {
        name: pc.list_flatten(table[name]).to_numpy() for name in ("offsets", "ids", "log_prob", "q", "cells", "values")
    }
    sizes = pc.list_value_length(table["values"]).to_numpy()
    if (sizes != lengths + 1).any():
        row = int(np.flatnonzero(sizes != lengths + 1)[0])
        raise UserError(
            f"{where}: rollout {rollouts[row].rollout_id} has labels for {sizes[row] - 1} tokens, but {lengths[row]} tokens. "
            "They are labels of other rollouts: label these again."
        )
    starts = np.cumsum(sizes)[:-1]
    counts = np.concatenate([np.diff(of) for of in np.split(flat["offsets"], starts)]).astype(np.int64)
    taken, token = np.concatenate([r.response for r in rollouts]), np.repeat(np.arange(len(counts)), counts)
    hit = flat["ids"] == taken[token]
    if (np.bincount(token[hit], minlength=len(counts)) != 1).any():
        raise UserError(
            f"{where}: the tokens that were taken are not among the candidates. They are labels of other rollouts, or of "
            "another tokenizer: label these again."
        )
    metadata = table.schema.metadata or {}
    return LabelArrays(
        np.cumsum([0, *counts]), flat["ids"].astype(np.int64), flat["log_prob"], flat["q"], flat["cells"],
        np.split(flat["values"], starts), flat["log_prob"][hit], metadata.get(b"kind", b'"candidates"').decode().strip('"'),
    )  # fmt: skip


def advantages(rollouts: Sequence[Graded], labels: LabelArrays | None, own: Student) -> NDArray[np.float32]:
    """[T] of every token, as the method wants it; zeros where it wants none."""
    lengths = [len(r.response) for r in rollouts]
    if own.method == "grpo":
        scores, found = np.array([r.score for r in rollouts]), np.zeros(len(rollouts))
        for group in by_prompt_of(rollouts).values():
            found[group] = (scores[group] - scores[group].mean()) / (scores[group].std() + 1e-8)
        return np.repeat(found, lengths).astype(np.float32)
    if own.method not in ("awr", "ppo"):
        return np.zeros(sum(lengths), np.float32)
    assert labels is not None
    parts = []
    for rollout, values in zip(rollouts, labels.values, strict=True):
        delta = np.diff(values.astype(np.float64))
        delta[-1] += rollout.score - values[-1]
        parts.append(lfilter([1.0], [1.0, -own.gae_lambda], delta[::-1])[::-1])
    found = np.concatenate(parts)
    if own.method == "ppo" and own.normalize_advantages:
        found = (found - found.mean()) / (found.std() + 1e-8)
    return found.astype(np.float32)


def targets_of(labels: LabelArrays, own: Student, grid: BinGrid | None, where: str) -> Targets:
    """The reference tilted by the values, over the candidates; everything else keeps the mass that the reference gives it."""
    if labels.kind != "candidates":
        raise UserError(
            f"{where} values the tokens taken alone, of which no policy can be made by kl: it needs every candidate. Label "
            "with qvalues.candidates=true."
        )
    cells = labels.cells.reshape(len(labels.ids), -1) if len(labels.cells) else None
    if own.tilt == Tilt.SOFT_COST and (cells is None or grid is None):
        raise UserError(
            f"{where}: these labels hold no joint, which soft_cost needs. Use those of a critic, or another tilt."
        )
    weight = log_weight(Tilt(own.tilt), labels.q, own.eta, own.price, cells, grid)
    starts, counts = labels.offsets[:-1], np.diff(labels.offsets)

    def log_sums(of: NDArray[np.float64]) -> NDArray[np.float64]:
        top = np.maximum.reduceat(of, starts)
        return top + np.log(np.add.reduceat(np.exp(of - np.repeat(top, counts)), starts))

    reference = labels.log_prob.astype(np.float64)
    tail = np.clip(1 - np.exp(log_sums(reference)), LEAST_MASS, 1 - LEAST_MASS)
    tilted = reference + weight
    target = tilted - np.repeat(log_sums(tilted), counts) + np.repeat(np.log1p(-tail), counts)
    return Targets(labels.offsets, labels.ids, target.astype(np.float32), np.log(tail).astype(np.float32), own.tail)
