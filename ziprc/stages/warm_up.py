"""warm_up: an expanded model after supervised training on the base's own right thoughts, rewritten with copies; `warmed-<model>`.

Copies that mean what their sources mean are never needed, so a policy may never come to use them for anything. Abstract-CoT
(https://arxiv.org/abs/2604.22709) finds that a new vocabulary has to be taught before it is rewarded; this is that, in the least
form: which right answers are learned from is decided by the grader, which tokens become copies by chance.
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
from transformers import AutoConfig

from ziprc.errors import UserError
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import read_manifest
from ziprc.joint.reasoning import read_reasoning
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.manifest import manifest_digests
from ziprc.tables.grades import GRADES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.expansion import rewritten
from ziprc.training.order import MicroBatches, order_by_tokens
from ziprc.training.resume import world_size
from ziprc.training.scratch import text_data
from ziprc.training.trainees import LanguageTrainee
from ziprc.training.trainer import train


def run(context: Context) -> str:
    """Train on rewritten rollouts and write the checkpoint; the closing line."""
    own, sources = context.config.warm_up.models[context.variant.model], context.reads
    start, seed = sources["base"], derived_seed(context.config.seed, "warm_up", context.name)
    reasoning = read_reasoning(start) if own.model else None
    rollouts, grades = ROLLOUTS.read(sources["rollouts"]), GRADES.read(sources["grades"])
    right = grades.filter(pc.fill_null(pc.greater_equal(grades["score"], own.least), False))["rollout_id"]
    rows = rollouts.filter(pc.and_(rollouts["thinking"], pc.is_in(rollouts["rollout_id"], right.combine_chunks())))
    rng, texts = np.random.default_rng(seed), []
    for row in rows.select(["rollout_id", "prompt_token_ids", "response_token_ids"]).to_pylist():
        prompt = row["prompt_token_ids"]
        response = row["response_token_ids"]
        if reasoning is not None:
            response = rewritten(response, reasoning.at_end(prompt), reasoning, own.share, rng)
        texts.append((row["rollout_id"], [*prompt, *response], len(prompt)))
    if not texts:
        raise UserError(
            f"{sources['grades']} has no response with a thought and a score of {own.least:g} or more to learn from. Give the "
            "base an easier task, or more samples (rollouts.thinking_samples)."
        )
    data = text_data(texts)
    order = order_by_tokens(data.lengths, own.batch_tokens, own.tokens, world_size(), seed)
    record = {
        "objective": "language", "params": context.params, "base": read_manifest(start).get("base"),
        "parents": manifest_digests(sources), "seed": seed,
    }  # fmt: skip

    def fresh() -> LanguageTrainee:
        return LanguageTrainee(load_model(start))

    done = train(
        context.target, record, fresh(), fresh, MicroBatches(data, order), own, context.config.runtime, "warm_up",
        load_tokenizer(start), None, AutoConfig.from_pretrained(start).dtype,
    )  # fmt: skip
    return f"{context.name} warmed up on {len(texts)} responses, {done}"


if __name__ == "__main__":
    run_stage("warm_up", run)
