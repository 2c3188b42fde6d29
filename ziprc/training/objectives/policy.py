"""Six ways to make a policy of labelled rollouts, each a pure function of one bundle. ICL-V, §E of the published trainers.

The reference is in the labels: its log-probabilities are stored, and no frozen model runs beside the student.

* `kl`: the student's distribution over the candidates of a state against the reference tilted by their values. What is
  outside of the candidates is one more outcome, to which the target gives the mass that the reference gives it; without it
  (`tail: false`, as published) nothing holds the mass there.
* `rft`: the likelihood of right responses. `awr`: of all, each token weighed by e^(advantage / temperature).
* `dpo`: of a better and a worse response to one prompt, the log-ratio to the reference should differ.
* `grpo`, `ppo`: the clipped surrogate of the ratio to the reference; they differ in the advantage. The smaller of both
  products counts whatever the advantage's sign (the published code takes the larger one where it is negative).

P labelled states (of `kl`: those with a choice), N candidates, U rollouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ziprc.config.icl_v import Student
from ziprc.training.objectives.base import Loss

LEAST_MASS = 1e-6  # outside of the candidates: float32 cannot tell less from nothing


@dataclass(frozen=True)
class PolicyBundle:
    """What the student and the labels say of some rollouts. A method reads what it needs; the others' fields are None.

    `log_prob` are the student's: of the tokens taken [P], in `kl` of the candidates [N]. `reference` [P] are the labels' for
    the same tokens, `advantage` [P] is theirs. `row` [P] says which of the `rows` rollouts a state is of; in `dpo` they
    alternate, better and worse. `state` [N] says which of the P states a candidate belongs to; `target` [N] is its
    log-probability in the target, `tail` [P] that of everything else.
    """

    log_prob: Tensor
    reference: Tensor | None = None
    advantage: Tensor | None = None
    row: Tensor | None = None
    rows: int = 0
    state: Tensor | None = None
    target: Tensor | None = None
    tail: Tensor | None = None


def kl(b: PolicyBundle, own: Student) -> Loss:
    """KL(student ‖ target), or of the target from the student, summed over states."""
    assert b.state is not None and b.target is not None and b.tail is not None
    p, target = b.log_prob, b.target
    mass = p.new_zeros(len(b.tail)).index_add(0, b.state, p.exp())
    if not own.tail:  # both among the candidates alone
        inside = target.new_zeros(len(b.tail)).index_add(0, b.state, target.exp())
        p, target = p - mass.log()[b.state], target - inside.log()[b.state]
    total = _divergence(p, target, own.direction)
    if own.tail:
        total = total + _divergence(torch.log((1 - mass).clamp(min=LEAST_MASS)), b.tail, own.direction)
    return Loss(total, {"kl": total.detach(), "outside": (1 - mass).detach().sum()})


def _divergence(student: Tensor, target: Tensor, direction: str) -> Tensor:
    """One side's share of a KL, from log-probabilities."""
    p, q = (student, target) if direction == "reverse" else (target, student)
    return (p.exp() * (p - q)).sum()


def rft(b: PolicyBundle, own: Student) -> Loss:
    """−log π(right response), summed over tokens."""
    total = -b.log_prob.sum()
    return Loss(total, {"nll": total.detach()})


def awr(b: PolicyBundle, own: Student) -> Loss:
    """−w·log π, w = e^(advantage / temperature) up to `weight_clip`."""
    assert b.advantage is not None
    weight = (b.advantage / own.temperature).exp().clamp(max=own.weight_clip)
    total = -(weight * b.log_prob).sum()
    return Loss(total, {"nll": -b.log_prob.detach().sum(), "weight": weight.sum()})


def dpo(b: PolicyBundle, own: Student) -> Loss:
    """−log σ(β·(log-ratio of the better − log-ratio of the worse)), summed over pairs."""
    assert b.reference is not None and b.row is not None
    ratio = b.log_prob.new_zeros(b.rows).index_add(0, b.row, b.log_prob - b.reference)
    margin = own.beta * (ratio[0::2] - ratio[1::2])
    total = -F.logsigmoid(margin).sum()
    return Loss(total, {"dpo": total.detach(), "margin": margin.detach().sum(), "right": (margin > 0).sum()})


def grpo(b: PolicyBundle, own: Student) -> Loss:
    """The clipped surrogate, and `kl_coef` times an unbiased estimate of KL(student ‖ reference) on the tokens taken."""
    assert b.reference is not None
    loss = surrogate(b, own)
    gap = b.reference - b.log_prob
    drift = (gap.exp() - gap - 1).sum()
    return Loss(loss.total + own.kl_coef * drift, {**loss.parts, "kl": drift.detach()})


def surrogate(b: PolicyBundle, own: Student) -> Loss:
    """−min(ratio·A, clip(ratio)·A), summed over tokens; the whole of `ppo`."""
    assert b.reference is not None and b.advantage is not None
    ratio = (b.log_prob - b.reference).exp()
    held = ratio.clamp(1 - own.clip_eps, 1 + own.clip_eps)
    total = -torch.minimum(ratio * b.advantage, held * b.advantage).sum()
    clipped = (held * b.advantage < ratio * b.advantage).sum()
    return Loss(total, {"surrogate": total.detach(), "ratio": ratio.detach().sum(), "clipped": clipped})


METHODS: dict[str, Callable[[PolicyBundle, Student], Loss]] = {
    "kl": kl, "rft": rft, "awr": awr, "dpo": dpo, "grpo": grpo, "ppo": surrogate
}  # fmt: skip
