"""Full-vocabulary quantities at every labelled state, never more than a chunk of logits at a time.

Log-probability of the sampled token and entropy, for the honest baselines and, beside the joint and from the same
forward pass, for adaptive samplers; the exact KL(reference ‖ model) outside the reserved slice for the drift. The slice
never takes part in a softmax over tokens here, as it is masked when tokens are sampled; temperature is 1.
Shapes: N labelled states of a batch, D hidden, V rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ziprc.joint.head import JointHead
from ziprc.joint.readout import TokenPair, joint_probabilities, labelled_states, slice_weight, split_by_rollout
from ziprc.joint.vocabulary import VocabLayout


@dataclass(frozen=True)
class TokenScores:
    """Of one rollout: log-probability of each response token, entropy of the emitting state, and that state."""

    log_prob: NDArray[np.float32]
    entropy: NDArray[np.float32]
    states: torch.Tensor


@dataclass(frozen=True)
class Reading:
    """Of one rollout: joint [m, R·L], and log-probability and entropy [m] as in TokenScores."""

    joint: NDArray[np.float32]
    log_prob: NDArray[np.float32]
    entropy: NDArray[np.float32]


@torch.inference_mode()
def token_scores(
    model: PreTrainedModel, text_rows: int, pairs: Sequence[TokenPair], token_budget: int, chunk: int
) -> Iterator[tuple[int, TokenScores]]:
    """Yield (index into `pairs`, scores) in the order of the batches."""
    weight = model.get_output_embeddings().weight[:text_rows]
    for batch, rows in labelled_states(model, pairs, token_budget):
        log_prob, entropy = _score_batch(rows, [pairs[i].response for i in batch], weight, chunk)
        for i, lp, h, row in zip(batch, log_prob, entropy, rows, strict=True):
            yield i, TokenScores(lp, h, row)


@torch.inference_mode()
def read_everything(
    model: PreTrainedModel, joint: JointHead, pairs: Sequence[TokenPair], token_budget: int, chunk: int
) -> Iterator[tuple[int, Reading]]:
    """Yield (index into `pairs`, reading) in the order of the batches, from one pass of the body."""
    text, reserved = model.get_output_embeddings().weight[: joint.layout.text_size], slice_weight(model, joint).float()
    for batch, rows in labelled_states(model, pairs, token_budget):
        log_prob, entropy = _score_batch(rows, [pairs[i].response for i in batch], text, chunk)
        joints = joint_probabilities(rows, reserved)
        for i, p, lp, h in zip(batch, joints, log_prob, entropy, strict=True):
            yield i, Reading(p, lp, h)


def _score_batch(
    rows: Sequence[torch.Tensor], responses: Sequence[Sequence[int]], weight: torch.Tensor, chunk: int
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Log-probabilities and entropies [m] of every rollout of a batch, from its states [m, D]."""
    states = torch.cat(list(rows))
    tokens = torch.from_numpy(np.concatenate(responses).astype(np.int64)).to(states.device)
    parts = [_score_chunk(s, weight, t) for s, t in zip(states.split(chunk), tokens.split(chunk), strict=True)]
    log_prob, entropy = (torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True))
    return split_by_rollout(log_prob, rows), split_by_rollout(entropy, rows)


def _score_chunk(states: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_probs = torch.log_softmax((states @ weight.T).float(), -1)
    chosen = log_probs.gather(-1, tokens[:, None])[:, 0]
    return chosen, -(log_probs.exp() * log_probs).sum(-1)


@torch.inference_mode()
def kl_drift(
    reference: PreTrainedModel,
    model: PreTrainedModel,
    layout: VocabLayout,
    pairs: Sequence[TokenPair],
    token_budget: int,
    chunk: int,
) -> NDArray[np.float64]:
    """[n] sum over the labelled states of each rollout of KL(reference ‖ model) in nats, outside the slice."""
    out = np.zeros(len(pairs))
    both = zip(
        labelled_states(reference, pairs, token_budget), labelled_states(model, pairs, token_budget), strict=True
    )
    heads = [m.get_output_embeddings().weight for m in (reference, model)]
    for (batch, old), (_, new) in both:
        chunks = zip(torch.cat(old).split(chunk), torch.cat(new).split(chunk), strict=True)
        kl = torch.cat([_kl_chunk(p, q, heads, layout) for p, q in chunks]).cpu().numpy()
        starts = np.cumsum([len(row) for row in old]) - [len(row) for row in old]
        out[batch] = np.add.reduceat(kl, starts)
    return out


def _kl_chunk(old: torch.Tensor, new: torch.Tensor, heads: Sequence[torch.Tensor], layout: VocabLayout) -> torch.Tensor:
    p, q = (_outside((s @ w.T).float(), layout) for s, w in zip((old, new), heads, strict=True))
    return (p.exp() * (p - q)).sum(-1, dtype=torch.float64)


def _outside(logits: torch.Tensor, layout: VocabLayout) -> torch.Tensor:
    """Log-probabilities over the rows outside the slice."""
    kept = torch.cat([logits[:, : layout.joint_start], logits[:, layout.joint_stop :]], -1)
    return torch.log_softmax(kept, -1)
