"""Guided decoding: the reference samples, and a critic beside it says at every token what each candidate is worth.

ICL-V, §D. Candidates are what the sampling settings leave of the reference's distribution; their log-probabilities are
tilted by the critic's values (joint/tilt.py). The critic has read graded siblings of the same prompt, once for all samples:
where their scores are the true ones this is *oracle-assisted*, and no method for prompts without answers. A step costs one
pass of either model, since the candidates go through the critic as leaves, and the keys and values of the one that is drawn
stay as the trunk. Draws are those of the engine (engines/hf.py): with an empty tilt the samples are the engine's own.

B samples that are not done, V rows, n candidates, S tokens of the trunk, R·L cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ziprc.config.base import Sampling
from ziprc.engines.hf import draw, filtered
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.readout import slice_weight
from ziprc.reading.states import JointReader
from ziprc.tables.rollouts import FinishReason

Weigh = Callable[
    [NDArray[np.float64], NDArray[np.float32]], NDArray[np.float64]
]  # q [N], cells [N, R·L] → log-weights [N]


@dataclass(frozen=True)
class GuidedResponse:
    """The tokens, stop token included, why they end, and the KL of the law that was sampled from the reference's, in nats."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    kl: float


@dataclass(frozen=True)
class Guided:
    """Two models side by side. Rows of the output matrix from `text` on are never sampled."""

    reference: PreTrainedModel
    critic: JointReader
    text: int
    sampling: Sampling
    stops: frozenset[int]
    weigh: Weigh

    @torch.inference_mode()
    def respond(
        self, prompt: Sequence[int], context: Sequence[int], seeds: Sequence[int], most: int
    ) -> list[GuidedResponse]:
        """One response of at most `most` tokens per seed; `context` is what the critic has read, up to the response's start."""
        device, weight = self.reference.device, slice_weight(self.critic.model, self.critic.joint).float()
        generators = [torch.Generator(device=device).manual_seed(seed) for seed in seeds]
        tokens: list[list[int]] = [[] for _ in seeds]
        kl, live = np.zeros(len(seeds)), list(range(len(seeds)))
        own, other = (DynamicCache(config=model.config) for model in (self.reference, self.critic.model))
        logits = self._advance(own, torch.tensor([list(prompt)], device=device))
        self.critic.model.base_model(
            torch.tensor([list(context)], device=device), past_key_values=other, use_cache=True
        )
        for cache in (own, other):
            cache.batch_repeat_interleave(len(seeds))
        logits = logits.expand(len(seeds), -1).clone()
        reasons: dict[int, FinishReason] = {}
        while live:
            kept = filtered(logits, self.sampling)
            count = torch.isfinite(kept).sum(-1)
            reference, ids = kept.topk(int(count.max()), -1)  # −inf where a row has fewer candidates than others
            real = torch.isfinite(reference)
            cells = (self._leaves(other, ids).float() @ weight.T).softmax(-1)[real].cpu().numpy()
            q = JointDistribution(self.critic.joint.grid, cells).expected_reward()
            tilted = reference.double()
            tilted[real] += torch.from_numpy(self.weigh(q, cells)).to(device)
            law, before = tilted.log_softmax(-1), reference.double().log_softmax(-1)
            kl[live] += torch.where(real, law.exp() * (law - before), 0.0).sum(-1).cpu().numpy()
            full = torch.full_like(kept, -torch.inf).scatter(-1, ids, law.to(kept.dtype))
            drawn = draw(full, [generators[i] for i in live])
            _keep_leaf(other, (ids == drawn[:, None]).int().argmax(-1), ids.shape[1])
            for i, token in zip(live, drawn.tolist(), strict=True):
                tokens[i].append(token)
                if token in self.stops:
                    reasons[i] = FinishReason.STOP
                elif len(tokens[i]) >= most:
                    reasons[i] = FinishReason.LENGTH
            going = [row for row, i in enumerate(live) if i not in reasons]
            live = [live[row] for row in going]
            if live:
                index = torch.tensor(going, device=device)
                for cache in (own, other):
                    cache.batch_select_indices(index)
                logits = self._advance(own, drawn[index][:, None])
        return [GuidedResponse(tuple(ids), reasons[i], float(kl[i])) for i, ids in enumerate(tokens)]

    def _advance(self, cache: DynamicCache, ids: Tensor) -> Tensor:
        """[B, V] float32 logits behind these tokens, of what may be sampled."""
        logits = self.reference(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        logits[:, self.text :] = -torch.inf
        return logits

    def _leaves(self, cache: DynamicCache, ids: Tensor) -> Tensor:
        """[B, n, D] the critic's states behind every candidate, whose keys and values are in the cache afterwards."""
        size = cache.get_seq_length()
        itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
        mask = torch.cat([itself.new_ones(ids.shape[1], size), itself], -1).expand(len(ids), 1, -1, -1)
        states: Tensor = self.critic.model.base_model(
            ids, position_ids=torch.full_like(ids, size), attention_mask=mask, past_key_values=cache, use_cache=True
        ).last_hidden_state
        return states


def _keep_leaf(cache: DynamicCache, chosen: Tensor, leaves: int) -> None:
    """Of the last `leaves` places of the cache, keep the chosen one [B] of each row."""
    for layer in cache.layers:
        for name in ("keys", "values"):
            held: Tensor = getattr(layer, name)
            at = (held.shape[2] - leaves + chosen)[:, None, None, None].expand(-1, held.shape[1], 1, held.shape[3])
            setattr(layer, name, torch.cat([held[:, :, :-leaves], held.gather(2, at)], 2))
