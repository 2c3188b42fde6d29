"""train_policy: a policy without context, from the base and the labels of its rollouts; `policy-<student>` each.

All students see the same labelled rollouts, as their method asks: see training/labelled.py, and for the losses
training/objectives/policy.py. A student of `labels: none` (rft) sees every graded rollout.
"""

from __future__ import annotations

import json
import sys

import torch
from transformers import AutoConfig, PreTrainedModel

from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import read_manifest
from ziprc.joint.reasoning import text_rows
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.stages.context import Context, is_main_process, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.manifest import manifest_digests
from ziprc.tables.grades import GRADES
from ziprc.tables.qvalues import QVALUES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.labelled import labelled_data
from ziprc.training.order import MicroBatches, order_by_count
from ziprc.training.packs import graded_rollouts
from ziprc.training.resume import world_size
from ziprc.training.trainees import PolicyTrainee, Trainee
from ziprc.training.trainer import train


def run(context: Context) -> str:
    """Train the student on labelled rollouts and write the checkpoint; the closing line."""
    own, runtime, sources = (
        context.config.train_policy.students[context.variant.student],
        context.config.runtime,
        context.reads,
    )
    seed = derived_seed(context.config.seed, "train_policy", context.name)
    grades = GRADES.read(sources["grades"])
    rollouts, ungraded = graded_rollouts(ROLLOUTS.read(sources["rollouts"]), grades, str(sources["grades"]))
    labels, grid = None, None
    if "qvalues" in sources:
        labels = QVALUES.read(sources["qvalues"])
        record = json.loads((labels.schema.metadata or {}).get(b"grid", b"null"))
        grid = BinGrid.from_dict(record) if record else None
    data = labelled_data(rollouts, labels, own, grid, str(sources.get("qvalues", sources["grades"])))
    micro = max(1, runtime.rollouts_per_device // data.units.shape[1])
    order = order_by_count(
        data.input_lengths(), own.batch_size, micro, world_size(), own.epochs, own.max_steps, seed, "train_policy"
    )
    base = sources["base"]
    tokenizer, model = load_tokenizer(base), load_model(base)
    text = text_rows(tokenizer, model)

    def trainee(model: PreTrainedModel) -> Trainee:
        return PolicyTrainee(model, own, text, runtime.position_chunk)

    record = {
        "objective": own.method, "params": context.params, "base": read_manifest(base).get("base"),
        "parents": manifest_digests(sources), "seed": seed,
    }  # fmt: skip
    if is_main_process():
        without = len(rollouts) - len(data.responses.names)
        print(
            f"{context.name}: {len(data)} {'pairs' if data.units.shape[1] > 1 else 'rollouts'} of {len(rollouts)} rollouts; "
            f"left out: {ungraded} ungraded, {without} without labels",
            file=sys.stderr,
        )
    done = train(
        context.target, record, trainee(model), lambda: trainee(load_model(base)), MicroBatches(data, order), own, runtime,
        "train_policy", tokenizer, None, AutoConfig.from_pretrained(base).dtype or torch.float32,
    )  # fmt: skip
    return f"{context.name} trained by {own.method} on {len(data)} units, {done}"


if __name__ == "__main__":
    run_stage("train_policy", run)
