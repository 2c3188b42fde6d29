"""How a rollout of on-policy training is cut into micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ziprc.config.online import Arm
from ziprc.errors import UserError


@dataclass(frozen=True)
class Sizes:
    """How a rollout is cut up: rows of a micro-batch, micro-batches of an optimiser step and of a rollout, per process."""

    micro: int
    accumulation: int
    steps: int
    updates: int  # optimiser steps per rollout, all passes counted

    @classmethod
    def of(cls, arm: Arm, micro: int, processes: int) -> Sizes:
        """The largest micro-batch of at most `micro` rows that divides its share. UserError when nothing does."""
        rows = arm.prompts * arm.samples
        own, rest = divmod(rows, processes * arm.updates)
        if rest:
            raise UserError(
                f"A rollout has {rows} responses (prompts × samples), which {processes} processes cannot share in "
                f"{arm.updates} updates. Make it a multiple of {processes * arm.updates} (train_online.arms)."
            )
        size = max(n for n in range(1, min(own, micro) + 1) if own % n == 0)
        return cls(size, own // size, own // size * arm.updates, arm.updates * arm.passes)


def by_length(step: Sequence[dict[str, Any]], sort: bool) -> list[dict[str, Any]]:
    """The micro-batches of one optimiser step, each cut to its longest prompt and response; sorted, the long ones together.

    TRL pads all to the longest response of the rollout. Which responses a micro-batch holds does not matter to a sum.
    """
    count, length = len(step), step[0]["completion_mask"].shape[1]
    if sort:
        whole = {key: torch.cat([of[key] for of in step]) for key, one in step[0].items() if _rows(one)}
        order = whole["completion_mask"].sum(1).argsort(descending=True, stable=True).chunk(count)
        step = [{**step[i], **{key: one[order[i]] for key, one in whole.items()}} for i in range(count)]
    cut = []
    for micro in step:
        asked, said = (int(micro[f"{part}_mask"].sum(1).max()) for part in ("prompt", "completion"))
        ends = {key: slice(-asked, None) if key.startswith("prompt_") else slice(max(1, said)) for key in micro}
        wide = {
            key
            for key, one in micro.items()
            if _rows(one) and one.ndim == 2 and (key[:7] == "prompt_" or one.shape[1] == length)
        }
        cut.append({key: one[:, ends[key]] if key in wide else one for key, one in micro.items()})
    return cut


def _rows(one: Any) -> bool:
    return isinstance(one, Tensor) and one.ndim > 0
