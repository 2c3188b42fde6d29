"""train_joint: the joint heads `noisy` (or cross-fitted, `noisy-fold<i>`), `ziprc`, `lite` and rivals, each from the base.

`noisy-fold<i>` sees only rollouts of prompts outside fold i. All heads start at the same row of the output matrix.
"""

from __future__ import annotations

import sys

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
from ziprc.tables.qvalues import QVALUES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.values import VALUES
from ziprc.training.data import outside_fold, rollout_data
from ziprc.training.order import MicroBatches, order_by_count
from ziprc.training.resume import world_size
from ziprc.training.trainees import Trainee, has_kl, joint_trainee
from ziprc.training.trainer import train


def run(context: Context) -> str:
    """Train the head on rollouts outside its fold and write the checkpoint; the closing line."""
    config, name, of, sources = context.config, context.name, context.variant, context.reads
    section, runtime = config.train_joint, config.runtime
    head = section.head(of.key)
    base, labels = sources["base"], of.labels.stage
    seed = derived_seed(config.seed, "train_joint", name)

    tokenizer, model = load_tokenizer(base), load_model(base)
    grid = BinGrid(head.reward_centres, section.length_edges)
    rows = model.get_output_embeddings().weight.shape[0]
    joint = JointHead(
        derive_layout(
            tokenizer, rows, grid.size, model.generation_config, section.first_row, copied_rows(model.config)
        ),
        grid,
    )

    rollouts = outside_fold(ROLLOUTS.read(sources["rollouts"]), of.fold)
    answers = {"grades": GRADES, "values": VALUES, "qvalues": QVALUES}[labels].read(sources[labels])
    data = rollout_data(rollouts, answers, head, grid, "train_joint", section.thinking_only)
    order = order_by_count(
        data.input_lengths(), head.batch_size, runtime.rollouts_per_device, world_size(), head.epochs, head.max_steps,
        seed, "train_joint",
    )  # fmt: skip
    dtype = torch.bfloat16 if runtime.bf16 and torch.cuda.is_available() else torch.float32
    reference = load_model(base, dtype).requires_grad_(False) if has_kl(head) else None

    def trainee(model: PreTrainedModel) -> Trainee:
        return joint_trainee(model, joint, head, runtime.position_chunk, reference)

    record = {
        "objective": "joint", "params": context.params, "base": read_manifest(base).get("base"),
        "parents": manifest_digests(sources), "seed": seed,
    }  # fmt: skip
    if is_main_process():
        left_out = ", ".join(f"{count} {why}" for why, count in data.dropped.items()) or "none"
        found = f"{len(data)} rollouts, {data.censored.sum()} of them censored"
        print(f"{name}: {found}; left out: {left_out}", file=sys.stderr)
    done = train(
        context.target, record, trainee(model), lambda: trainee(load_model(base)), MicroBatches(data, order), head,
        runtime, "train_joint", tokenizer, joint, AutoConfig.from_pretrained(base).dtype or torch.float32,
    )  # fmt: skip
    return f"{name} trained on {len(data)} rollouts, {done}"


if __name__ == "__main__":
    run_stage("train_joint", run)
