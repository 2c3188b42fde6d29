"""The joint head's loss: cross-entropy over the slice, plus λ·KL(reference ‖ model) over every other row.

ZIP-RC (arXiv 2512.01457, §3). Cross-entropy: softmax over the R·L rows of the slice alone; a response that ran into the
cap is a censored observation, so its label is all cells at or above its length. KL: forward, temperature 1, at the same
states, so that what the model says does not move. The published KL keeps only the 32 highest reference tokens and
renormalises them, so at equal weights it is not zero and it sharpens the model; here the exact sum is the default and
`top_k` keeps one bucket for the rest. `ChunkedKL` takes the gradient in closed form while a chunk's logits exist, so
nothing of size [P, V] ever lives. The output matrix must be whole: under FSDP, inside the forward of the root module.

P labelled states, D hidden, V vocabulary, C states of one chunk, R reward centres, L length bins, K kept tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ziprc.training.objectives.base import Loss

LEGACY_TOP_K = 32  # the published code's fixed number of reference tokens
ANY_REWARD = -1  # reward label of a response whose score is marginalised over


class KLForm(StrEnum):
    """How the sum over the vocabulary is taken."""

    EXACT = "exact"
    TOP_K = "top_k"
    LEGACY_TOP32 = "legacy_top32"


@dataclass(frozen=True)
class JointLabels:
    """Per state [P]: reward bin (`ANY_REWARD`: every bin), length bin, and whether the length is only a lower bound.

    `weight` is how often a state counts (None: once).
    """

    reward_bin: Tensor
    length_bin: Tensor
    censored: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class Reference:
    """What the frozen copy says at the same states: [P, D] and its output matrix [V, D]."""

    states: Tensor
    weight: Tensor


@dataclass(frozen=True)
class JointObjective:
    """CE + kl·KL, summed over states; `rows` are the reserved ones of the output matrix.

    `chunk` bounds the memory of the KL and changes no result beyond rounding.
    """

    reward_bins: int
    length_bins: int
    rows: slice
    kl: float = 0.0
    form: KLForm = KLForm.EXACT
    top_k: int = 64
    chunk: int = 1024

    def __call__(
        self, states: Tensor, slice_weight: Tensor, labels: JointLabels,
        weight: Tensor | None = None, reference: Reference | None = None,
    ) -> Loss:  # fmt: skip
        """States [P, D], the slice's rows [R·L, D], labels; for the KL the output matrix [V, D] and the reference."""
        logits = working(states) @ working(slice_weight).T
        ce = slice_cross_entropy(logits.unflatten(-1, (self.reward_bins, self.length_bins)), labels)
        if self.kl == 0 or reference is None:
            return Loss(ce, {"ce": ce.detach()})
        assert weight is not None, "the KL needs the whole output matrix"
        kl = reference_kl(states, weight, reference, self.rows, self.form, self.top_k, self.chunk)
        return Loss(ce + self.kl * kl, {"ce": ce.detach(), "kl": kl.detach()})


def slice_cross_entropy(logits: Tensor, labels: JointLabels) -> Tensor:
    """Weighted sum over states of −log of the labelled cells' mass. `logits` [P, R, L]."""
    loss = state_losses(logits, labels)
    return (loss if labels.weight is None else loss * labels.weight).sum()


def state_losses(logits: Tensor, labels: JointLabels) -> Tensor:
    """[P] −log of the mass of the labelled cells, in nats, unweighted. `logits` [P, R, L]."""
    log_p = logits.flatten(1).log_softmax(-1)
    rewards, lengths = (torch.arange(bins, device=logits.device) for bins in logits.shape[1:])
    reward, length = labels.reward_bin[:, None], labels.length_bin[:, None]
    reward_fits = (rewards == reward) | (reward == ANY_REWARD)
    length_fits = (lengths == length) | (labels.censored[:, None] & (lengths > length))
    cells = (reward_fits[:, :, None] & length_fits[:, None, :]).flatten(1)
    return -log_p.masked_fill(~cells, -torch.inf).logsumexp(-1)


def reference_kl(
    states: Tensor, weight: Tensor, reference: Reference, rows: slice, form: KLForm, top_k: int, chunk: int
) -> Tensor:
    """Sum over states of KL(reference ‖ model) outside `rows`."""
    return ChunkedKL.apply(states, weight, reference.states, reference.weight, rows, form, top_k, chunk)  # type: ignore[no-any-return]


def working(tensor: Tensor) -> Tensor:
    """float32, or float64 when that is what comes in."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class ChunkedKL(torch.autograd.Function):
    """The KL as one function of (states, weight), its gradients taken in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, ref_states: Tensor, ref_weight: Tensor,
        rows: slice, form: KLForm, top_k: int, chunk: int,
    ) -> Tensor:  # fmt: skip
        with torch.autocast(states.device.type, enabled=False):
            h, W = working(states), working(weight)
            h_ref, W_ref = working(ref_states).to(h.dtype), working(ref_weight).to(h.dtype)
            dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
            dW = torch.zeros_like(W) if ctx.needs_input_grad[1] else None
            total = h.new_zeros(())
            for first in range(0, len(h), chunk):
                piece = slice(first, first + chunk)
                kl, dz = _chunk_kl(h[piece] @ W.T, h_ref[piece] @ W_ref.T, rows, form, top_k)
                total += kl
                if dh is not None:
                    torch.mm(dz, W, out=dh[piece])
                if dW is not None:
                    dW.addmm_(dz.T, h[piece])
        ctx.save_for_backward(None if dh is None else dh.to(states.dtype), None if dW is None else dW.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        dh, dW = (None if d is None else d * upstream.to(d.dtype) for d in ctx.saved_tensors)
        return dh, dW, None, None, None, None, None, None


def _chunk_kl(z: Tensor, z_ref: Tensor, rows: slice, form: KLForm, top_k: int) -> tuple[Tensor, Tensor]:
    """(KL summed over the chunk, its gradient by the logits `z`), both [C, V] inputs being used up in place."""
    log_q, log_p = _log_softmax_outside(z, rows), _log_softmax_outside(z_ref, rows)
    if form is KLForm.EXACT:
        p = log_p.exp()
        log_ratio = log_p.sub_(log_q)
        log_ratio[:, rows] = 0  # −inf − (−inf)
        return torch.linalg.vecdot(p, log_ratio).sum(), log_q.exp_().sub_(p)
    outside = z.shape[-1] - (rows.stop - rows.start)
    if form is KLForm.TOP_K:
        return _top_k_kl(log_q, log_p, min(top_k, outside))
    return _legacy_kl(log_q, log_p, min(LEGACY_TOP_K, outside))


def _log_softmax_outside(z: Tensor, rows: slice) -> Tensor:
    """log softmax over every column but the slice's, which become −inf. In place."""
    z[:, rows] = -torch.inf
    return z.sub_(z.logsumexp(-1, keepdim=True))


def _top_k_kl(log_q: Tensor, log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k highest reference tokens, and one bucket that holds all the others. Zero at equality."""
    kept_p, index = log_p.topk(k, -1)
    kept_q = log_q.gather(-1, index)
    q = log_q.exp()
    rest_p = log_p.scatter_(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    rest_q = log_q.scatter_(-1, index, -torch.inf).logsumexp(-1, keepdim=True)
    log_ratio = torch.where(rest_p == -torch.inf, torch.zeros_like(rest_p), rest_p - rest_q)
    p = kept_p.exp()
    kl = (p * (kept_p - kept_q)).sum() + (rest_p.exp() * log_ratio).sum()
    pull = torch.where(rest_p == -torch.inf, torch.ones_like(rest_p), 1 - log_ratio.exp())
    dz = (q * pull).scatter_(-1, index, kept_q.exp() - p)
    return kl, dz


def _legacy_kl(log_q: Tensor, log_p: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The published form: reference renormalised over its top 32, model normalised over all. Biased; for parity."""
    kept, index = log_p.topk(k, -1)
    kept = kept.log_softmax(-1)
    p = kept.exp()
    kl = (p * (kept - log_q.gather(-1, index))).sum()
    return kl, log_q.exp_().scatter_add_(-1, index, -p)
