"""Packs: several rollouts of one prompt in one sequence, with feedback between them, for a critic that learns in context.

ICL-V: the critic reads what happened to other rollouts of the prompt before it values the next one. In one pack the first
rollout has no sibling before it and the last has k − 1, and all are supervised, so one critic serves every number of
siblings. A pack is cut from the chat template and made of the sampled ids:

    templated prompt · y¹ · user turn with feedback, header of the assistant · y² · … · yᵏ

Unlike the published layout it equals the template's own rendering of the conversation, up to its last newline; a response
that ran into the cap is closed, marked as cut in its feedback, and its length is a lower bound; the states before the first
token and after the stop token are supervised too: state j of a response of m tokens has m − j to come, j = 0 … m.

`layout: legacy` is the published one, for critics that were trained so: no newline behind a response, no empty thinking block,
rewards as Python prints them, a response that ran into the cap closed and shown, and learned, as if it had ended there; and
the state before the first token is not learned.

N packs, M rollouts in packs, P labelled states.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ziprc.config.icl_v import TrainCritic
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.head import read_manifest
from ziprc.store.digests import derived_seed, digest_json
from ziprc.store.layout import CHECKPOINT_MANIFEST
from ziprc.tables.grades import GradeStatus, one_a_rollout
from ziprc.tables.rollouts import FinishReason
from ziprc.training.data import padded, within

RESPONSE, FEEDBACK = "The response.", "The feedback."  # stand-ins, to see what the template puts around them
END_STATES = 2  # of a rollout, to which `end_weight` gives more


@dataclass(frozen=True)
class Graded:
    """One rollout that has a score, as a pack needs it."""

    rollout_id: str
    prompt_id: str
    prompt: NDArray[np.int32]
    response: NDArray[np.int32]
    score: float
    answer: str
    cut: bool  # ran into the cap
    thinking: bool


def graded_rollouts(rollouts: pa.Table, grades: pa.Table, where: str) -> tuple[list[Graded], int]:
    """The rollouts that have a score, in the order of the table, and how many have none; a cut one scores 0.

    Raises UserError when a rollout has several grades.
    """
    one_a_rollout(grades, where)
    row = pc.index_in(rollouts["rollout_id"], value_set=grades["rollout_id"].combine_chunks())
    own = grades.take(row)
    scores = zip(own["score"].to_pylist(), own["status"].to_pylist(), own["extracted_answer"].to_pylist(), strict=True)
    columns = ("rollout_id", "prompt_id", "prompt_token_ids", "response_token_ids", "finish_reason", "thinking")
    found = []
    for values, (score, status, answer) in zip(
        zip(*(rollouts[name] for name in columns), strict=True), scores, strict=True
    ):
        rollout_id, prompt_id, prompt, response, finish, thinking = values
        cut = finish.as_py() == FinishReason.LENGTH or status == GradeStatus.UNFINISHED
        if score is None and not cut:
            continue
        ids = [np.asarray(of.values, dtype=np.int32) for of in (prompt, response)]
        names, flags = [value.as_py() for value in (rollout_id, prompt_id)], (cut, thinking.as_py())
        found.append(Graded(*names, *ids, float(score or 0), answer or "", *flags))
    return found, rollouts.num_rows - len(found)


def feedback_text(kind: str, rollout: Graded, number: int, right: int, legacy: bool = False) -> str:
    """What the user says about rollout `number` (from 1) of a pack, of which `right` are right so far, this one included.

    Where the answer is said, its mark stands directly behind it, in place of the reward: a head that looks for the same answer
    then finds the mark as what follows it, in one step.
    """
    lines = [f"Length: {len(rollout.response)} tokens{', cut off' if rollout.cut else ''}"]
    if kind in ("full", "so_far") or (kind == "first_reward_only" and number == 1):
        lines.insert(0, f"Reward: {float(rollout.score)}" if legacy else f"Reward: {rollout.score:.4g}")
    if kind == "answer":
        lines.insert(0, f"Answer: {rollout.answer or 'none'}{'+' if rollout.score >= 0.5 else '-'}")
    if kind == "so_far":
        lines.append(f"So far: {right} of {number} right")
    return "\n".join(lines)


class Turns:
    """What stands between two responses of a pack, in ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, layout: str = "template") -> None:
        self.tokenizer, self.legacy = tokenizer, layout == "legacy"

    def fitting(self, rollout: Graded) -> Graded:
        """The rollout as the layout shows it."""
        if not self.legacy:
            return rollout
        stop, header = (
            self.tokenizer.eos_token_id,
            self._frame(True).rpartition(self.tokenizer.eos_token)[2].lstrip("\n"),
        )
        own = self.tokenizer(header, add_special_tokens=False)["input_ids"]
        starts = [
            i for i in range(len(rollout.prompt) - len(own) + 1) if rollout.prompt[i : i + len(own)].tolist() == own
        ]
        if not starts:
            raise UserError(
                f"rollout {rollout.rollout_id}: its prompt has no header of the assistant ({header!r}), at which the layout "
                "legacy cuts it. Set train_critic.layout to template."
            )
        response = np.append(rollout.response, np.int32(stop)) if rollout.cut else rollout.response
        return dataclasses.replace(
            rollout, prompt=rollout.prompt[: starts[-1] + len(own)], response=response, cut=False, thinking=True
        )

    def before_each(
        self, rollouts: Sequence[Graded], packs: Sequence[Sequence[int]], kind: str, shown: Sequence[Sequence[float]]
    ) -> list[list[NDArray[np.int32]]]:
        """For every rollout of every pack the ids before its response, from the response before it or from the start.

        `shown` are the scores that the feedback states.
        """
        texts, after = [], []
        for pack, scores in zip(packs, shown, strict=True):
            right = np.cumsum(np.asarray(scores) >= 0.5).tolist()
            said = [dataclasses.replace(rollouts[i], score=score) for i, score in zip(pack, scores, strict=True)]
            texts += [feedback_text(kind, said[n], n + 1, right[n], self.legacy) for n in range(len(pack) - 1)]
            after += [rollouts[i].thinking for i in pack[1:]]
        between, found = iter(self._between(texts, after)), []
        for pack in packs:
            said = [next(between) for _ in pack[1:]]
            ids = [
                of if rollouts[i].cut else of[1:] for i, of in zip(pack, said, strict=False)
            ]  # the stop token is there
            found.append([rollouts[i].prompt for i in pack[:1]] + [np.array(of, np.int32) for of in ids])
        return found

    def _between(self, texts: Sequence[str], thinking: Sequence[bool]) -> list[list[int]]:
        """For every feedback, the ids from the stop token to the header of the next response, which thinks or not."""
        frames = {flag: self._frame(flag) for flag in set(thinking)}
        whole = [frames[flag].replace(FEEDBACK, text) for text, flag in zip(texts, thinking, strict=True)]
        ids = self.tokenizer(whole, add_special_tokens=False)["input_ids"] if whole else []
        if wrong := [row for row in ids if row[0] != self.tokenizer.eos_token_id]:
            raise UserError(
                f"The chat template goes on after a response with token {wrong[0][0]}, expected the stop token "
                f"{self.tokenizer.eos_token_id}; packs cannot be cut from it. Use a chat model whose turns end in its eos token."
            )
        return list(ids)

    def _frame(self, thinking: bool) -> str:
        messages = [("user", "A question."), ("assistant", RESPONSE), ("user", FEEDBACK)]
        text = self.tokenizer.apply_chat_template(
            [{"role": role, "content": content} for role, content in messages],
            add_generation_prompt=True, tokenize=False, enable_thinking=thinking,
        )  # fmt: skip
        frame, stop = str(text).partition(RESPONSE)[2], str(self.tokenizer.eos_token)
        return stop + frame.removeprefix(stop).lstrip("\n") if self.legacy else frame


def pack_kind(own: TrainCritic, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a critic's checkpoint says of the packs that it reads."""
    kind = {"layout": own.layout, "feedback": own.feedback, "rollouts": own.pack_rollouts}
    return kind | {"template": digest_json(tokenizer.chat_template)}


def require_kind(folder: Path, kind: dict[str, Any]) -> None:
    """UserError when the checkpoint in `folder` reads no packs of this kind."""
    known = read_manifest(folder).get("pack")
    if known is None:
        raise UserError(
            f"{folder} is no critic in context: its {CHECKPOINT_MANIFEST} names no pack. Use one of train_critic."
        )
    if different := [name for name in kind if known.get(name) != kind[name]]:
        said = "; ".join(f"{name} {known.get(name)!r}, here {kind[name]!r}" for name in different)
        raise UserError(
            f"{folder} was trained on packs of another kind: {said}. Train the critic again, or set these back."
        )


@dataclass(frozen=True)
class PackData:
    """N packs as training data. Unit i < N is pack i; unit N + i the same pack, of which only the rewards are learned, and
    unit 2N + i the same, of which only those of the last states of a rollout are.

    Of the M rollouts in packs: `members` say which (numbers in the list that packs were made of), `first` where in `tokens`
    the state before their first token is, `lengths` how many tokens they have.
    """

    names: list[str]
    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]  # [N + 1] of packs in tokens
    segments: NDArray[np.int64]  # [N + 1] of packs in the M rollouts
    members: NDArray[np.int64]
    first: NDArray[np.int64]
    lengths: NDArray[np.int64]
    reward_bin: NDArray[np.int64]
    censored: NDArray[np.bool_]
    grid: BinGrid
    end_weight: float
    left_out: int = 0  # rollouts that did not fit into their pack
    learned: NDArray[np.bool_] | None = None  # [M] which rollouts are supervised; None: all
    skip: int = 0  # first states of a rollout that are not

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def input_lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)

    def rollouts_of(self, pack: NDArray[np.int64]) -> NDArray[np.int64]:
        """Numbers in [0, M) of the rollouts of these packs, one pack after the other."""
        counts = np.diff(self.segments)[pack]
        return np.repeat(self.segments[pack], counts) + within(counts)

    def batch(self, picked: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [B, T], padded on the right; positions in [B·T] and labels of P states, with weights."""
        pack, phase = picked % len(self), picked // len(self)
        inputs, own = self.input_lengths()[pack], self.rollouts_of(pack)
        row = np.repeat(np.arange(len(pack)), np.diff(self.segments)[pack])
        if self.learned is not None:
            own, row = own[self.learned[own]], row[self.learned[own]]
        start = row * inputs.max() + self.first[own] - self.offsets[pack][row]
        counts = self.lengths[own] + 1 - self.skip
        inside, phase = self.skip + within(counts), np.repeat(phase[row], counts)
        remaining = np.repeat(self.lengths[own], counts) - inside
        extra = np.rint(self.end_weight * counts / np.minimum(counts, END_STATES)).astype(np.int64)
        at_end, any_length = remaining < END_STATES, phase > 0
        weight = np.where(phase == 2, at_end, 1 + np.where(at_end, np.repeat(extra, counts), 0))
        batch: dict[str, Any] = {
            **padded(self.tokens, self.offsets[pack], inputs),
            "positions": np.repeat(start, counts) + inside,
            "reward_bin": np.repeat(self.reward_bin[own], counts),
            "length_bin": np.where(any_length, 0, self.grid.length_bin(remaining)),
            "censored": np.repeat(self.censored[own], counts) | any_length,
            "weight": weight,
            "count": weight.sum(),
        }
        return {name: torch.as_tensor(value) for name, value in batch.items()}


def supervised(data: PackData, own: TrainCritic) -> PackData:
    """The packs with only those states supervised that `own` wants to be learned."""
    counts = np.diff(data.segments)
    first = np.repeat(np.minimum(own.supervise_from, counts) - 1, counts)  # the last one, where there are fewer
    return dataclasses.replace(data, learned=within(counts) >= first, skip=int(own.layout == "legacy"))


def shuffled_packs(rollouts: Sequence[Graded], size: int, passes: int, seed: int) -> list[list[int]]:
    """`passes` times: the rollouts of every prompt in a new order, cut into packs of at most `size`."""
    packs = []
    for number, (prompt, own) in itertools.product(range(passes), by_prompt_of(rollouts).items()):
        order = np.random.default_rng(derived_seed("packs", prompt, number, seed)).permutation(own).tolist()
        packs += [order[i : i + size] for i in range(0, len(order), size)]
    return packs


def packs_to_judge(rollouts: Sequence[Graded], size: int, counts: Sequence[int]) -> tuple[list[list[int]], int]:
    """Packs whose last rollout is to be valued after each of these numbers of siblings, and how many prompts have too few.

    The first `size` − 1 rollouts of a prompt are siblings, and the same ones, in the same order, for all the others, which
    are valued: would a rollout be among the siblings of the others, then right ones would see fewer right siblings than
    wrong ones do, and how they are ordered within a prompt would follow from that.
    """
    by_prompt = by_prompt_of(rollouts)
    enough = [own for own in by_prompt.values() if len(own) >= size]
    packs = [[*own[:k], target] for own in enough for target in own[size - 1 :] for k in counts]
    return packs, len(by_prompt) - len(enough)


def by_prompt_of(rollouts: Sequence[Graded]) -> dict[str, list[int]]:
    """Numbers of the rollouts of every prompt."""
    found: dict[str, list[int]] = {}
    for i, rollout in enumerate(rollouts):
        found.setdefault(rollout.prompt_id, []).append(i)
    return found


def rotated_packs(rollouts: Sequence[Graded], size: int, seed: int) -> tuple[list[list[int]], list[int]]:
    """Packs in which every rollout is among the last, with siblings before it, once; and how many are the last, of each.

    The rollouts of a prompt stand in a circle, in an order drawn for it; packs of at most `size` begin at every half of a
    pack, and their second halves are those that are valued. Prompts with one rollout have no pack.
    """
    packs, last = [], []
    for prompt, own in by_prompt_of(rollouts).items():
        n = len(own)
        pack, step = min(size, n), max(1, min(size, n) // 2)
        circle = np.random.default_rng(derived_seed("rotated packs", prompt, seed)).permutation(own).tolist() * 2
        for start in range(0, n if n > 1 else 0, step):
            targets = min(step, n - start)
            end = start + pack - step + targets
            packs.append(circle[end - pack : end])
            last.append(targets)
    return packs, last


def fitted(
    turns: Turns, rollouts: Sequence[Graded], packs: Sequence[Sequence[int]], own: TrainCritic,
    shown: Sequence[Sequence[float]],
) -> tuple[list[list[int]], list[list[NDArray[np.int32]]]]:  # fmt: skip
    """Packs without the first rollouts that `own.max_length` has no room for, and the ids before each that is left.

    A rollout that does not even fit alone leaves an empty pack. The last ones are kept, as published: they have siblings.
    """
    kept, said = [list(pack) for pack in packs], [list(scores) for scores in shown]
    before = turns.before_each(rollouts, kept, own.feedback, said)

    def room(pack: Sequence[int], gaps: Sequence[NDArray[np.int32]]) -> int:
        """How many of the last rollouts fit."""
        tail = np.cumsum([len(rollouts[i].response) for i in reversed(pack)])
        tail[1:] += np.cumsum([len(gap) for gap in reversed(gaps[1:])], dtype=np.int64)
        return int((tail + len(gaps[0]) <= own.max_length).sum()) if pack else 0

    while over := {n: fit for n, pack in enumerate(kept) if (fit := room(pack, before[n])) < len(pack)}:
        for n, fit in over.items():
            kept[n], said[n] = (of[len(of) - fit :] for of in (kept[n], said[n]))
        again = turns.before_each(rollouts, [kept[n] for n in over], own.feedback, [said[n] for n in over])
        for n, gaps in zip(over, again, strict=True):
            before[n] = gaps
    return kept, before


def pack_data(
    rollouts: Sequence[Graded], packs: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, own: TrainCritic,
    grid: BinGrid, shown: Sequence[Sequence[float]] | None = None,
) -> PackData:  # fmt: skip
    """Packs of numbers in `rollouts`, in ids and with labels.

    `shown` are other scores for the feedback than those of the rollouts, a control. Rollouts at the start of a pack that
    do not fit into `max_length` are left out and counted. Raises UserError when not one pack holds two rollouts.
    """
    said = [[rollouts[i].score for i in pack] for pack in packs] if shown is None else shown
    turns = Turns(tokenizer, own.layout)
    rollouts = [turns.fitting(r) for r in rollouts]
    kept, before = fitted(turns, rollouts, packs, own, said)
    left_out = sum(map(len, packs)) - sum(map(len, kept))
    if max(map(len, kept), default=0) < 2:
        raise UserError(
            f"Not one of {len(packs)} packs holds two rollouts of a prompt ({left_out} rollouts did not fit into "
            f"train_critic.max_length={own.max_length}). Raise rollouts.thinking_samples, or max_length."
        )
    members = [i for pack in kept for i in pack]
    gaps, responses = [gap for of in before for gap in of], [rollouts[i].response for i in members]
    lengths, sizes = np.array(list(map(len, responses))), np.array(list(map(len, gaps)))
    ends, segments = np.cumsum(sizes + lengths), np.cumsum([0, *(len(pack) for pack in kept if pack)])
    leaders = [rollouts[members[i]].rollout_id for i in segments[:-1]]
    return PackData(
        names=[*leaders] * 3, tokens=np.concatenate([ids for pair in zip(gaps, responses, strict=True) for ids in pair]),
        offsets=np.concatenate([[0], ends])[segments], segments=segments,
        members=np.array(members), first=ends - lengths - 1, lengths=lengths,
        reward_bin=grid.reward_bin([rollouts[i].score for i in members]), censored=np.array([rollouts[i].cut for i in members]),
        grid=grid, end_weight=own.end_weight, left_out=left_out,
    )  # fmt: skip
