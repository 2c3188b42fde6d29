"""On-policy training with a reasoning vocabulary: the rate of its rows, and what becomes of them.

B responses, T tokens, D hidden, V rows of the output matrix, R copies.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from ziprc.joint.reasoning import NEVER, ReasoningVocabulary
from ziprc.joint.vocabulary import IdRange

QUARTERS = 4  # of a thought, by position
PROBED = 16  # responses of a rollout in which a copy is put back into its source
DRIFTED = 8  # tokens named that have moved most


class CopiesRate:
    """Gives the rows of the copies a learning rate of their own: `rate` times what the optimizer moves them; 0 keeps them.

    Rows of one matrix cannot be in different groups of an optimizer, so what it did to them is taken back in part.
    """

    def __init__(self, model: PreTrainedModel, reasoning: ReasoningVocabulary, rate: float) -> None:
        matrices = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        self.matrices = list({id(one): one for one in matrices}.values())
        self.rows, self.rate = reasoning.rows, rate
        self.before: list[Tensor] = []
        if rate == 0:  # nor do they count in the norm that gradients are clipped by
            for one in self.matrices:
                one.register_hook(self._without)

    def _without(self, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[self.rows] = 0
        return gradient

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(lambda *_: self._note())
        optimizer.register_step_post_hook(lambda *_: self._scale())

    def _note(self) -> None:
        self.before = [one[self.rows].detach().clone() for one in self.matrices]

    @torch.no_grad()
    def _scale(self) -> None:
        for one, before in zip(self.matrices, self.before, strict=True):
            one[self.rows] = before if self.rate == 0 else torch.lerp(before, one[self.rows], self.rate)
        self.before = []


@dataclass
class Use:
    """What a rollout shows of the copies: sums over a process, which add up over processes."""

    reasoning: ReasoningVocabulary
    sums: dict[str, float] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)
    quarters: NDArray[np.float64] = field(default_factory=lambda: np.zeros((2, QUARTERS)))  # copies, tokens

    def add(self, **more: float) -> None:
        for name, value in more.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def see(self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> None:
        """Count the copies of the responses that were sampled."""
        for prompt, ids in zip(prompts, responses, strict=True):
            inside = self.reasoning.inside([self.reasoning.at_end(prompt)], np.asarray(ids)[None])[0]
            copy = self.reasoning.is_copy(ids)
            self.used |= set(np.asarray(ids)[copy].tolist())
            self.add(inside=inside.sum(), copies=(copy & inside).sum(), violations=(copy & ~inside).sum())
            at = np.flatnonzero(inside)
            quarter = np.arange(len(at)) * QUARTERS // max(1, len(at))
            np.add.at(self.quarters, (0, quarter), copy[at])
            np.add.at(self.quarters, (1, quarter), 1)

    @torch.no_grad()
    def learn(self, states: Tensor, entropies: Tensor, inside: Tensor, known: Tensor, weight: Tensor) -> None:
        """Add what a micro-batch says: entropies, and by how much a copy's logit is above its source's, over all pairs."""
        within, outside = inside & known, ~inside & known
        source = torch.from_numpy(self.reasoning.of_row).to(weight.device)
        apart = (weight[self.reasoning.rows] - weight[source]).float().mean(0)
        self.add(
            entropy_inside=float(entropies[within].sum()), within=int(within.sum()),
            entropy_outside=float(entropies[outside].sum()), outside=int(outside.sum()),
            logit_gap=float((states[within].float() @ apart).sum()),
        )  # fmt: skip

    def with_others(self, others: Sequence[Use]) -> Use:
        """The same of all these processes together."""
        found = Use(self.reasoning, used=set[int]().union(*(one.used for one in others)))
        found.quarters = np.sum([one.quarters for one in others], axis=0)
        for one in others:
            found.add(**one.sums)
        return found

    def row(self) -> dict[str, Any]:
        """Means and counts, as columns of the progress table."""

        def mean(name: str, over: str) -> float | None:
            return self.sums[name] / self.sums[over] if self.sums.get(over) else None

        copies, tokens = self.quarters
        return {
            "copies_share": mean("copies", "inside"), "copies_used": len(self.used),
            "violations": int(self.sums.get("violations", 0)), "logit_gap": mean("logit_gap", "within"),
            "copy_kl": mean("copy_kl", "probed"),
            "entropy_inside": mean("entropy_inside", "within"), "entropy_outside": mean("entropy_outside", "outside"),
            "copies_by_quarter": json.dumps([round(float(c / t), 6) if t else None for c, t in zip(copies, tokens, strict=True)]),
        }  # fmt: skip


@torch.no_grad()
def drift(model: PreTrainedModel, reasoning: ReasoningVocabulary) -> NDArray[np.float64]:
    """[2, R] distance of every copy from its source, in norms of the source: in the input matrix, and in the output matrix."""
    source, found = torch.from_numpy(reasoning.of_row), []
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        sources = matrix[source.to(matrix.device)].float()
        found.append(
            ((matrix[reasoning.rows].float() - sources).norm(dim=-1) / sources.norm(dim=-1)).cpu().double().numpy()
        )
    return np.stack(found)


def drift_row(model: PreTrainedModel, reasoning: ReasoningVocabulary) -> dict[str, Any]:
    """Of the output matrix, and the ids of the copies that have moved most, with how far."""
    into, out = drift(model, reasoning)
    most = np.argsort(-out, kind="stable")[:DRIFTED]
    moved = [[int(reasoning.start + i), round(float(out[i]), 6)] for i in most]
    return {"drift_mean": float(out.mean()), "drift_max": float(out.max()), "drift_input": float(into.mean()),
            "most_moved": json.dumps(moved)}  # fmt: skip


@torch.no_grad()
def put_back(
    model: PreTrainedModel, reasoning: ReasoningVocabulary, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]],
    banned: Sequence[IdRange], rng: np.random.Generator,
) -> list[float]:  # fmt: skip
    """KL in nats between the laws of the next token after a copy and after its source, for some responses that have one.

    One copy of each thought, drawn by `rng`, is put back.
    """
    kept, swapped, at = [], [], []
    for prompt, ids in zip(prompts, responses, strict=True):
        places = np.flatnonzero(reasoning.is_copy(ids)[:-1])  # in the block, or nothing else could follow
        if len(places) and len(kept) < PROBED:
            place = int(rng.choice(places))
            whole = [*prompt, *ids[: place + 1]]
            kept.append(whole)
            swapped.append([*whole[:-1], int(reasoning.plain(whole[-1:])[0])])
            at.append(len(whole) - 1)
    if not kept:
        return []
    device = model.get_output_embeddings().weight.device
    rows = [torch.tensor(one) for one in kept + swapped]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    # attention is causal, so what is padded on the right is not seen
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[range(len(rows)), at + at]
    weight = model.get_output_embeddings().weight
    bias = torch.from_numpy(reasoning.bias(len(weight))).to(weight).clamp(min=NEVER)
    for first, last in banned:
        bias[first:last] = NEVER
    law, other = (states.float() @ weight.float().T + bias.float()).log_softmax(-1).chunk(2)
    gaps: list[float] = (law.exp() * (law - other)).sum(-1).tolist()
    return gaps
