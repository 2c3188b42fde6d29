"""Guided decoding: the reference samples, and a critic beside it says at every token what each candidate is worth.

ICL-V, §D. Candidates are what the sampling settings leave of the reference's distribution; their log-probabilities are
tilted by the critic's values (joint/tilt.py). The critic has read graded siblings of the same prompt, once for all samples:
where their scores are the true ones this is *oracle-assisted*, and no method for prompts without answers. A step costs one
pass of either model, since the candidates go through the critic as leaves, and the keys and values of the one that is drawn
stay as the trunk. Draws are those of the engine (engines/hf.py): with an empty tilt the samples are the engine's own.

Several prompts are answered at once, and all samples of a prompt share what is before them: there is one row a prompt, in
which every place knows whose it is.

P prompts, B samples that are not done, of which a prompt has M at most; V rows of the output matrix, n candidates, D hidden,
S places of a row.
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


SHARED, NOBODY = -1, -2  # owners of places: all samples of the prompt; none, since it is padding


class Trunks:
    """What a model has read, one row a prompt: keys and values, and which sample may see each place, `owner` [P, S]."""

    def __init__(self, model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> None:
        size, self.model = max(map(len, sequences)), model
        self.ids = torch.tensor([[*[0] * (size - len(of)), *of] for of in sequences], device=model.device)
        self.lengths = torch.tensor([len(of) for of in sequences], device=model.device)
        before = torch.arange(size, device=model.device) < size - self.lengths[:, None]
        self.owner = torch.where(before, NOBODY, SHARED)
        self.cache = DynamicCache(config=model.config)

    def begin(self) -> Tensor:
        """[P, D] the states behind what is shared. Padding sees itself, so that no number comes out that is none."""
        mask, real, size = None, self.owner == SHARED, self.ids.shape[1]
        if not real.all():
            itself = torch.eye(size, dtype=torch.bool, device=self.ids.device)
            mask = (itself | (itself.new_ones(size, size).tril() & real[:, None]))[:, None]
        return self._pass(self.ids, (real.cumsum(1) - 1).clamp(min=0), mask)[:, -1]

    def read(self, ids: Tensor, sample: Tensor, step: int) -> Tensor:
        """[P, Q, D] the states behind tokens [P, Q], each the one with number `step` (from 0) of its sample [P, Q].

        They see what their sample has kept so far, and not each other; their places are the last of the cache.
        """
        owner, rows = self.owner[:, None], len(ids)
        itself = torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device).expand(rows, -1, -1)
        mask = torch.cat([(owner == SHARED) | (owner == sample[..., None]), itself], -1)[:, None]
        return self._pass(ids, (self.lengths + step)[:, None].expand_as(ids), mask)

    def keep(self, places: Tensor | None, sample: Tensor) -> None:
        """Of the places just read keep these [P, M], or all, for the samples [P, M]."""
        self.owner = torch.cat([self.owner, sample], 1)
        for layer in self.cache.layers if places is not None else ():
            for name in ("keys", "values"):
                held: Tensor = getattr(layer, name)
                before = self.owner.shape[1] - sample.shape[1]
                at = (before + places)[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
                setattr(layer, name, torch.cat([held[:, :, :before], held.gather(2, at)], 2))

    def select(self, prompts: Tensor) -> None:
        """Go on with these rows alone."""
        if len(prompts) < len(self.owner):
            self.cache.batch_select_indices(prompts)
            self.owner, self.lengths = self.owner[prompts], self.lengths[prompts]

    def _pass(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        states: Tensor = self.model.base_model(
            ids, position_ids=positions, attention_mask=mask, past_key_values=self.cache, use_cache=True
        ).last_hidden_state
        return states


class Slots:
    """Where the samples that are not done stand in a batch of one row a prompt: `row` and `column` [B], `sample` [P, M]."""

    def __init__(self, live: Sequence[tuple[int, int]], device: torch.device) -> None:
        """`live` are (prompt, sample), prompt by prompt."""
        prompts = sorted({prompt for prompt, _ in live})
        rows = [prompts.index(prompt) for prompt, _ in live]
        columns = [number - rows.index(row) for number, row in enumerate(rows)]
        self.prompts = prompts
        self.row, self.column = (torch.tensor(of, device=device) for of in (rows, columns))
        self.sample = self.spread(torch.tensor([sample for _, sample in live], device=device), NOBODY)

    def spread(self, values: Tensor, filling: int = 0) -> Tensor:
        """[B, …] → [P, M, …]."""
        shape = (len(self.prompts), int(self.column.max()) + 1, *values.shape[1:])
        return values.new_full(shape, filling).index_put((self.row, self.column), values)


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
        self,
        prompts: Sequence[Sequence[int]],
        contexts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        most: int,
    ) -> list[list[GuidedResponse]]:
        """For every prompt one response of at most `most` tokens per seed.

        `contexts` are what the critic has read of each, up to where the response starts.
        """
        device, weight = self.reference.device, slice_weight(self.critic.model, self.critic.joint).float()
        drawn_by = {
            (p, n): torch.Generator(device=device).manual_seed(seed)
            for p, of in enumerate(seeds) for n, seed in enumerate(of)
        }  # fmt: skip
        tokens: dict[tuple[int, int], list[int]] = {key: [] for key in drawn_by}
        kl, reasons = dict.fromkeys(drawn_by, 0.0), dict[tuple[int, int], FinishReason]()
        live = list(drawn_by)
        slots, own, other = Slots(live, device), Trunks(self.reference, prompts), Trunks(self.critic.model, contexts)
        logits = self._logits(own.begin()[slots.row])
        other.begin()
        for step in range(most):
            kept = filtered(logits, self.sampling)
            n = int(torch.isfinite(kept).sum(-1).max())
            reference, ids = kept.topk(n, -1)  # −inf where a row has fewer candidates than others
            real, samples = torch.isfinite(reference), slots.sample.repeat_interleave(n, 1)
            states = other.read(slots.spread(ids).flatten(1), samples, step).unflatten(1, (-1, n))
            cells = (states[slots.row, slots.column][real].float() @ weight.T).softmax(-1).cpu().numpy()
            q = JointDistribution(self.critic.joint.grid, cells).expected_reward()
            tilted = reference.double()
            tilted[real] += torch.from_numpy(self.weigh(q, cells)).to(device)
            law, before = tilted.log_softmax(-1), reference.double().log_softmax(-1)
            nats = torch.where(real, law.exp() * (law - before), 0.0).sum(-1).tolist()
            full = torch.full_like(kept, -torch.inf).scatter(-1, ids, law.to(kept.dtype))
            drawn = draw(full, [drawn_by[key] for key in live])
            chosen = slots.column * n + (ids == drawn[:, None]).int().argmax(-1)
            other.keep(slots.spread(chosen), slots.sample)
            for key, token, more in zip(live, drawn.tolist(), nats, strict=True):
                tokens[key].append(token)
                kl[key] += more
                if token in self.stops:
                    reasons[key] = FinishReason.STOP
            going = [row for row, key in enumerate(live) if key not in reasons]
            live = [live[row] for row in going]
            if not live or step + 1 == most:
                break
            standing, slots = slots.prompts, Slots(live, device)
            rows = torch.tensor([standing.index(prompt) for prompt in slots.prompts], device=device)
            for trunks in (own, other):
                trunks.select(rows)
            states = own.read(slots.spread(drawn[torch.tensor(going, device=device)]), slots.sample, step)
            own.keep(None, slots.sample)
            logits = self._logits(states[slots.row, slots.column])
        return [
            [
                GuidedResponse(tuple(tokens[p, n]), reasons.get((p, n), FinishReason.LENGTH), kl[p, n])
                for n in range(len(of))
            ]
            for p, of in enumerate(seeds)
        ]

    def _logits(self, states: Tensor) -> Tensor:
        """[B, V] float32 logits behind states [B, D], of what may be sampled."""
        logits: Tensor = self.reference.get_output_embeddings()(states).float()
        logits[:, self.text :] = -torch.inf
        return logits
