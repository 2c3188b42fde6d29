"""The chunked KL with closed-form gradients against the plain one that autograd differentiates, in every form.

Tolerances: 1e-5 relative in float32 (sums of a few hundred terms), 1e-10 in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.doubles import kl_inputs, tiny_model, tiny_tokenizer
from ziprc.training.objectives import joint
from ziprc.training.objectives.joint import JointLabels, JointObjective, KLForm, Reference, reference_kl

V, D, P, K = 120, 12, 23, 7
ROWS = slice(90, 102)
FORMS = list(KLForm)


def naive_kl(z: Tensor, z_ref: Tensor, form: KLForm, k: int = K, rows: slice = ROWS) -> Tensor:
    """The definition, term by term, on logits without the slice's columns."""
    outside = [v for v in range(z.shape[-1]) if not rows.start <= v < rows.stop]
    log_q, log_p = z[:, outside].log_softmax(-1), z_ref[:, outside].log_softmax(-1)
    if form is KLForm.EXACT:
        return (log_p.exp() * (log_p - log_q)).sum()
    top = log_p.topk(k if form is KLForm.TOP_K else joint.LEGACY_TOP_K, -1).indices
    kept_p, kept_q = log_p.gather(-1, top), log_q.gather(-1, top)
    if form is KLForm.LEGACY_TOP32:
        kept_p = kept_p.log_softmax(-1)
        return (kept_p.exp() * (kept_p - kept_q)).sum()
    rest_p, rest_q = 1 - kept_p.exp().sum(-1), 1 - kept_q.exp().sum(-1)
    return (kept_p.exp() * (kept_p - kept_q)).sum() + (rest_p * (rest_p / rest_q).log()).sum()


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Reference]:
    return kl_inputs(P, V, D, dtype=dtype)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_loss_and_gradients_equal_the_naive_form(
    form: KLForm, dtype: torch.dtype, tolerance: float, chunk: int
) -> None:
    h, W, reference = inputs(dtype)
    ours = reference_kl(h, W, reference, ROWS, form, K, chunk)
    dh, dW = torch.autograd.grad(3 * ours, (h, W))
    naive = naive_kl(h @ W.T, reference.states @ reference.weight.T, form)
    dh_naive, dW_naive = torch.autograd.grad(3 * naive, (h, W))
    assert relative(ours, naive) < tolerance
    assert relative(dh, dh_naive) < tolerance
    assert relative(dW, dW_naive) < tolerance


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: KLForm) -> None:
    h, W, reference = inputs(torch.float64)
    assert torch.autograd.gradcheck(lambda h, W: reference_kl(h, W, reference, ROWS, form, K, 4), (h, W))


def test_the_whole_joint_loss_equals_the_naive_one() -> None:
    h, W, reference = inputs(torch.float64)
    labels = JointLabels(torch.arange(P) % 3, torch.arange(P) % 4, torch.zeros(P, dtype=torch.bool))
    objective = JointObjective(3, 4, ROWS, kl=10.0, chunk=4)
    ours = objective(h, W[ROWS], labels, W, reference).total
    cell = labels.reward_bin * 4 + labels.length_bin
    ce = torch.nn.functional.cross_entropy(h @ W[ROWS].T, cell, reduction="sum")
    naive = ce + 10 * naive_kl(h @ W.T, reference.states @ reference.weight.T, KLForm.EXACT)
    for a, b in zip(torch.autograd.grad(ours, (h, W)), torch.autograd.grad(naive, (h, W)), strict=True):
        assert relative(a, b) < 1e-10
    assert relative(ours, naive) < 1e-10


def test_survival_term_is_minus_log_of_the_mass_at_or_above() -> None:
    logits = torch.randn(5, 3, 4, dtype=torch.float64)
    labels = JointLabels(
        torch.tensor([0, 1, 2, -1, -1]), torch.tensor([0, 2, 3, 1, 2]), torch.tensor([1, 1, 1, 1, 0]).bool()
    )
    p = logits.flatten(1).softmax(-1).view(5, 3, 4)
    mass = [p[0, 0].sum(), p[1, 1, 2:].sum(), p[2, 2, 3:].sum(), p[3, :, 1:].sum(), p[4, :, 2].sum()]
    assert torch.allclose(joint.slice_cross_entropy(logits, labels), -torch.stack(mass).log().sum())


def test_frozen_output_matrix_costs_no_gradient_for_it() -> None:
    h, W, reference = inputs(torch.float32)
    loss = reference_kl(h, W.detach(), reference, ROWS, KLForm.EXACT, K, 8)
    (dh,) = torch.autograd.grad(loss, h)
    naive = naive_kl(h @ W.detach().T, reference.states @ reference.weight.T, KLForm.EXACT)
    assert relative(dh, torch.autograd.grad(naive, h)[0]) < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_works_in_a_model_with_tied_and_untied_embeddings(tied: bool) -> None:
    model, other = (tiny_model(tiny_tokenizer(), seed, tied).double() for seed in (0, 1))
    ids = torch.arange(40).view(2, 20)
    rows = slice(265, 277)
    states = model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
    with torch.no_grad():
        reference = Reference(other.base_model(input_ids=ids).last_hidden_state.flatten(0, 1), other.lm_head.weight)
    ours = reference_kl(states, model.lm_head.weight, reference, rows, KLForm.EXACT, K, 7)
    naive = naive_kl(states @ model.lm_head.weight.T, reference.states @ reference.weight.T, KLForm.EXACT, rows=rows)
    parameters = list(model.parameters())
    own = torch.autograd.grad(ours, parameters, retain_graph=True, allow_unused=False)
    for a, b in zip(own, torch.autograd.grad(naive, parameters), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_bf16_autocast_does_not_reach_into_the_kl() -> None:
    h, W, reference = inputs(torch.float32)
    outside = reference_kl(h, W, reference, ROWS, KLForm.EXACT, K, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = reference_kl(h, W, reference, ROWS, KLForm.EXACT, K, 8)
        half = reference_kl(h.bfloat16(), W, reference, ROWS, KLForm.EXACT, K, 8)
    assert torch.equal(inside, outside)
    (dh,) = torch.autograd.grad(half, h)
    assert half.dtype == dh.dtype == torch.float32
    assert relative(dh, torch.autograd.grad(outside, h)[0]) < 0.05  # rounding of the states
