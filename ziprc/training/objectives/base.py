"""What an objective makes: sums over the labelled positions that it was given, never means.

The trainer divides by the number of labelled positions of the whole global batch (over accumulation and devices), so
that cutting a batch into micro-batches does not change the step. No objective knows about devices, steps or files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """`total` carries the gradient; `parts` are its detached ingredients by name. All are sums over positions."""

    total: Tensor
    parts: Mapping[str, Tensor]
