"""What is trained: a model together with its objective, as one module whose forward returns the loss.

The loss lives inside the forward because DDP prepares its gradient hooks, and FSDP gathers the root's parameters
(embedding and output matrix, which the KL needs whole), only around the forward of the module they wrap. The body runs
alone: logits are formed by the objective, at the labelled states only.

`SliceHead` is ZIP-RC-Lite done right: with tied embeddings the published head-only trainer also rewrites the input
embeddings of ordinary tokens; here a separate [R·L, D] matrix is trained, and every text logit stays bit-identical.

B batch, T time, D hidden, P labelled states, V vocabulary, R·L cells.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ziprc.config.icl_v import Student
from ziprc.config.zip_rc import Head
from ziprc.joint.head import JointHead
from ziprc.training.objectives.base import Loss
from ziprc.training.objectives.joint import JointLabels, JointObjective, KLForm, Reference, working
from ziprc.training.objectives.language import language_loss
from ziprc.training.objectives.policy import METHODS, PolicyBundle

Batch = Mapping[str, Tensor]


def labelled(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The states [P, D] at `batch["positions"]`, which index the flattened [B·T].

    The body gets no attention mask: padding is on the right and attention is causal, so no labelled state can see it,
    and attention without a mask is faster (10 % of a step of the toy model). A test holds padded and single rows equal.
    """
    states = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return states.flatten(0, 1).index_select(0, batch["positions"])


def output_weight(model: PreTrainedModel) -> Tensor:
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

    def loss(self, batch: Batch) -> Loss:
        return language_loss(labelled(self.model, batch), output_weight(self.model), batch["targets"])


class JointTrainee(Trainee):
    """Every parameter, the joint loss. The reference is not a submodule: never trained, saved, wrapped or moved."""

    def __init__(
        self, model: PreTrainedModel, objective: JointObjective, reference: PreTrainedModel | None = None
    ) -> None:
        super().__init__(model)
        self.objective, self._reference = objective, [reference] if reference is not None else []

    def loss(self, batch: Batch) -> Loss:
        states, weight, known = labelled(self.model, batch), output_weight(self.model), None
        if self._reference:
            with torch.no_grad():
                reference = self._reference[0].to(states.device)
                known = Reference(labelled(reference, batch), output_weight(reference))
        with torch.autocast(states.device.type, enabled=False):
            return self.objective(states, weight[self.objective.rows], labels_of(batch), weight, known)


class SliceHead(Trainee):
    """Only the R·L rows, kept apart from the frozen model until `merged`."""

    def __init__(self, model: PreTrainedModel, objective: JointObjective) -> None:
        super().__init__(model.requires_grad_(False))
        self.objective = objective
        self.slice_weight = nn.Parameter(output_weight(model)[objective.rows].detach().clone())

    def loss(self, batch: Batch) -> Loss:
        with torch.no_grad():
            states = labelled(self.model, batch)
        with torch.autocast(states.device.type, enabled=False):
            return self.objective(states, self.slice_weight, labels_of(batch))

    @torch.no_grad()
    def merged(self) -> PreTrainedModel:
        output_weight(self.model)[self.objective.rows] = self.slice_weight
        return self.model


class PolicyTrainee(Trainee):
    """Every parameter, one of the objectives of a policy; log-probabilities are over the first `text` rows."""

    def __init__(self, model: PreTrainedModel, own: Student, text: int, chunk: int) -> None:
        super().__init__(model)
        self.own, self.text, self.chunk = own, text, chunk

    def loss(self, batch: Batch) -> Loss:
        states, weight = labelled(self.model, batch), output_weight(self.model)[: self.text]
        with torch.autocast(states.device.type, enabled=False):
            log_prob = text_log_probs(states, weight, batch["ids"], batch.get("state"), self.chunk)
            known = {name: batch.get(name) for name in ("reference", "advantage", "row", "state", "target", "tail")}
            return METHODS[self.own.method](PolicyBundle(log_prob, rows=len(batch["input_ids"]), **known), self.own)


def text_log_probs(states: Tensor, weight: Tensor, ids: Tensor, state: Tensor | None, chunk: int) -> Tensor:
    """[N] log-probabilities over the rows of `weight` [V, D] of tokens `ids` [N] at states [P, D]: of state n, or `state[n]`.

    Only the wanted logits are kept; those of a chunk of states are formed for the normaliser, and again for its gradient.
    """
    h, w = working(states), working(weight)

    def normaliser(some: Tensor, rows: Tensor) -> Tensor:
        return (some @ rows.T).logsumexp(-1)

    over = [checkpoint(normaliser, some, w, use_reentrant=False) for some in h.split(chunk)]
    at = (h, torch.cat(over)) if state is None else (h[state], torch.cat(over)[state])
    return torch.linalg.vecdot(at[0], w[ids]) - at[1]


def labels_of(batch: Batch) -> JointLabels:
    return JointLabels(batch["reward_bin"], batch["length_bin"], batch["censored"], batch.get("weight"))


def has_kl(head: Head) -> bool:
    """Whether a head is held to a reference. One that moves only its own rows cannot move the text, so it needs none."""
    return head.kl > 0 and head.trainable == "all"


def joint_trainee(
    model: PreTrainedModel, joint: JointHead, head: Head, chunk: int, reference: PreTrainedModel | None
) -> Trainee:
    """The module that `head.trainable` asks for; `reference` is frozen, and required exactly when `has_kl`."""
    grid, rows, kl = joint.grid, joint.layout.joint_slice, head.kl if has_kl(head) else 0.0
    objective = JointObjective(grid.R, grid.L, rows, kl, KLForm(head.kl_form), head.kl_top_k, chunk)
    if head.trainable == "slice":
        return SliceHead(model, objective)
    assert (reference is not None) == has_kl(head), "a reference is loaded exactly when there is a KL"
    return JointTrainee(model, objective, reference)
