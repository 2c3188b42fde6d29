"""Reading the joint head: one body-only forward pass, then the R·L rows of the output matrix and nothing else.

The state at index P0 - 1 + j (P0 prompt tokens) emits response token j; it knows the prompt and the first j tokens, and
m - j tokens are still to come, the stop token included. A response of m tokens therefore has m labelled states.
Full-vocabulary logits are never formed here. Shapes: B batch, T time, D hidden, P labelled states, R·L cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ziprc.joint.head import JointHead


@dataclass(frozen=True)
class TokenPair:
    """Prompt and response ids of one rollout."""

    prompt: Sequence[int] | NDArray[np.int32]
    response: Sequence[int] | NDArray[np.int32]


def body_states(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states after the final norm, [B, T, D]; the output matrix is not applied."""
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def slice_weight(model: PreTrainedModel, joint: JointHead) -> torch.Tensor:
    """The R·L rows of the output matrix, [R·L, D], a view."""
    return model.get_output_embeddings().weight[joint.layout.joint_slice]


def batches_by_tokens(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices grouped so that batch size × longest row stays below `budget` tokens, longest first."""
    batch: list[int] = []
    longest = 0
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if batch and (len(batch) + 1) * longest > budget:
            yield batch
            batch = []
        longest = longest if batch else lengths[i]
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def labelled_states(
    model: PreTrainedModel, pairs: Sequence[TokenPair], token_budget: int = 8192
) -> Iterator[tuple[list[int], list[torch.Tensor]]]:
    """For every batch: the indices into `pairs`, and for each its labelled hidden states [m, D] on the model's device."""
    lengths = [len(pair.prompt) + len(pair.response) for pair in pairs]
    for batch in batches_by_tokens(lengths, token_budget):
        own = [pairs[i] for i in batch]
        inputs = [np.concatenate([p.prompt, p.response[:-1]]).astype(np.int64) for p in own]  # no label after the last
        ids = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in inputs], batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in inputs])[:, None]).long()
        states = body_states(model, ids.to(model.device), mask.to(model.device))
        yield batch, [of[len(p.prompt) - 1 :][: len(p.response)] for of, p in zip(states, own, strict=True)]


@torch.inference_mode()
def read_joint(
    model: PreTrainedModel, joint: JointHead, pairs: Sequence[TokenPair], token_budget: int = 8192
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (index into `pairs`, joint [m, R·L] float32) for every rollout, in the order of the batches."""
    weight = slice_weight(model, joint).float()
    for batch, rows in labelled_states(model, pairs, token_budget):
        yield from zip(batch, joint_probabilities(rows, weight), strict=True)


def joint_probabilities(rows: Sequence[torch.Tensor], weight: torch.Tensor) -> list[NDArray[np.float32]]:
    """Joint [m, R·L] float32 of every rollout of a batch, from its states [m, D] and the slice [R·L, D] in float32."""
    probabilities = torch.softmax(torch.cat(list(rows)).float() @ weight.T, -1).cpu().numpy()
    return split_by_rollout(probabilities, rows)


def split_by_rollout(values: NDArray[np.float32], rows: Sequence[torch.Tensor]) -> list[NDArray[np.float32]]:
    """Cut what was computed for all states of a batch, [N, …], into one array per rollout."""
    return np.split(values, np.cumsum([len(row) for row in rows])[:-1])
