"""rollouts: sample responses from a policy. Facts only: what was asked, what came out, why it ended.

`train` and `test` are sampled from `checkpoints/base`; `test-many` gives the first test prompts many rollouts, for the
empirical joint; `test-<checkpoint>` samples the test prompts from that checkpoint. `validation-ziprc` and `test-ziprc` are
pools: `pool_samples` recorded responses per prompt, on which adaptive samplers are replayed. Seeds follow from (run seed,
prompt, thinking, index) and not from the policy, so that drift is a paired comparison. A policy with a reasoning vocabulary is
also asked with its copies banned, and to go on from the first half of its own thoughts, kept or put back into ordinary tokens.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ziprc.chat import prompt_token_ids
from ziprc.config.base import GREEDY
from ziprc.config.load import Config
from ziprc.engines.base import EngineSettings, settings_for
from ziprc.engines.recording import Recording, Wanted, check_fit
from ziprc.engines.workers import share_out
from ziprc.joint.head import read_joint_head, read_manifest
from ziprc.joint.reasoning import ReasoningVocabulary
from ziprc.joint.tokenizer import TOKENIZER_FILES, load_tokenizer
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed, digest_file, digest_json
from ziprc.store.files import require_space
from ziprc.systems.shared import RolloutsOf
from ziprc.tables.pieces import cut
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS, FinishReason

Key = tuple[str, bool, int]  # prompt, thinking, number of the sample
BYTES_PER_TOKEN = 6  # of id and text, compressed, in the pieces and in the merged table


def wanted_of(prompt: dict[str, Any], of: RolloutsOf, tokenizer: Any, seed: int) -> Iterator[Wanted]:
    """The rollouts of one prompt. Seeds do not depend on the policy."""
    for thinking, count in of.samples:
        ids = tuple(prompt_token_ids(tokenizer, prompt["messages"], thinking)) if count else ()
        for index in range(count):
            own_seed = derived_seed(seed, prompt["prompt_id"], thinking, index)
            yield Wanted(prompt["prompt_id"], thinking, index, own_seed, ids)


def begun(table: pa.Table, reasoning: ReasoningVocabulary, swapped: bool) -> dict[Key, tuple[int, ...]]:
    """The responses of a table up to half of their thoughts, with their copies or with the sources of these."""
    found = {}
    for row in table.to_pylist():
        ids = np.asarray(row["response_token_ids"])
        inside = np.flatnonzero(reasoning.inside([reasoning.at_end(row["prompt_token_ids"])], ids[None])[0])
        kept = ids[: inside[len(inside) // 2]] if len(inside) else ids[:0]
        key = row["prompt_id"], row["thinking"], row["sample_index"]
        found[key] = tuple((reasoning.plain(kept) if swapped else kept).tolist())
    return found


def engine_settings(config: Config, folder: Path, tokenizer: Any, of: RolloutsOf) -> EngineSettings:
    """How rollouts run the policy in `folder`. A joint head that overlaps tokens is refused here."""
    if "joint" in read_manifest(folder):
        read_joint_head(folder)
    machine, sampling = config.runtime, GREEDY if of.greedy else config.rollouts.sampling
    return settings_for(
        folder, tokenizer, getattr(config, of.section), sampling, machine, machine.tensor_parallel,
        copies=of.thoughts != "banned",
    )  # fmt: skip


def run(context: Context) -> str:
    """Sample every response that is missing and write the table; the closing line."""
    config, of, target, params = context.config, context.variant, context.target, context.params
    policy, own = context.reads["policy"], getattr(config, of.section)
    prompts = PROMPTS.read(context.reads["prompts"]).slice(0, of.limit).to_pylist()
    read_manifest(policy)  # before the tokenizer: says how to build a checkpoint that is missing
    tokenizer = load_tokenizer(policy)
    wanted = [list(wanted_of(prompt, of, tokenizer, config.seed)) for prompt in prompts]
    check_fit({w.prompt_id: len(w.prompt) for group in wanted for w in group}, own, of.section)
    settings = engine_settings(config, policy, tokenizer, of)
    if of.before is not None and settings.reasoning is not None:
        given = begun(ROLLOUTS.read(context.reads["before"]), settings.reasoning, of.thoughts == "swapped")
        wanted = [[replace(w, begun=given[w.prompt_id, w.thinking, w.sample_index]) for w in group] for group in wanted]
    require_space(target.parent, sum(map(len, wanted)) * own.max_new_tokens * BYTES_PER_TOKEN)

    pieces = context.pieces(ROLLOUTS, cut(len(wanted), config.runtime.shard_prompts))
    parts = [(n, list(itertools.chain(*wanted[slice(*pieces.parts[n])]))) for n in pieces.missing()]
    job = Recording(pieces, config.rollouts.engine, settings, of.policy.name, own.max_new_tokens)
    share_out(f"rollouts {context.name}", job.run, parts, config.runtime.workers, settings.tensor_parallel)
    seen = Counter[str]()

    def count(table: pa.Table) -> pa.Table:
        seen["tokens"] += pc.sum(pc.list_value_length(table["response_token_ids"])).as_py()
        seen["finished"] += pc.sum(pc.equal(table["finish_reason"], FinishReason.STOP.value)).as_py()
        return table

    files = [policy / name for name in sorted([*TOKENIZER_FILES, "chat_template.jinja"])]
    digest = digest_json({file.name: digest_file(file) for file in files if file.exists()})
    metadata = {"sampling": json.dumps(params, sort_keys=True), "tokenizer": digest}
    rows = pieces.merge(target, metadata, count)
    context.write_manifest()
    pieces.remove()
    return f"wrote {rows} rollouts of {seen['tokens']} tokens, {seen['finished'] / rows:.1%} finished, to {target}"


if __name__ == "__main__":
    run_stage("rollouts", run)
