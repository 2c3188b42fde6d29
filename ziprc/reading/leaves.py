"""A sequence, and many single tokens tried after its prefixes, in two passes: the trunk with its cache, then all leaves.

A leaf is a token that might stand behind the first `before` tokens of the trunk, in place of the one that does: it sees
those and itself, has the position of the token that it replaces, and no leaf sees another. So the states after every
plausible token of every place cost one pass over the sequence and one token each, instead of a pass for every place. Leaves
go through in chunks against the trunk's keys and values, with a mask of [chunk, trunk + chunk] booleans and no larger one.

(`flex_attention` with a dense mask aborts the process on a CPU; this keeps to the kernel that takes a mask, `sdpa` or eager.)

B sequences, S tokens of a trunk, n leaves of a sequence, c of a chunk, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

MASK_CELLS = 1 << 25  # booleans of one mask, over the batch


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
