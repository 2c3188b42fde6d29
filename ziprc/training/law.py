"""The law that is trained on-policy, which is the one that samples: which rows of the output matrix may be drawn, and where.

Rows that are no token are banned by a bias of the output matrix, which TRL's chunked head adds. With a reasoning vocabulary
(joint/reasoning.py) the law depends on the place: outside the thinking block a token is scored against the rows before the
copies, so that it costs and gives exactly what the base does; in the block against all rows, with a bias. Two calls of the
chunked head on disjoint positions cost what one does, and no mask of the size of positions × vocabulary is ever made.
B responses, T tokens, D hidden, V rows.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl.kernels import ChunkedLogProbFunction

from ziprc.errors import UserError
from ziprc.joint.reasoning import NEVER, ReasoningVocabulary
from ziprc.joint.vocabulary import IdRange

CHUNK = 32768  # rows of the output matrix whose logits are formed at a time


class _Whole(Tensor):
    """A tensor that is not sharded, and says so where TRL asks a sharded one for the whole."""

    def full_tensor(self) -> Tensor:
        return self


def ban(model: PreTrainedModel, banned: Sequence[IdRange]) -> None:
    """Let `model` give no probability to these rows, as the engines do. Not part of its weights: nothing of it is saved."""
    head = model.get_output_embeddings()
    if head.bias is not None:
        raise UserError(
            "The model's output matrix has a bias, which on-policy training cannot keep apart from what is banned."
        )
    if not banned:
        return
    rows = torch.zeros(head.weight.shape[0], dtype=head.weight.dtype, device=head.weight.device)
    for first, last in banned:
        rows[first:last] = NEVER
    del head._parameters["bias"]
    head.bias = rows.as_subclass(_Whole)


def unban(model: PreTrainedModel) -> None:
    """Undo `ban`, before the model is saved."""
    head = model.get_output_embeddings()
    if "bias" not in head._parameters:
        del head.bias
        head.register_parameter("bias", None)


def in_regions(
    model: Any, reasoning: ReasoningVocabulary, ids: Tensor, mask: Tensor, keep: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the last `keep` tokens of `ids` [B, ·], each by the law of where it stands: log-probabilities and entropies [B, T],
    states [B, T, D], and whether it was drawn in the thinking block [B, T]. `model` has a region head."""
    begin = [reasoning.at_end(row) for row in ids[:, :-keep].tolist()]
    inside = torch.from_numpy(reasoning.inside(begin, ids[:, -keep:].cpu())).to(ids.device)
    log_probs, entropies, states = model(input_ids=ids, attention_mask=mask, inside=inside)
    return log_probs, entropies, states, inside


def add_region_head(model: PreTrainedModel, reasoning: ReasoningVocabulary, temperature: float) -> None:
    """Let `model(input_ids, attention_mask, inside=[B, T])` score the last T tokens: (log_probs, entropies, states), [B, T(, D)].

    Without `inside`, forward is what it was. Rows that are banned are so by the bias of the output matrix (`ban`).
    """
    before = model.forward

    def forward(self: PreTrainedModel, *args: Any, inside: Tensor | None = None, **kwargs: Any) -> Any:
        """[B, ·] ids and mask to what is said above."""
        if inside is None:
            return before(*args, **kwargs)
        ids, keep = kwargs["input_ids"], inside.shape[1]
        states = self.base_model(
            input_ids=ids, attention_mask=kwargs["attention_mask"], use_cache=False
        ).last_hidden_state
        states = states[:, -keep - 1 : -1]
        head = self.get_output_embeddings()
        weight, bias = head.weight, head.bias
        law = (torch.from_numpy(reasoning.bias(len(weight))).to(weight) * temperature).clamp(min=NEVER)
        law = law if bias is None else (law + bias.as_subclass(Tensor)).clamp(min=NEVER)
        laws = {
            True: (weight, law),
            False: (weight[: reasoning.start], None if bias is None else bias[: reasoning.start]),
        }
        log_probs, entropies = (states.new_zeros(inside.shape, dtype=torch.float32) for _ in range(2))
        for where, (rows, own) in laws.items():
            at = inside if where else ~inside
            targets = ids[:, -keep:][at]
            copied = targets >= len(rows)  # outside the block: a sampler that does not ban it, or padding
            found = ChunkedLogProbFunction.apply(
                states[at], rows, own, targets.masked_fill(copied, 0), temperature, min(CHUNK, len(rows)), None, 1.0,
                ("log_probs", "entropy"),
            )  # fmt: skip
            log_probs = log_probs.masked_scatter(at, found[0].masked_fill(copied, NEVER))
            entropies = entropies.masked_scatter(at, found[1])
        return log_probs, entropies, states

    model.forward = types.MethodType(forward, model)
