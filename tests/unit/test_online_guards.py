"""What we override and call of TRL's inside is still there; these tests fail when TRL changes it."""

from __future__ import annotations

import inspect

import pytest


def test_trls_head_still_takes_a_matrix_a_bias_and_what_is_asked_of_it() -> None:
    from trl.kernels import ChunkedLogProbFunction

    assert list(inspect.signature(ChunkedLogProbFunction.forward).parameters) == [
        "ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
        "outputs",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("_generate_single_turn", "self prompt_ids images multimodal_fields num_generations has_tool_images"),
        ("_generate_and_score_completions", "self inputs"),
        ("_calculate_rewards", "self inputs prompts completions completion_ids_list"),
        ("_compute_loss", "self model inputs"),
        ("_prepare_inputs", "self generation_batch"),
        ("_load_optimizer_and_scheduler", "self checkpoint"),
        ("_save_checkpoint", "self model trial"),
        ("create_model_card", "self model_name dataset_name tags"),
    ],
)
def test_trl_still_has_the_methods_that_are_overridden(name: str, parameters: str) -> None:
    from trl import GRPOTrainer

    assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters.split()


def test_trl_still_scores_tokens_by_the_method_that_is_overridden() -> None:
    from trl import GRPOTrainer

    known = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    assert known[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    source = inspect.getsource(GRPOTrainer._compute_loss)
    assert "self._get_per_token_logps_and_entropies(" in source and 'inputs.get("old_per_token_logps")' in source
    assert "lm_head.bias" in inspect.getsource(inspect.getmodule(GRPOTrainer).add_fused_lm_head)  # type: ignore[union-attr]
