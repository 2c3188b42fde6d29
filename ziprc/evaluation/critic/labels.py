"""Labels of a policy: what every plausible token of a rollout is worth, to a critic in context or to the tree of prefixes.

Both see the other rollouts of the prompt with their scores, never the rollout's own. The critic reads rotated packs, so that
two passes over a pack value half of its rollouts, each with at least half a pack of siblings before it: the taken tokens and
the states in the pack itself (the trunk), every other candidate as a leaf (reading/leaves.py).

m tokens of a rollout, n candidates, R·L cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ziprc.config.icl_v import TrainCritic
from ziprc.evaluation.critic.siblings import Prior, trie_candidates, trie_values
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.readout import batches_by_tokens, slice_weight
from ziprc.reading.leaves import trunk_and_leaves
from ziprc.reading.logits import Candidates
from ziprc.reading.states import JointReader
from ziprc.training.data import padded
from ziprc.training.packs import Graded, PackData, by_prompt_of, pack_data, rotated_packs


@dataclass(frozen=True)
class Labels:
    """Of one rollout: expected scores of its states [m + 1] and of its candidates [n], and the joints [n, R·L] behind those.

    `siblings` is how many other rollouts were read before it.
    """

    siblings: int
    values: NDArray[np.float32]
    q: NDArray[np.float32]
    cells: NDArray[np.float16]


def trie_labels(
    rollouts: Sequence[Graded], candidates: Mapping[int, Candidates], prior: Prior
) -> Iterator[tuple[int, Labels]]:
    """Yield (number, labels) of every rollout that has candidates and a sibling."""
    nothing = np.zeros((0, 0), np.float16)
    for own in by_prompt_of(rollouts).values():
        for i in own:
            if i in candidates and len(own) > 1:
                siblings = [rollouts[j] for j in own if j != i]
                values = trie_values(rollouts[i], siblings, prior)
                q = trie_candidates(rollouts[i], siblings, values, candidates[i])
                yield i, Labels(len(siblings), values.astype(np.float32), q.astype(np.float32), nothing)


@torch.inference_mode()
def critic_labels(
    reader: JointReader, tokenizer: PreTrainedTokenizerBase, rollouts: Sequence[Graded],
    candidates: Mapping[int, Candidates], own: TrainCritic, seed: int, budget: int,
) -> Iterator[tuple[int, Labels]]:  # fmt: skip
    """Yield (number, labels) of every rollout that has candidates, a sibling, and room in a pack."""
    numbers = [i for i, r in enumerate(rollouts) if len(r.prompt) + len(r.response) + r.cut <= own.max_length]
    packs, last = rotated_packs([rollouts[i] for i in numbers], own.pack_rollouts, seed)
    data = pack_data(rollouts, [[numbers[i] for i in pack] for pack in packs], tokenizer, own, reader.joint.grid)
    weight, device = slice_weight(reader.model, reader.joint).float(), reader.model.device
    targets = [
        [k for k in range(max(a, b - own_last), b) if int(data.members[k]) in candidates]
        for a, b, own_last in zip(data.segments[:-1], data.segments[1:], last, strict=True)
    ]
    tried = [_leaves(data, p, of, rollouts, candidates) for p, of in enumerate(targets)]
    wanted = [p for p, of in enumerate(targets) if of]
    sizes = [int(data.offsets[p + 1] - data.offsets[p]) + len(tried[p][0]) for p in wanted]
    for picked in batches_by_tokens(sizes, budget):
        batch = np.array([wanted[i] for i in picked])
        trunk = padded(data.tokens, data.offsets[batch], np.diff(data.offsets)[batch])["input_ids"]
        most = max(len(tried[p][0]) for p in batch)
        leaves, before = (
            np.stack([np.pad(of, (0, most - len(of))) for of in column])
            for column in zip(*(tried[p] for p in batch), strict=True)
        )
        inputs = (torch.from_numpy(of).to(device) for of in (trunk, leaves, before))
        inside, tips = (
            (of.float() @ weight.T).softmax(-1).cpu().numpy() for of in trunk_and_leaves(reader.model, *inputs)
        )
        for row, p in enumerate(batch):
            start = 0
            for k in targets[p]:
                i, first = int(data.members[k]), int(data.first[k] - data.offsets[p])
                m = len(rollouts[i].response)
                states, (state, taken) = inside[row, first : first + m + 1], _taken(rollouts[i], candidates[i])
                cells = np.empty((len(state), states.shape[1]), np.float32)
                cells[taken] = states[state[taken] + 1]
                cells[~taken] = tips[row, start : start + (~taken).sum()]
                start += int((~taken).sum())
                values, q = (
                    JointDistribution(data.grid, of).expected_reward().astype(np.float32) for of in (states, cells)
                )
                yield i, Labels(k - int(data.segments[p]), values, q, cells.astype(np.float16))


def _taken(rollout: Graded, of: Candidates) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """[n] each: the state of every candidate, and whether it is the token that the rollout went on with."""
    state = of.state
    return state, of.ids == rollout.response[state]


def _leaves(
    data: PackData, pack: int, targets: Sequence[int], rollouts: Sequence[Graded], candidates: Mapping[int, Candidates]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Every candidate that was not taken, of all targets of a pack: its id, and the tokens of the pack before it."""
    ids, before = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for k in targets:
        i = int(data.members[k])
        state, taken = _taken(rollouts[i], candidates[i])
        ids.append(candidates[i].ids[~taken])
        before.append(data.first[k] - data.offsets[pack] + 1 + state[~taken])
    return np.concatenate(ids), np.concatenate(before)
