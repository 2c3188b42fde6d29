"""What must hold of the objectives for any weights, labels and chunking."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.doubles import kl_inputs
from ziprc.training.objectives import joint
from ziprc.training.objectives.joint import ANY_REWARD, JointLabels, JointObjective, KLForm, Reference, reference_kl

sizes = st.tuples(st.integers(1, 9), st.integers(40, 80), st.integers(2, 6))  # P, V, D


@settings(max_examples=40, deadline=None)
@given(
    sizes, st.integers(0, 10**6), st.sampled_from([KLForm.EXACT, KLForm.TOP_K]), st.integers(1, 100), st.integers(1, 4)
)
def test_kl_and_its_gradient_are_exactly_zero_at_equal_weights(size, seed, form, k, chunk) -> None:  # type: ignore[no-untyped-def]
    h, W, _ = kl_inputs(*size, seed, torch.float32, scale=3)
    kl = reference_kl(h, W, Reference(h.detach(), W.detach()), slice(5, 11), form, k, chunk)
    dh, dW = torch.autograd.grad(kl, (h, W))
    assert kl.item() == 0 and not dh.any() and not dW.any()


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(0, 10**6), st.integers(1, 30))
def test_top_k_is_between_zero_and_the_exact_kl(size, seed, k) -> None:  # type: ignore[no-untyped-def]
    h, W, reference = kl_inputs(*size, seed, scale=3)
    exact = reference_kl(h, W, reference, slice(0, 6), KLForm.EXACT, k, 4)
    coarse = reference_kl(h, W, reference, slice(0, 6), KLForm.TOP_K, k, 4)
    assert -1e-9 <= coarse <= exact + 1e-9  # merging cells cannot raise a divergence
    everything = reference_kl(h, W, reference, slice(0, 6), KLForm.TOP_K, len(W), 4)
    assert everything.item() == pytest.approx(exact.item(), rel=1e-9)


def test_the_published_form_is_biased_by_the_mass_outside_its_top_32() -> None:
    h, W, _ = kl_inputs(6, 200, 5)
    kl = reference_kl(h, W, Reference(h, W), slice(190, 200), KLForm.LEGACY_TOP32, 0, 4)
    mass = (h @ W[:190].T).softmax(-1).topk(joint.LEGACY_TOP_K, -1).values.sum(-1)
    assert kl.item() == pytest.approx(-mass.log().sum().item()) and kl > 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(list(KLForm)))
def test_the_slice_gets_no_gradient_from_the_kl(seed, form) -> None:  # type: ignore[no-untyped-def]
    h, W, reference = kl_inputs(4, 60, 5, seed, torch.float32, scale=3)
    kl = reference_kl(h, W, reference, slice(50, 56), form, 8, 3)
    (dW,) = torch.autograd.grad(kl, W)
    assert not dW[50:56].any() and dW[:50].any() and dW[56:].any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_sums_add_up_over_micro_batches(seed, cut) -> None:  # type: ignore[no-untyped-def]
    h, W, reference = kl_inputs(10, 60, 5, seed, scale=3)
    rng = torch.Generator().manual_seed(seed)
    labels = [torch.randint(0, n, (10,), generator=rng) for n in (2, 3)] + [torch.rand(10, generator=rng) < 0.3]
    objective = JointObjective(2, 3, slice(50, 56), kl=2.0, chunk=4)

    def loss(rows: slice) -> float:
        mine = JointLabels(*(label[rows] for label in labels))
        theirs = Reference(reference.states[rows], reference.weight)
        return objective(h[rows], W[50:56], mine, W, theirs).total.item()

    assert loss(slice(0, cut)) + loss(slice(cut, 10)) == pytest.approx(loss(slice(0, 10)), rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_knowing_less_never_costs_more(seed) -> None:  # type: ignore[no-untyped-def]
    logits = 3 * torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(seed))

    def loss(reward: int, length: int, censored: bool) -> float:
        labels = JointLabels(*map(torch.tensor, ([reward], [length], [censored])))
        return joint.slice_cross_entropy(logits, labels).item()

    for length in range(4):
        assert loss(1, length, True) <= loss(1, length, False) + 1e-6
        assert loss(ANY_REWARD, length, False) <= loss(1, length, False) + 1e-6
    assert loss(1, 3, True) == pytest.approx(loss(1, 3, False), abs=1e-6)  # the last bin is open
    assert loss(ANY_REWARD, 0, True) == pytest.approx(0, abs=1e-6)  # nothing is known
