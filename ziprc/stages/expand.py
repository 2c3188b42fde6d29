"""expand: the base with copies of its vocabulary, or with wider feed-forward blocks; `expanded-<model>` each.

At first both are the base, to the bit outside the thinking block (training/expansion.py). The checkpoint of copies holds
`token_map.parquet`, one row a copy.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from transformers import AutoConfig, PreTrainedTokenizerBase

from ziprc.joint.checkpoint import load_model, save_checkpoint
from ziprc.joint.head import read_manifest
from ziprc.joint.reasoning import ReasoningVocabulary
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.manifest import manifest_digests
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.token_map import TOKEN_MAP
from ziprc.training.expansion import add_copies, copied_ids, widen


def run(context: Context) -> str:
    """Expand the base and write the checkpoint; the closing line."""
    models, sources, base = context.config.expand.models, context.reads, context.reads["base"]
    own, seed = models[context.variant.model], derived_seed(context.config.seed, "expand", context.name)
    tokenizer, dtype = load_tokenizer(base), AutoConfig.from_pretrained(base).dtype
    model = load_model(base, dtype)
    thoughts = []
    if "rollouts" in sources:
        rollouts = ROLLOUTS.read(sources["rollouts"])
        thoughts = rollouts.filter(pc.equal(rollouts["thinking"], True))["response_token_ids"].to_pylist()
    record = {
        "objective": "none", "params": context.params, "base": read_manifest(base).get("base"),
        "parents": manifest_digests(sources), "seed": seed,
    }  # fmt: skip
    if own.adds == "units":
        like = models[own.as_many_as or ""]
        size = like.copies * len(copied_ids(tokenizer, like, thoughts)) * model.config.hidden_size
        matrices = 1 if model.config.tie_word_embeddings else 2
        units = widen(model, size * matrices)
        save_checkpoint(context.target, model, tokenizer, record)
        return f"{context.name}: {units} units more a layer, for {size * matrices} parameters; wrote {context.target}"
    reasoning, marked = add_copies(model, tokenizer, own, thoughts, seed)
    table = token_map(reasoning, tokenizer)
    save_checkpoint(
        context.target, model, marked, record, more=lambda folder: TOKEN_MAP.write(folder / "token_map.parquet", table)
    )
    return f"{context.name}: {reasoning.size} copies of {len(reasoning.source_ids)} tokens; wrote {context.target}"


def token_map(reasoning: ReasoningVocabulary, tokenizer: PreTrainedTokenizerBase) -> pa.Table:
    """What every copy is."""
    return TOKEN_MAP.make(
        {
            "reasoning_id": list(range(reasoning.rows.start, reasoning.rows.stop)),
            "source_id": reasoning.of_row,
            "multiplicity": np.arange(reasoning.size) // len(reasoning.source_ids) + 1,
            "text": tokenizer.convert_ids_to_tokens(reasoning.of_row.tolist()),
        }
    )


if __name__ == "__main__":
    run_stage("expand", run)
