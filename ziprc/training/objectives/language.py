"""Next-token cross-entropy at chosen states. P states, D hidden, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ziprc.training.objectives.base import Loss


@dataclass(frozen=True)
class TokenBundle:
    """States [P, D], the output matrix [V, D], and the token that each state is to emit [P]."""

    states: Tensor
    weight: Tensor
    targets: Tensor


@dataclass(frozen=True)
class LanguageObjective:
    """−log p(target), summed over states."""

    def __call__(self, bundle: TokenBundle) -> Loss:
        logits = (bundle.states @ bundle.weight.T).float()
        ce = torch.nn.functional.cross_entropy(logits, bundle.targets, reduction="sum")
        return Loss(ce, {"ce": ce.detach()})
