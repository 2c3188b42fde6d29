"""The record of metrics/reasoning-vocabulary.json: what copies of the vocabulary were used for, and what they were worth.

    policies  {base | online-<arm>: {accuracy, tokens, finished, thought, difference: {rival: …}, training, copies, tests}}
    copies    {share, quarters, used, violations, most_used, most_moved, series: {copies_share: [by rollout], …}}
    tests     {banned | kept | swapped: {accuracy, tokens}, effect: {banned, swapped}}

`thought` is the mean length of the thinking block. `effect` of `banned` is accuracy with copies banned minus as it is; that of
`swapped` is accuracy after half of the thought with sources in place of its copies, minus after the same half as it was: 0
means that the copies say nothing that their sources do not. All are on the same test prompts with the same seeds, paired over
prompts; rivals are the base and the arm without copies. The record says nothing about other seeds of training.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ziprc.config.load import Config
from ziprc.evaluation.answered import Answered, answered
from ziprc.evaluation.bootstrap import rounded, target_record
from ziprc.evaluation.rl.record import training
from ziprc.joint.reasoning import ReasoningVocabulary, read_reasoning
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.systems.online import trained
from ziprc.systems.reasoning_vocabulary import TESTS, with_copies
from ziprc.tables.progress import PROGRESS
from ziprc.tables.prompts import PROMPTS
from ziprc.training.vocabulary import Use

COMPARED = ("accuracy", "tokens", "finished")
SERIES = ("copies_share", "drift_mean", "copy_kl", "logit_gap", "entropy_inside", "entropy_outside", "held_out")
NAMED = 8  # tokens that are named in a list


def rivals(config: Config) -> list[str]:
    """What every arm is compared with: the base, and the first arm that starts from it."""
    plain = [name for name in trained(config) if config.train_online.arms[name.removeprefix("online-")].start == "base"]
    return ["base", *plain[:1]]


def thoughts(table: pa.Table, reasoning: ReasoningVocabulary) -> list[int]:
    """Tokens in the thinking block of every response."""
    rows = zip(table["prompt_token_ids"].to_pylist(), table["response_token_ids"].to_pylist(), strict=True)
    return [int(reasoning.inside([reasoning.at_end(prompt)], np.asarray(ids)[None]).sum()) for prompt, ids in rows]


def copies(
    table: pa.Table, reasoning: ReasoningVocabulary, folder: Path, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """How the test responses use copies, and what became of the rows in training."""
    tokenizer, use = load_tokenizer(folder), Use(reasoning)
    responses = table["response_token_ids"].to_pylist()
    use.see(table["prompt_token_ids"].to_pylist(), responses)
    found, last = use.row(), rows[-1]
    counts = Counter(i for ids in responses for i in np.asarray(ids)[reasoning.is_copy(ids)].tolist())
    total = sum(counts.values())
    return {
        "rows": reasoning.size, "share": rounded(found["copies_share"] or 0.0),
        "quarters": json.loads(found["copies_by_quarter"]),
        "used": found["copies_used"], "violations": found["violations"] + sum(row["violations"] or 0 for row in rows),
        "most_used": [[tokenizer.decode([i]), rounded(n / total)] for i, n in counts.most_common(NAMED)],
        "most_moved": [[tokenizer.decode([i]), rounded(far)] for i, far in json.loads(last["most_moved"])[:NAMED]],
        "drift": {key: rounded(last[f"drift_{key}"]) for key in ("mean", "max", "input")},
    }  # fmt: skip


def tested(own: Answered, others: Mapping[str, Answered], confidence: float) -> dict[str, Any]:
    """What happens when copies are banned, or put back half way."""
    found: dict[str, Any] = {
        name: {key: of.found[key].interval(confidence) for key in ("accuracy", "tokens")} for name, of in others.items()
    }
    effect = {
        "banned": others["banned"].found["accuracy"] - own.found["accuracy"],
        "swapped": others["swapped"].found["accuracy"] - others["kept"].found["accuracy"],
    }
    return found | {"effect": {name: of.interval(confidence) for name, of in effect.items()}}


def metrics(config: Config, reads: Mapping[str, Path]) -> dict[str, Any]:
    """The whole record, from tables and checkpoints by role."""
    own, seed = config.evaluate, config.seed
    prompts = PROMPTS.read(reads["prompts/test"])["prompt_id"].to_pylist()
    seen_prompts = PROMPTS.read(reads["prompts/train"]).num_rows
    arms, copied = list(trained(config)), with_copies(config)

    def seen_in(test: str) -> Answered:
        return answered(reads, test, prompts, own.bootstrap, seed)

    seen = {"base": seen_in("test")} | {name: seen_in(f"test-{name}") for name in arms}
    known = {name: read_reasoning(reads[name]) for name in copied}
    tags = next(iter(known.values()), None)  # arms share a tokenizer
    policies: dict[str, Any] = {}
    for name, one in seen.items():
        policies[name] = {key: one.found[key].interval(own.confidence) for key in COMPARED}
        policies[name] |= {"ungraded": one.outcomes.ungraded, "rollouts": one.rollouts.num_rows, "thought": None}
        if tags is not None:
            policies[name]["thought"] = rounded(float(np.mean(thoughts(one.rollouts, tags))))
        if name == "base":
            continue
        arm = config.train_online.arms[name.removeprefix("online-")]
        rows = PROGRESS.read(reads[name] / "progress.parquet").to_pylist()
        done = [row for row in rows if row["rollout"]]
        policies[name] |= {
            "start": arm.start, "copies_rate": arm.copies_rate,
            "difference": {
                rival: {key: (one.found[key] - seen[rival].found[key]).interval(own.confidence) for key in COMPARED}
                for rival in rivals(config)
                if rival != name
            },
            "training": training(rows, seen_prompts, own.bootstrap, seed, own.confidence),
            "series": {key: [row[key] for row in (rows if key == "held_out" else done)] for key in SERIES},
        }  # fmt: skip
        reasoning = known.get(name)
        if reasoning is not None:
            others = {what: seen_in(f"test-{name}-{what}") for what in TESTS}
            policies[name] |= {
                "copies": copies(one.rollouts, reasoning, reads[name], done),
                "tests": tested(one, others, own.confidence),
            }
    record = {
        "confidence": own.confidence, "replicates": own.bootstrap, "policies": policies,
        "counts": {"prompts": {"test": len(prompts), "train": seen_prompts}},
    }  # fmt: skip
    return record | {"headline": headline(policies)}


def headline(policies: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What must hold of every arm with copies, and what its copies were worth."""
    rows = []
    for name, of in ((name.removeprefix("online-"), of) for name, of in policies.items() if "copies" in of):
        outside, carried = of["copies"]["violations"], of["tests"]["effect"]["swapped"]
        rows.append(target_record(f"copies outside the thinking block, arm {name}", 0, outside, False))
        rows.append(target_record(f"accuracy when copies are put back half way, arm {name}", 0.0, carried, False))
    return rows
