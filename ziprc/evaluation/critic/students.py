"""What became of the policies: students without context on held-out prompts, beside the base, and the labels they learned from.

    policies    {base | student: {accuracy, majority, tokens, finished, kl, difference: {rival: {accuracy, majority, tokens}}, …}}
    asked       held-out prompts that the policies answered
    labels      {table: {rollouts, states, candidates, siblings, choice, gap, spread}}

All are asked the same prompts with the same seeds, and all differences are paired over prompts; rivals are the base and every
student by `rft`, the simplest way. `kl` is KL(student ‖ base) in nats a response, summed over the student's own tokens. `gap`
is how far the value of a state is from the mean of its candidates' under the reference, `spread` how far these lie apart,
both over the states where there is a choice, whose share `choice` is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ziprc.config.load import Config
from ziprc.evaluation.answered import answered
from ziprc.evaluation.bootstrap import Resampling, rounded
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.joint.vocabulary import derive_layout
from ziprc.reading.logits import kl_drift
from ziprc.reading.states import load_for_reading, token_pairs
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.qvalues import QVALUES

KL_ROLLOUTS = 2  # of every prompt, on which the KL is taken
COMPARED = ("accuracy", "majority", "tokens")


def policy_record(config: Config, reads: Mapping[str, Path]) -> dict[str, Any]:
    """The record `policies`."""
    own, prompts = config.evaluate, PROMPTS.read(reads["prompts/test"])["prompt_id"].to_pylist()
    students = {f"policy-{name}": of for name, of in config.train_policy.students.items()}
    seen = {
        name: answered(
            reads, f"test-{name}" if name in students else "test", prompts, own.bootstrap, config.seed,
            config.rollouts.student_samples,
        )
        for name in ("base", *students)
    }  # fmt: skip
    rivals = ["base", *(name for name, of in students.items() if of.method == "rft")]
    tokenizer, base = load_tokenizer(reads["base"]), load_for_reading(reads["base"])
    rows = base.get_output_embeddings().weight.shape[0]
    text = derive_layout(tokenizer, rows, 0).text_size
    layout = derive_layout(tokenizer, rows, rows - text)  # what is no text is left out, as it is never sampled
    record: dict[str, Any] = {}
    for name, one in seen.items():
        record[name] = {key: estimate.interval(own.confidence) for key, estimate in one.found.items()}
        record[name] |= {"ungraded": one.outcomes.ungraded, "rollouts": one.rollouts.num_rows}
        if name == "base":
            continue
        few = one.rollouts.filter(pc.less(one.rollouts["sample_index"], KL_ROLLOUTS))
        student = load_for_reading(reads[name])
        budget, chunk = config.runtime.forward_tokens, config.runtime.position_chunk
        kl = kl_drift(student, base, layout, token_pairs(few), budget, chunk)
        group = np.unique(few["prompt_id"].to_pylist(), return_inverse=True)[1]
        record[name] |= {
            "kl": Resampling(group, own.bootstrap, config.seed).ratio(kl).interval(own.confidence),
            "method": students[name].method, "labels": students[name].labels, "learning_rate": students[name].learning_rate,
            "difference": {
                rival: {key: (one.found[key] - seen[rival].found[key]).interval(own.confidence) for key in COMPARED}
                for rival in rivals if rival != name
            },
        }  # fmt: skip
    return record


def label_record(table: pa.Table) -> dict[str, Any]:
    """What one table of labels says about itself."""
    flat = {name: pc.list_flatten(table[name]).to_numpy() for name in ("offsets", "log_prob", "q", "values")}
    starts = np.cumsum(pc.list_value_length(table["values"]).to_numpy())[:-1]
    counts = np.concatenate([np.diff(of) for of in np.split(flat["offsets"], starts)])
    values = np.concatenate([of[:-1] for of in np.split(flat["values"], starts)])
    first = np.cumsum(counts) - counts
    mass = np.exp(flat["log_prob"].astype(np.float64))

    def by_state(of: NDArray[np.float64], how: Any = np.add) -> NDArray[np.float64]:
        out: NDArray[np.float64] = how.reduceat(of, first)
        return out

    mean = by_state(mass * flat["q"]) / by_state(mass)
    spread = by_state(flat["q"], np.maximum) - by_state(flat["q"], np.minimum)
    choice = counts > 1
    return {
        "rollouts": table.num_rows, "states": len(counts), "candidates": len(flat["q"]),
        "siblings": rounded(pc.mean(table["siblings"]).as_py()), "choice": rounded(choice.mean()),
        "gap": rounded(np.abs(values - mean)[choice].mean()) if choice.any() else None,
        "spread": rounded(spread[choice].mean()) if choice.any() else None,
    }  # fmt: skip


def students_record(config: Config, reads: Mapping[str, Path]) -> dict[str, Any]:
    """The records `policies` and `labels`; empty where the experiment trains no student."""
    if not config.train_policy.students:
        return {"policies": {}, "labels": {}, "asked": 0}
    tables = {role.partition("/")[2]: QVALUES.read(path) for role, path in reads.items() if role.startswith("qvalues/")}
    return {
        "policies": policy_record(config, reads), "asked": PROMPTS.read(reads["prompts/test"]).num_rows,
        "labels": {name: label_record(table) for name, table in tables.items()},
    }  # fmt: skip
