"""The clipped surrogate and DPO against TRL's own losses, where both define the same thing.

TRL computes them in private methods of its trainers (trl is pinned exactly): they are called with a stand-in that has the
settings which these formulas read and a model that hands out log-probabilities.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from trl import DPOTrainer, GRPOTrainer

from ziprc.config.icl_v import Student
from ziprc.training.objectives.policy import PolicyBundle, dpo, grpo

LENGTHS = (5, 3, 4, 6)  # tokens of four responses


def numbers(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """[4, 6] log-probabilities of student and reference with ratios beyond the clip, advantages of both signs, and the mask."""
    rng = torch.Generator().manual_seed(seed)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).float()
    student = -torch.rand(4, 6, generator=rng, dtype=torch.float64) - 0.05
    reference = student + torch.randn(4, 6, generator=rng, dtype=torch.float64) * 0.4
    advantage = torch.tensor([1.0, -1.5, 0.7, -0.2], dtype=torch.float64)
    return student, reference, advantage, mask


def flat(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return values[mask.bool()]


def settings(**own: object) -> MagicMock:
    """A trainer's attributes; whatever is not named is never part of the loss."""
    trainer = MagicMock(**own)
    trainer.model.training = False
    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer.accelerator.gather.side_effect = trainer.accelerator.gather_for_metrics.side_effect = lambda value: value
    return trainer


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_grpo_is_trls(kl_coef: float) -> None:
    student, reference, advantage, mask = numbers()
    trainer = settings(
        loss_type="bnpo", importance_sampling_level="token", epsilon_low=0.2, epsilon_high=0.2, beta=kl_coef, use_vllm=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
    )  # fmt: skip
    trainer._get_per_token_logps_and_entropies.return_value = (student, torch.zeros_like(student), None)
    ids = torch.zeros(4, 6, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask,
        "advantages": advantage, "old_per_token_logps": reference, "ref_per_token_logps": reference,
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(trainer, None, inputs)
    rows = torch.arange(4)[:, None].expand(4, 6)
    bundle = PolicyBundle(
        flat(student, mask), flat(reference, mask), flat(advantage[:, None].expand(4, 6), mask), flat(rows, mask), 4
    )
    ours = grpo(bundle, Student(method="grpo", kl_coef=kl_coef))
    assert 0 < int(ours.parts["clipped"]) < sum(LENGTHS)
    torch.testing.assert_close(ours.total / mask.sum(), theirs)


def test_dpo_is_trls() -> None:
    student, reference, _, mask = numbers(1)
    trainer = settings(
        loss_types=["sigmoid"], loss_weights=[1.0], beta=0.7, ld_alpha=None, f_divergence_type="reverse_kl",
        precompute_ref_logps=True, aux_loss_enabled=False, use_weighting=False,
    )  # fmt: skip
    order = [0, 2, 1, 3]  # TRL has all chosen first, ours has pairs
    sums = (reference * mask).sum(1)
    inputs = {
        "input_ids": torch.zeros(4, 7, dtype=torch.long), "attention_mask": torch.ones(4, 7, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(4, 1), mask[order]], 1),
        "ref_chosen_logps": sums[[0, 2]], "ref_rejected_logps": sums[[1, 3]],
    }  # fmt: skip
    shown = {name: torch.zeros(4, 6) for name in ("mean_logits", "entropy")} | {"is_top1": torch.zeros(4, 6).bool()}
    said = MagicMock(log_probs=(student * mask)[order], **shown)
    theirs = DPOTrainer._compute_loss(trainer, lambda **given: said, inputs, return_outputs=False)
    rows = torch.arange(4)[:, None].expand(4, 6)
    bundle = PolicyBundle(flat(student, mask), flat(reference, mask), row=flat(rows, mask), rows=4)
    ours = dpo(bundle, Student(method="dpo", beta=0.7))
    torch.testing.assert_close(ours.total / 2, theirs)
