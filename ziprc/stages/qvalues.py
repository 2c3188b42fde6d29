"""qvalues: what every plausible next token of a training rollout is worth, `train` to the critic, `train-trie` to a table.

Plausible is what the reference finds at least `min_p` times as likely as the likeliest token. A rollout is labelled by the
critic that never saw its prompt (`train_critic.folds`), in packs of its siblings; `train-trie` needs no network but the
reference: the mean score of the siblings that begin alike. Rollouts without a sibling, or without room in a pack, have no
labels, and are counted.
"""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ziprc.errors import UserError
from ziprc.evaluation.critic.labels import Labels, critic_labels, trie_labels
from ziprc.evaluation.critic.siblings import Prior
from ziprc.joint.readout import TokenPair
from ziprc.joint.reasoning import text_rows
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.progress import progress
from ziprc.reading.logits import Candidates, candidates
from ziprc.reading.states import JointReader, load_for_reading, ranges
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.manifest import manifest_digests
from ziprc.tables.grades import GRADES
from ziprc.tables.qvalues import QVALUES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.data import prompt_fold
from ziprc.training.packs import Graded, by_prompt_of, graded_rollouts, pack_kind, require_kind

PIECE_TOKENS = 1 << 16  # response tokens of a piece: with their joints some 10 MB


def wanted_prompts(rollouts: Sequence[Graded], context: Context) -> dict[str, list[int]]:
    """The rollouts of every prompt that is labelled; UserError when there is none."""
    own, folds = context.config.qvalues, context.config.train_critic.folds
    found = by_prompt_of(rollouts)
    why = {
        "with one rollout": 0,
        "in folds without a critic": 0,
        "too often right or wrong": 0,
        "beyond qvalues.prompts": 0,
    }
    kept: dict[str, list[int]] = {}
    for prompt, numbers in found.items():
        rate = float(np.mean([rollouts[i].score > 0.5 for i in numbers]))
        if len(numbers) < 2:
            why["with one rollout"] += 1
        elif own.folds is not None and prompt_fold(prompt, folds) >= own.folds:
            why["in folds without a critic"] += 1
        elif not own.min_correct_rate <= rate <= 1 - own.min_incorrect_rate:
            why["too often right or wrong"] += 1
        elif own.prompts is not None and len(kept) >= own.prompts:
            why["beyond qvalues.prompts"] += 1
        else:
            kept[prompt] = numbers
    left_out = ", ".join(f"{count} {reason}" for reason, count in why.items() if count) or "none"
    if not kept:
        raise UserError(
            f"No prompt is left to label: of {len(found)}, left out: {left_out}. Lower qvalues.min_correct_rate or "
            "min_incorrect_rate, or sample more (rollouts.thinking_samples)."
        )
    print(f"{context.name}: {len(kept)} prompts are labelled; left out: {left_out}", file=sys.stderr)
    return kept


def rows_of(rollouts: Sequence[Graded], number: int, of: Candidates, labels: Labels, source: str) -> dict[str, object]:
    """A row of the table."""
    return {
        "rollout_id": rollouts[number].rollout_id, "source": source, "siblings": labels.siblings,
        "offsets": of.offsets.astype(np.int32), "ids": of.ids.astype(np.int32), "log_prob": np.minimum(of.log_prob, 0),
        "q": labels.q, "cells": labels.cells.ravel(), "values": labels.values,
    }  # fmt: skip


def run(context: Context) -> str:
    """Label every plausible token of the rollouts and write the table; the closing line."""
    config, reads = context.config, context.reads
    own, critic, runtime = config.qvalues, config.train_critic, config.runtime
    seed = derived_seed(config.seed, "qvalues", context.name)
    grades = GRADES.read(reads["grades"])
    rollouts, ungraded = graded_rollouts(ROLLOUTS.read(reads["rollouts"]), grades, str(reads["grades"]))
    prompts = wanted_prompts(rollouts, context)
    tokenizer, reference = load_tokenizer(reads["base"]), load_for_reading(reads["base"])
    text = text_rows(tokenizer, reference)
    readers = {role: JointReader.open(path) for role, path in reads.items() if role.startswith("critic")}
    for role in readers:
        require_kind(reads[role], pack_kind(critic, tokenizer))
    prior = Prior.fitted([r.prompt_id for r in rollouts], [r.score > 0.5 for r in rollouts])
    min_p = own.min_p if own.candidates else math.inf

    def labelled(part: Sequence[str]) -> pa.Table:
        """Rows of these prompts."""
        chosen = [rollouts[i] for prompt in part for i in prompts[prompt]]
        pairs = [TokenPair(r.prompt, r.response) for r in chosen]
        plausible = candidates(reference, text, pairs, runtime.forward_tokens, runtime.position_chunk, min_p)
        rows: dict[int, dict[str, object]] = {}
        for source in readers or ["trie"]:
            mine = {
                i: of
                for i, of in enumerate(plausible)
                if len(readers) < 2 or source == f"critic-fold{prompt_fold(chosen[i].prompt_id, critic.folds)}"
            }
            if source == "trie":
                found = trie_labels(chosen, mine, prior)
            else:
                found = critic_labels(readers[source], tokenizer, chosen, mine, critic, seed, runtime.forward_tokens)
            rows |= {i: rows_of(chosen, i, mine[i], labels, source) for i, labels in found}
        return QVALUES.make([rows[i] for i in sorted(rows)])

    names = list(prompts)
    tokens = np.array([sum(len(rollouts[i].response) for i in numbers) for numbers in prompts.values()])
    pieces = context.pieces(QVALUES, ranges(tokens, PIECE_TOKENS))
    missing = {number: names[slice(*pieces.parts[number])] for number in pieces.missing()}
    with progress(sum(map(len, missing.values())), f"qvalues {context.name}", "prompts") as bar:
        for number, part in missing.items():
            pieces.write(number, labelled(part))
            bar.update(len(part))
    grids = [reader.joint.grid.to_dict() for reader in readers.values()]
    said = {
        "kind": "candidates" if own.candidates else "taken", "min_p": own.min_p, "grid": grids[0] if grids else None,
        "pack": pack_kind(critic, tokenizer) if readers else None, "parents": manifest_digests(reads),
    }  # fmt: skip
    count = Counter[str]()

    def tally(table: pa.Table) -> pa.Table:
        count["candidates"] += pc.sum(pc.list_value_length(table["ids"])).as_py()
        count["states"] += pc.sum(pc.list_value_length(table["values"])).as_py() - table.num_rows
        count["siblings"] += pc.sum(table["siblings"]).as_py()
        return table

    written = pieces.merge(
        context.target, {name: json.dumps(value, sort_keys=True) for name, value in said.items()}, tally
    )
    context.write_manifest()
    pieces.remove()
    without = sum(map(len, prompts.values())) - written
    return (
        f"wrote {count['candidates']} values of {count['states']} states of {written} rollouts, after "
        f"{count['siblings'] / written:.1f} siblings, to {context.target}; without labels: {ungraded} ungraded, {without} "
        "that do not fit"
    )


if __name__ == "__main__":
    run_stage("qvalues", run)
