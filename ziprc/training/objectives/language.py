"""Next-token cross-entropy at chosen states. P states, D hidden, V vocabulary."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import cross_entropy

from ziprc.training.objectives.base import Loss


def language_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Loss:
    """−log p(target [P]) at the states [P, D] under the output matrix [V, D], summed."""
    ce = cross_entropy((states @ weight.T).float(), targets, reduction="sum")
    return Loss(ce, {"ce": ce.detach()})
