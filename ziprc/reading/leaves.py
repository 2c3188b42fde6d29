"""A sequence, and what else might follow its prefixes, in two passes: the trunk with its cache, then all leaves or branches.

A leaf is a token that might stand behind the first `before` tokens of the trunk, in place of the one that does: it sees
those and itself, has the position of the token that it replaces, and no leaf sees another. So the states after every
plausible token of every place cost one pass over the sequence and one token each, instead of a pass for every place. Leaves
go through in chunks against the trunk's keys and values, with a mask of [chunk, trunk + chunk] booleans and no larger one.

A branch is a whole continuation: its tokens see those of the trunk before it, and each other in order.

(`flex_attention` with a dense mask aborts the process on a CPU; this keeps to the kernel that takes a mask, `sdpa` or eager.)

B sequences, S tokens of a trunk, n leaves of a sequence, c of a chunk, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

MASK_CELLS = 1 << 25  # booleans of one mask, over the batch
BRANCH_TOKENS = 256  # of branches at once, or as many as the trunk has: the more, the more cells stand for nothing


@torch.inference_mode()
def trunk_and_leaves(model: PreTrainedModel, trunk: Tensor, leaves: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """States after the trunks' tokens [B, S, D] and after the leaves [B, n, D], behind the final norm.

    `trunk` [B, S] ids, padded on the right; `leaves` [B, n] ids, padded anywhere; `before` [B, n] how many tokens of its trunk
    a leaf sees, 0 where it is padding.
    """
    cache, (rows, size) = DynamicCache(config=model.config), trunk.shape
    states = model.base_model(input_ids=trunk, past_key_values=cache, use_cache=True).last_hidden_state
    if not leaves.shape[1]:
        return states, states[:, :0]
    found, number = [], torch.arange(size, device=trunk.device)
    chunk = max(1, MASK_CELLS // (rows * (size + 1)))
    for ids, seen in zip(leaves.split(chunk, 1), before.split(chunk, 1), strict=True):
        itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device).expand(rows, -1, -1)
        mask = torch.cat([number < seen[..., None], itself], -1)[:, None]
        found.append(
            model.base_model(
                input_ids=ids, position_ids=seen, attention_mask=mask, past_key_values=cache, use_cache=True
            ).last_hidden_state
        )
        cache.crop(-ids.shape[1])
    return states, torch.cat(found, 1)


@torch.inference_mode()
def trunk_and_branches(model: PreTrainedModel, trunk: Tensor, branches: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
    """For every branch the states [1 + m, D] behind the trunk's tokens before it and behind each of its own, final norm applied.

    `trunk` [S] ids; a branch is how many tokens of it stand before (one at least), and its own ids [m]. One alone needs no mask.
    """
    if len(branches) == 1:
        ((before, ids),) = branches
        whole: Tensor = model.base_model(input_ids=torch.cat([trunk[:before], ids])[None]).last_hidden_state
        return [whole[0, before - 1 :]]
    cache, size = DynamicCache(config=model.config), len(trunk)
    states = model.base_model(input_ids=trunk[None], past_key_values=cache, use_cache=True).last_hidden_state[0]
    number, found = torch.arange(size, device=trunk.device), []
    for part in _that_fit(branches, size):
        counts = [len(ids) for _, ids in part]
        branch = torch.repeat_interleave(torch.tensor(counts)).to(trunk.device)
        before = torch.tensor([of for of, _ in part], device=trunk.device)[branch]
        inside = torch.cat([torch.arange(count) for count in counts]).to(trunk.device)
        own = (branch[:, None] == branch) & (inside[:, None] >= inside)
        behind = model.base_model(
            input_ids=torch.cat([ids for _, ids in part])[None], position_ids=(before + inside)[None],
            attention_mask=torch.cat([number < before[:, None], own], 1)[None, None], past_key_values=cache, use_cache=True,
        ).last_hidden_state[0]  # fmt: skip
        cache.crop(-len(branch))
        rows = behind.split(counts)
        found += [torch.cat([states[of - 1 : of], row]) for (of, _), row in zip(part, rows, strict=True)]
    return found


def _that_fit(branches: Sequence[tuple[int, Tensor]], size: int) -> Iterator[list[tuple[int, Tensor]]]:
    """The branches in their order, cut where a part's tokens, or the cells of its mask, would be too many."""
    part: list[tuple[int, Tensor]] = []
    tokens = 0
    for branch in branches:
        more = tokens + len(branch[1])
        if part and (more > max(size, BRANCH_TOKENS) or more * (size + more) > MASK_CELLS):
            yield part
            part, more = [], len(branch[1])
        part, tokens = [*part, branch], more
    if part:
        yield part
