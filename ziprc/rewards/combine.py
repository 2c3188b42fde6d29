"""What the optimiser of on-policy training sees: a weighted sum of rewards, of which the grader's score is one.

A reward is a function as TRL calls them: keyword arguments with one entry a response (`completions`, `completion_ids`, every
column of the prompts table and, from us, `score`, `finished` and `window`), and a list of numbers back. Known names:

* `score`: the grader's, unshaped; a response that was cut has 0.
* `rubric`: score and rubric, combined as the arm says (`combine`).
* `cosine`: by score and length (Yeo et al. 2025, https://arxiv.org/abs/2502.03373), with knobs named by what they do:
  `right_short`, `right_long`, `wrong_short`, `wrong_long`, and `cut` for a response that the window or the cap has ended.
* `format`, `repetition`, `overlong`: TRL's, by the think block, repeated n-grams, and the last tokens before the largest
  window (DAPO, https://arxiv.org/abs/2503.14476).

Any other name is an import path, `package.module:function`. The score is carried apart from the sum: metrics, gates and
windows read the score alone, so that no shaping can leak into what is called accuracy.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl.rewards import get_repetition_penalty_reward, get_soft_overlong_punishment, think_format_reward

from ziprc.config.online import Reward, Setup
from ziprc.errors import UserError
from ziprc.rewards.base import RIGHT

Function = Callable[..., Sequence[float | None]]


def score(score: Sequence[float], **known: Any) -> list[float]:
    """The grader's score."""
    return list(score)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine over the length in tokens, from the reward at no token to that at `largest`; `cut` where it was ended."""

    largest: int
    right_short: float = 1.0
    right_long: float = 0.5
    wrong_short: float = -1.0
    wrong_long: float = -0.1
    cut: float = -1.0

    def __call__(
        self, completion_ids: Sequence[Sequence[int]], score: Sequence[float], finished: Sequence[bool], **known: Any
    ) -> list[float]:
        rows = zip(map(len, completion_ids), score, finished, strict=True)
        return [self.reward(length, right >= RIGHT) if ended else self.cut for length, right, ended in rows]

    def reward(self, length: int, right: bool) -> float:
        """Of a response that ended by itself."""
        short, long = (self.right_short, self.right_long) if right else (self.wrong_short, self.wrong_long)
        return long + (short - long) / 2 * (1 + math.cos(math.pi * min(length, self.largest) / self.largest))


def combine(setup: Setup, right: float | None, score: float | None, weight: float = 1.0) -> float | None:
    """The reward of one response from its verdict `right` and its `score` by a rubric, both in [0, 1]; None is: not known.

    None where what the setup needs is missing: a failure is never a 0. Setups of Yuan et al. (https://arxiv.org/abs/2510.07774,
    and the code behind it), and ours:

    * `outcome`: the verdict; the rubric is not asked.
    * `tinyv_only`: the rubric alone. A wrong answer costs what the rubric says.
    * `addon`: 1 for a right answer, whatever its work; `weight` times the rubric for a wrong one. It pays for what is to be
      cured.
    * `mixed`: `weight` of the rubric and the rest of the verdict.
    * `gated`: the product: the rubric counts where the answer is right, and a grader that can be fooled pays for no wrong one.
    """
    if setup == "outcome":
        return right
    if setup == "tinyv_only":
        return score
    if right is None:
        return None
    if setup == "addon" and right >= RIGHT:
        return 1.0
    if setup == "gated" and right < RIGHT:
        return 0.0
    if score is None:
        return None
    if setup == "addon":
        return weight * score
    return weight * score + (1 - weight) * right if setup == "mixed" else right * score


def asks(setup: Setup, right: float | None) -> bool:
    """Whether the reward of a response with this verdict needs a score by the rubric."""
    return combine(setup, right, None) is None and not (right is None and setup != "tinyv_only")


def rubric(rubric: Sequence[float | None], **known: Any) -> list[float | None]:
    """The verdict and the rubric, combined (`rubric` of the arm)."""
    return list(rubric)


KNOWN: Mapping[str, Callable[..., Function]] = {
    "score": lambda largest: score,
    "rubric": lambda largest: rubric,
    "cosine": Cosine,
    "format": lambda largest: think_format_reward,
    "repetition": lambda largest, ngram_size=3, max_penalty=-1.0: get_repetition_penalty_reward(
        ngram_size, max_penalty
    ),
    "overlong": lambda largest, before=None: get_soft_overlong_punishment(largest, before or largest // 5),
}


def reward_function(name: str, own: Reward, largest: int) -> Function:
    """The function of a name; `largest` is the cap of a response in tokens. UserError for what cannot be made."""
    try:
        if name in KNOWN:
            return KNOWN[name](largest, **own.settings)
        module, _, attribute = name.partition(":")
        found: Function = getattr(importlib.import_module(module), attribute)
        return found(**own.settings) if own.settings else found  # a factory where it has settings
    except (TypeError, ImportError, AttributeError) as error:
        raise UserError(f"The reward '{name}' cannot be made: {error}. See train_online.arms.<name>.rewards.") from None
