"""train_critic: critics that learn in context, `critic` or cross-fitted `critic-fold<i>`, each from the base.

`critic-fold<i>` sees no prompt of fold i. The first steps learn the reward at the end of a rollout alone, where the siblings'
answers tell it; the next ones that of every state (any length is right), the last ones reward and length. With every state
from the start, whether a critic finds out whose answer was right is a matter of luck; with the length, too, it drowns.
"""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel

from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import JointHead, read_manifest
from ziprc.joint.reasoning import copied_rows
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.joint.vocabulary import derive_layout
from ziprc.stages.context import Context, is_main_process, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.manifest import manifest_digests
from ziprc.tables.grades import GRADES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.data import outside_fold
from ziprc.training.objectives.joint import JointObjective
from ziprc.training.order import MicroBatches, order_by_count
from ziprc.training.packs import graded_rollouts, pack_data, pack_kind, shuffled_packs, supervised
from ziprc.training.resume import world_size
from ziprc.training.trainees import JointTrainee, Trainee
from ziprc.training.trainer import train


def run(context: Context) -> str:
    """Train the critic on packs outside its fold and write the checkpoint; the closing line."""
    own, runtime, sources = context.config.train_critic, context.config.runtime, context.reads
    seed = derived_seed(context.config.seed, "train_critic", context.name)
    tokenizer, model = load_tokenizer(sources["base"]), load_model(sources["base"])
    grid = BinGrid(own.reward_centres, own.length_edges)
    rows = model.get_output_embeddings().weight.shape[0]
    joint = JointHead(
        derive_layout(tokenizer, rows, grid.size, model.generation_config, None, copied_rows(model.config)), grid
    )

    table = outside_fold(ROLLOUTS.read(sources["rollouts"]), context.variant.fold)
    rollouts, ungraded = graded_rollouts(table, GRADES.read(sources["grades"]), str(sources["grades"]))
    packs = shuffled_packs(rollouts, own.pack_rollouts, int(np.ceil(own.epochs)), seed)
    data = supervised(pack_data(rollouts, packs, tokenizer, own, grid), own)
    lengths, world = data.input_lengths(), world_size()
    micro = max(1, runtime.forward_tokens // int(lengths.max()))
    share = own.epochs / np.ceil(own.epochs)
    order = order_by_count(lengths, own.batch_size, micro, world, share, -1, seed, "train_critic")
    until = [round(order.steps * part) * order.slots for part in (own.end_share, 1 - own.joint_share)]
    phases = [sum(i < end for end in until) * len(data) for i in range(len(order.micro_batches))]
    order = dataclasses.replace(
        order, micro_batches=[picked + phase for picked, phase in zip(order.micro_batches, phases, strict=True)]
    )

    def trainee(model: PreTrainedModel) -> Trainee:
        return JointTrainee(model, JointObjective(grid.R, grid.L, joint.layout.joint_slice))

    record = {
        "objective": "in_context", "params": context.params, "base": read_manifest(sources["base"]).get("base"),
        "pack": pack_kind(own, tokenizer),
        "parents": manifest_digests(sources), "seed": seed,
    }  # fmt: skip
    if is_main_process():
        print(
            f"{context.name}: {len(rollouts)} rollouts in {len(data)} packs of {lengths.mean():.0f} tokens, at most "
            f"{lengths.max()}; left out: {ungraded} ungraded, {data.left_out} that did not fit",
            file=sys.stderr,
        )
    done = train(
        context.target, record, trainee(model), lambda: trainee(load_model(sources["base"])), MicroBatches(data, order),
        own, runtime, "train_critic", tokenizer, joint, AutoConfig.from_pretrained(sources["base"]).dtype or torch.float32,
    )  # fmt: skip
    return f"{context.name} trained on {len(data)} packs, {done}"


if __name__ == "__main__":
    run_stage("train_critic", run)
