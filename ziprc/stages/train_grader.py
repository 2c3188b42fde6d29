"""train_grader: the base taught to write the teacher's assessments; `grader-<name>` each.

The checkpoint says which form of question it reads, so that it is never asked in another.
"""

from __future__ import annotations

import json

from transformers import AutoConfig

from ziprc.chat import prompt_token_ids
from ziprc.errors import UserError
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import read_manifest
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.rubric import TEMPLATE_DIGEST
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.manifest import manifest_digests
from ziprc.tables.prompts import PROMPTS
from ziprc.training.order import MicroBatches, order_by_tokens
from ziprc.training.resume import world_size
from ziprc.training.scratch import text_data
from ziprc.training.trainees import LanguageTrainee
from ziprc.training.trainer import train


def run(context: Context) -> str:
    """Train on the teacher's words and write the checkpoint; the closing line."""
    own, sources = context.config.train_grader.graders[context.variant.grader], context.reads
    base, seed = sources["base"], derived_seed(context.config.seed, "train_grader", context.name)
    tokenizer = load_tokenizer(base)
    texts, rows = [], PROMPTS.read(sources["gradings/train"]).to_pylist()
    for row in rows:
        prompt, said = (
            prompt_token_ids(tokenizer, row["messages"], thinking=False),
            json.loads(row["extra"])["assessment"],
        )
        if said is None:
            raise UserError(
                f"{sources['gradings/train']}: question {row['prompt_id']} has a score but no words of the teacher to learn from."
            )
        answer = tokenizer(said, add_special_tokens=False)["input_ids"]
        texts.append((row["prompt_id"], [*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    data = text_data(texts)
    order = order_by_tokens(data.lengths, own.batch_tokens, own.tokens, world_size(), seed)
    record = {
        "objective": "language", "params": context.params, "base": read_manifest(base).get("base"),
        "parents": manifest_digests(sources), "seed": seed, "grader": {"template": TEMPLATE_DIGEST},
    }  # fmt: skip

    def fresh() -> LanguageTrainee:
        return LanguageTrainee(load_model(base))

    done = train(
        context.target, record, fresh(), fresh, MicroBatches(data, order), own, context.config.runtime, "train_grader",
        tokenizer, None, AutoConfig.from_pretrained(base).dtype,
    )  # fmt: skip
    return f"{context.name} taught with {len(texts)} assessments, {done}"


if __name__ == "__main__":
    run_stage("train_grader", run)
