"""Full-vocabulary quantities at every labelled state, never more than a chunk of logits at a time.

Log-probability of the sampled token and entropy, for the honest baselines and, beside the joint and from the same
forward pass, for adaptive samplers; every plausible token with its log-probability; the exact KL(reference ‖ model) outside
the reserved slice for the drift. The slice never takes part in a softmax over tokens here, as it is masked when tokens are
sampled; temperature is 1. Shapes: N labelled states of a batch, D hidden, V rows.
"""

from __future__ import annotations

import math
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
class Reading:
    """Of one rollout: joint [m, R·L], log-probability of each response token and entropy of the emitting state [m]."""

    joint: NDArray[np.float32]
    log_prob: NDArray[np.float32]
    entropy: NDArray[np.float32]


@torch.inference_mode()
def token_scores(
    model: PreTrainedModel, text_rows: int, pairs: Sequence[TokenPair], token_budget: int, chunk: int
) -> Iterator[tuple[list[int], list[torch.Tensor], list[NDArray[np.float32]], list[NDArray[np.float32]]]]:
    """For every batch: the indices into `pairs`, and for each its states [m, D], log-probabilities and entropies [m]."""
    weight = model.get_output_embeddings().weight[:text_rows]
    for batch, rows in labelled_states(model, pairs, token_budget):
        response = np.concatenate([pairs[i].response for i in batch]).astype(np.int64)
        states, tokens = torch.cat(rows), torch.from_numpy(response).to(rows[0].device)
        log_prob, entropy = [], []
        for some, emitted in zip(states.split(chunk), tokens.split(chunk), strict=True):
            log_probs = torch.log_softmax((some @ weight.T).float(), -1)
            log_prob.append(log_probs.gather(-1, emitted[:, None])[:, 0])
            entropy.append(-(log_probs.exp() * log_probs).sum(-1))
        yield batch, rows, *(split_by_rollout(torch.cat(of).cpu().numpy(), rows) for of in (log_prob, entropy))


@torch.inference_mode()
def read_everything(
    model: PreTrainedModel, joint: JointHead, pairs: Sequence[TokenPair], token_budget: int, chunk: int
) -> Iterator[tuple[int, Reading]]:
    """Yield (index into `pairs`, reading) in the order of the batches, from one pass of the body."""
    reserved = slice_weight(model, joint).float()
    for batch, rows, *scores in token_scores(model, joint.layout.text_size, pairs, token_budget, chunk):
        for i, *found in zip(batch, joint_probabilities(rows, reserved), *scores, strict=True):
            yield i, Reading(*found)


@dataclass(frozen=True)
class Candidates:
    """Of one rollout of m tokens: those of state t are offsets[t] … offsets[t + 1] − 1 of `ids`, ascending, with `log_prob`."""

    offsets: NDArray[np.int64]  # [m + 1]
    ids: NDArray[np.int64]
    log_prob: NDArray[np.float32]

    @property
    def state(self) -> NDArray[np.int64]:
        """The state of every candidate."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


@torch.inference_mode()
def candidates(
    model: PreTrainedModel, text_rows: int, pairs: Sequence[TokenPair], token_budget: int, chunk: int, min_p: float
) -> list[Candidates]:
    """Tokens at least `min_p` (inf: none) times as likely as the likeliest, and the one emitted, in the order of `pairs`."""
    weight, found = model.get_output_embeddings().weight[:text_rows], {}
    for batch, rows in labelled_states(model, pairs, token_budget):
        emitted = torch.from_numpy(np.concatenate([pairs[i].response for i in batch]).astype(np.int64))
        counts, ids, log_prob = [], [], []
        for some, own in zip(torch.cat(rows).split(chunk), emitted.to(rows[0].device).split(chunk), strict=True):
            log_probs = torch.log_softmax((some @ weight.T).float(), -1)
            kept = log_probs >= log_probs.amax(-1, keepdim=True) + math.log(min_p)
            kept.scatter_(-1, own[:, None], True)
            counts.append(kept.sum(-1))
            ids.append(kept.nonzero()[:, 1])
            log_prob.append(log_probs[kept])
        ends = np.cumsum(torch.cat(counts).cpu().numpy())
        flat = torch.cat(ids).cpu().numpy(), torch.cat(log_prob).cpu().numpy()
        states = np.cumsum([0, *(len(row) for row in rows)])
        starts = np.concatenate([[0], ends])
        for i, first, last in zip(batch, states[:-1], states[1:], strict=True):
            a, b = starts[first], starts[last]
            found[i] = Candidates(starts[first : last + 1] - a, *(of[a:b] for of in flat))
    return [found[i] for i in range(len(pairs))]


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

    def outside(states: torch.Tensor, of: PreTrainedModel) -> torch.Tensor:
        """Log-probabilities over the rows outside the slice."""
        logits = (states @ of.get_output_embeddings().weight.T).float()
        return torch.log_softmax(torch.cat([logits[:, : layout.joint_start], logits[:, layout.joint_stop :]], -1), -1)

    out, both = np.zeros(len(pairs)), (labelled_states(one, pairs, token_budget) for one in (reference, model))
    for (batch, old), (_, new) in zip(*both, strict=True):
        kl = []
        for some, same in zip(torch.cat(old).split(chunk), torch.cat(new).split(chunk), strict=True):
            p, q = outside(some, reference), outside(same, model)
            kl.append((p.exp() * (p - q)).sum(-1, dtype=torch.float64))
        lengths = np.array([len(row) for row in old])
        out[batch] = np.add.reduceat(torch.cat(kl).cpu().numpy(), np.cumsum(lengths) - lengths)
    return out
