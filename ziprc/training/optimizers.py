"""Muon for the hidden matrices and AdamW for everything else, as one optimizer; and the learning-rate schedule.

Muon (orthogonalised momentum, https://kellerjordan.github.io/posts/muon/) is meant for 2-D hidden matrices; embeddings,
output matrix and norms go to AdamW. The pair is one `torch.optim.Optimizer`, so that saving, resuming and scheduling
need no special case. `torch.optim.Muon` orthogonalises in bfloat16: some 15 times slower than float32 on a processor
without such instructions (.49 s a step of the small model instead of .033), at a higher loss, and half as fast with them
(.035 s instead of .016, AVX-512, 2026-11-26). So every CPU uses float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from ziprc.config.base import Optimisation


class Muon(torch.optim.Muon):
    """torch's Muon with the state and groups of torch's, but orthogonalised in float32 on a CPU."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                mean = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter.grad))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalised(parameter.grad.lerp(mean, group["momentum"]), group)  # Nesterov's look ahead
                rows, columns = parameter.shape
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * math.sqrt(max(1.0, rows / columns)))


def orthogonalised(matrix: torch.Tensor, group: Mapping[str, Any]) -> torch.Tensor:
    """Newton-Schulz iterations from [A, B] towards its U·Vᵀ; float32 on a CPU, bfloat16 elsewhere."""
    a, b, c = group["ns_coefficients"]
    x = matrix.to(torch.float32 if matrix.device.type == "cpu" else torch.bfloat16)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class MuonWithAdamW(Optimizer):
    """Each parameter group names its rule under `rule`; the two inner optimizers share this one's groups and state."""

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], settings: Optimisation) -> None:
        self._inner: Mapping[str, Optimizer] = {
            "muon": Muon(matrices, lr=settings.learning_rate, weight_decay=settings.weight_decay),
            "adamw": adamw(others, settings.adamw_learning_rate, settings),
        }
        groups = [{**group, "rule": rule} for rule, inner in self._inner.items() for group in inner.param_groups]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for rule, inner in self._inner.items():  # linked anew: load_state_dict replaces both containers
            inner.param_groups = [group for group in self.param_groups if group["rule"] == rule]
            inner.state = self.state
            inner.step()
        return loss


def adamw(parameters: Iterable[nn.Parameter], rate: float | None, settings: Optimisation) -> AdamW:
    """AdamW at the rate, or at the settings' learning rate where there is none."""
    rate, decay = rate or settings.learning_rate, settings.weight_decay
    return AdamW(list(parameters), lr=rate, betas=settings.betas, weight_decay=decay, fused=True)


def make_optimizer(model: nn.Module, settings: Optimisation) -> Optimizer:
    """The optimizer over every parameter of `model` that wants a gradient.

    Muon takes what is 2-D and neither an embedding nor the output matrix nor rows of it.
    """
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    outer = {n for n, p in wanted.items() if p.ndim != 2 or any(w in n for w in ("embed", "lm_head", "slice_weight"))}
    matrices, others = ([p for n, p in wanted.items() if (n in outer) is side] for side in (False, True))
    if settings.optimizer == "adamw":
        return adamw(wanted.values(), None, settings)
    return (
        MuonWithAdamW(matrices, others, settings) if matrices else adamw(others, settings.adamw_learning_rate, settings)
    )


def schedule_factor(step: int, steps: int, warmup: float, shape: str) -> float:
    """Share of the peak rate used by step `step` (from 0) of `steps`.

    Of W warm-up steps, step i uses (i + 1) / (W + 1). Then down to zero, which is reached just after the last step, unless the
    shape is constant.
    """
    warm = math.ceil(warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if shape == "constant":
        return 1.0
    progress = min(1.0, (step - warm) / max(1, steps - warm))
    return 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
