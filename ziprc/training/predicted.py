"""The window of each response, predicted: a joint head says while it is sampled whether it can still end right in time.

The head is that of the checkpoint that an arm starts from (ZIP-RC's, arXiv 2512.01457): reserved rows that are read in the pass
that emits a token, and that are neither drawn nor trained, while the body below them is. A response whose chance of ending
right within the window falls below a floor is stopped there; it counts as cut, and wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ziprc.config.online import Window
from ziprc.engines.base import Engine, Request, Response
from ziprc.joint.bins import BinGrid
from ziprc.joint.distribution import JointDistribution
from ziprc.rewards.base import RIGHT


@dataclass(frozen=True)
class Predictor:
    """What is read: the head's grid, and how many responses the engine decodes at once."""

    grid: BinGrid
    at_once: int

    def sample(self, engine: Engine, requests: Sequence[Request], own: Window) -> list[Response]:
        """Responses in the order of the requests; those that are given up end as FinishReason.ABORT."""
        order = self.longest_first(engine, requests) if len(requests) > self.at_once else range(len(requests))
        begun = [requests[i] for i in order]

        def watch(which: Sequence[int], positions: Sequence[int], joint: NDArray[np.float32]) -> list[int]:
            due = [row for row, position in enumerate(positions) if position and position % own.interval == 0]
            left = np.array([begun[which[row]].max_new_tokens - positions[row] for row in due], dtype=np.int64)
            chance = JointDistribution(self.grid, joint[due]).right_within(left, RIGHT)
            return [which[row] for row, low in zip(due, chance < own.floor, strict=True) if low]

        found = dict(zip(order, engine.generate(begun, watch=watch), strict=True))
        return [found[i] for i in range(len(requests))]

    def longest_first(self, engine: Engine, requests: Sequence[Request]) -> list[int]:
        """The requests by how long the head expects their responses to be, so that a rollout does not wait for its tail.

        It is asked at the first token of each different prompt, so the prompts are read once more than without.
        """
        asked = list({request.prompt_token_ids: replace(request, max_new_tokens=1) for request in requests}.values())
        first = [one.joint for one in engine.generate(asked)]
        remaining = JointDistribution(self.grid, np.concatenate(first)).median_remaining()
        expected = dict(zip([request.prompt_token_ids for request in asked], remaining.tolist(), strict=True))
        return sorted(range(len(requests)), key=lambda i: -expected[requests[i].prompt_token_ids])
