"""What is trained: a model together with its objective, as one module whose forward returns the loss.

The loss lives inside the forward for a reason. DDP prepares its gradient hooks, and FSDP gathers the root's parameters
(embedding and output matrix, which the KL needs whole), only around the forward of the module they wrap. The body runs
alone (`model.base_model`): logits over the vocabulary are formed by the objective, at the labelled states only.

`SliceHead` is ZIP-RC-Lite done right. With tied embeddings the published head-only trainer also rewrites the input
embeddings of ordinary tokens; here only a separate [R·L, D] matrix is trained and merged at the end, so every text
logit stays bit-identical.

B batch, T time, D hidden, P labelled states, V vocabulary, R·L cells.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ziprc.config.zip_rc import Head
from ziprc.joint.head import JointHead
from ziprc.training.objectives.base import Loss
from ziprc.training.objectives.joint import JointBundle, JointLabels, JointObjective, KLForm, Reference
from ziprc.training.objectives.language import LanguageObjective, TokenBundle

Batch = Mapping[str, Tensor]


def labelled(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The states [P, D] at `batch["positions"]`, which index the flattened [B·T].

    The body gets no attention mask: padding is on the right and attention is causal, so no labelled state can see it,
    and attention without a mask is faster (10 % of a step of the toy model). A test holds padded and single rows equal.
    """
    states = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return states.flatten(0, 1).index_select(0, batch["positions"])


def output_weight(model: PreTrainedModel) -> Tensor:
    """The output matrix [V, D]."""
    return model.get_output_embeddings().weight


class Trainee(nn.Module):
    """A model with its objective. `forward` returns the sums of `Loss` as a flat dictionary, total under "loss"."""

    _keys_to_ignore_on_save: list[str] | None = None  # asked for by transformers.Trainer

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules  # FSDP's default wrapping units

    def loss(self, batch: Batch) -> Loss:
        raise NotImplementedError

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        loss = self.loss(batch)
        return {"loss": loss.total, **loss.parts}

    def tie_weights(self) -> None:
        """Asked for by accelerate after it has rebuilt the parameters for FSDP."""
        self.model.tie_weights()

    def merged(self) -> PreTrainedModel:
        """The model to save."""
        return self.model


class LanguageTrainee(Trainee):
    """Every parameter, next-token loss."""

    objective = LanguageObjective()

    def loss(self, batch: Batch) -> Loss:
        states = labelled(self.model, batch)
        return self.objective(TokenBundle(states, output_weight(self.model), batch["targets"]))


class JointTrainee(Trainee):
    """Every parameter, the joint loss. The reference is not a submodule: never trained, saved, wrapped or moved."""

    def __init__(
        self, model: PreTrainedModel, joint: JointHead, objective: JointObjective, reference: PreTrainedModel | None
    ) -> None:
        super().__init__(model)
        self.joint, self.objective = joint, objective
        self._reference = (reference,)

    def loss(self, batch: Batch) -> Loss:
        states = labelled(self.model, batch)
        reference = self._reference_at(batch)
        weight = output_weight(self.model)
        with torch.autocast(states.device.type, enabled=False):
            rows = weight[self.joint.layout.joint_slice]
            return self.objective(JointBundle(states, rows, labels_of(batch), weight, reference))

    @torch.no_grad()
    def _reference_at(self, batch: Batch) -> Reference | None:
        (reference,) = self._reference
        if reference is None:
            return None
        if reference.device != batch["input_ids"].device:
            reference.to(batch["input_ids"].device)
        return Reference(labelled(reference, batch), output_weight(reference))


class SliceHead(Trainee):
    """Only the R·L rows, kept apart from the frozen model until `merged`."""

    def __init__(self, model: PreTrainedModel, joint: JointHead, objective: JointObjective) -> None:
        super().__init__(model.requires_grad_(False))
        self.joint, self.objective = joint, objective
        self.slice_weight = nn.Parameter(output_weight(model)[joint.layout.joint_slice].detach().clone())

    def loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            states = labelled(self.model, batch)
        with torch.autocast(states.device.type, enabled=False):
            return self.objective(JointBundle(states, self.slice_weight, labels_of(batch)))

    @torch.no_grad()
    def merged(self) -> PreTrainedModel:
        output_weight(self.model)[self.joint.layout.joint_slice] = self.slice_weight
        return self.model


def labels_of(batch: Batch) -> JointLabels:
    return JointLabels(batch["reward_bin"], batch["length_bin"], batch["censored"])


def has_kl(head: Head) -> bool:
    """Whether a head is held to a reference. One that moves only its own rows cannot move the text, so it needs none."""
    return head.kl > 0 and head.trainable == "all"


def joint_trainee(
    model: PreTrainedModel, joint: JointHead, head: Head, chunk: int, reference: PreTrainedModel | None
) -> Trainee:
    """The module that `head.trainable` asks for; `reference` is required exactly when `has_kl`."""
    grid, kl = joint.grid, head.kl if has_kl(head) else 0.0
    form = KLForm(head.kl_form)
    objective = JointObjective(grid.R, grid.L, joint.layout.joint_slice, kl, form, head.kl_top_k, chunk)
    if head.trainable == "slice":
        return SliceHead(model, joint, objective)
    assert (reference is not None) == has_kl(head), "a reference is loaded exactly when there is a KL"
    return JointTrainee(model, joint, objective, reference)


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """The same model as a reference: evaluation mode, no gradients."""
    return model.eval().requires_grad_(False)
