"""The report's sections on ZIP-RC: sampling first, for which the head is there, then what the head knows and at what price.

Made from metrics/zip-rc.json, frontier.json and the live samples; no number is computed here. A baseline that is as good
as the head, or an idea that changes nothing, gets a sentence in the section on what did not work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from ziprc.config.load import Config
from ziprc.config.shared import Evaluate
from ziprc.evaluation.head.metrics import MAIN
from ziprc.evaluation.outcomes import MOMENTS
from ziprc.evaluation.samplers.decisions import live_record
from ziprc.pages import figures, samplers
from ziprc.pages.html import Record, Section
from ziprc.pages.inspect import InspectedRollout, length_labels, load_rollouts
from ziprc.store.files import read_json
from ziprc.store.layout import Layout
from ziprc.tables.samples import SAMPLES

QUESTION = (
    "How well does the model know, while it writes, whether it will be right and how much is left? "
    "And what is gained by deciding on that what to sample?"
)
PREDICTORS = {
    "ziprc": "ZIP-RC head",
    "lite": "ZIP-RC lite (only the reserved rows trained)",
    "probe": "probe on frozen hidden states",
    "logprob": "logistic on log-probabilities so far",
    "length": "logistic on elapsed tokens",
    "constant": "constant (mean training score)",
}
REWARD_METRICS = {
    "auroc": "AUROC",
    "within_prompt_auroc": "AUROC within prompt",
    "f1": "F1",
    "accuracy": "accuracy at ½",
    "recall_of_failures": "recall of failures",
    "brier": "Brier",
    "ece": "ECE",
}
LENGTH_METRICS = {
    "bin_accuracy": "bin right",
    "majority_bin_share": "commonest bin",
    "median_mae": "MAE of median",
    "constant_mae": "MAE of best constant",
    "mae_gain": "gain",
    "coverage_80": "coverage of 80 % interval",
}
JOINT_METRICS = {
    "start_tv": "joint",
    "floor": "floor",
    "excess": "above the floor",
    "constant_tv": "constant joint",
    "reward_tv": "reward only",
    "length_tv": "length only",
}


def findings(metrics: Record, judged: bool) -> Iterator[str]:
    """What did not work, in sentences: missed targets where they are for this experiment, baselines that are not beaten."""
    for row in metrics["headline"] if judged else ():
        if row["met"] is None:
            yield f"{row['name']}: cannot be said, there are too few prompts, successes or failures."
        elif not row["met"]:
            yield f"{row['name']}: {row['result']['value']:.3f}, wanted {row['direction']} {row['target']:g}."
    for name, by_moment in metrics["difference"].items():
        label = PREDICTORS.get(name, name)
        for metric, what in (("auroc", "AUROC"), ("within_prompt_auroc", "AUROC within a prompt")):
            gaps = {moment: by_moment[moment][metric] for moment in MOMENTS if moment in by_moment}
            if lost := [moment for moment, gap in gaps.items() if (gap["high"] or 0.0) < 0]:
                yield f"{label} beats the head in {what} at {', '.join(lost)}."
            tied = [moment for moment, gap in gaps.items() if _straddles(gap)]
            if tied and name != "constant":
                yield f"{label} cannot be told from the head in {what} at {', '.join(tied)}."
    best = {cell["best_style"] for cell in metrics["base"]["cells"]} - {None}
    if len(best) == 1:
        yield f"One style ({best.pop()}) is best in every cell: a fixed rule would do as well as adapting."


def _straddles(gap: Record) -> bool:
    low, high = gap["low"], gap["high"]
    return low is not None and low <= 0 <= high and low != high


def _strip(rollout: InspectedRollout, index: int) -> str:
    grid = rollout.joint.grid
    strip = figures.Strip(
        name=str(index),
        reward=rollout.joint.reward_marginal(),
        length=rollout.joint.length_marginal(),
        expected_reward=rollout.joint.expected_reward(),
        reward_labels=[f"{c:g}" for c in np.round(grid.reward_centres, 2)],
        length_labels=length_labels(grid),
        real_length_bin=grid.length_bin(rollout.remaining),
    )
    return figures.heat_strip(strip)


def _prediction(metrics: Record) -> Record:
    prediction, moments = metrics["prediction"], list(MOMENTS)
    names = [*(name for name in PREDICTORS if name in prediction), *sorted(set(prediction) - set(PREDICTORS))]
    lines = {"auroc": "AUROC", "within_prompt_auroc": "AUROC within prompt"}
    return {
        "figures": [figures.over_moments(metric, title, prediction, moments) for metric, title in lines.items()],
        "predictors": [(name, PREDICTORS.get(name, name)) for name in names],
        "prediction": prediction,
        "difference": metrics["difference"],
        "columns": REWARD_METRICS,
        "moments": moments,
        "last_k": metrics["last_k"],
    }


def _length(metrics: Record) -> Record:
    main = metrics["length"][MAIN]
    curves = [figures.remaining_length(m, main[m]["curve"], main[m]["mae_gain"]) for m in MOMENTS if m != "end"]
    shown = {"length": metrics["length"], "columns": LENGTH_METRICS, "labels": PREDICTORS, "moments": list(MOMENTS)}
    return {"figures": curves, **shown}


def _live(samples: Path, own: Evaluate) -> Record:
    """What a live run showed, by budget; its wall-clock times, where they lie beside the table, are no artifact."""
    timing = samples.with_suffix(".timing.json")
    times = read_json(timing) if timing.exists() else {}
    return live_record(SAMPLES.read(samples), times, own.bootstrap, own.confidence)


def sections(config: Config, layout: Layout, reads: Mapping[str, Path]) -> list[Section]:
    """All sections in their order, from the files that the report reads."""
    shown = config.report.rollouts_shown
    live = {policy: _live(reads[f"samples/{policy}"], config.evaluate) for policy in config.samples.policies}
    rollouts = load_rollouts(layout, "ziprc", shown) if shown else []
    metrics, frontier = read_json(reads["metrics/zip-rc"]), read_json(reads["frontier"])
    return laid_out(metrics, frontier, live, rollouts, config.seed, config.evaluate.targets)


def laid_out(
    metrics: Record, frontier: Record, live: Record, rollouts: Sequence[InspectedRollout], seed: int, judged: bool
) -> list[Section]:
    """The sections of records that have been read; `judged`: by the targets, which belong to the toy scale."""
    failures = [*samplers.findings(frontier, judged), *findings(metrics, judged)]
    main = metrics["prediction"][MAIN]
    reliability = [figures.reliability(m, main[m]["reliability"], main[m]["ece"]) for m in MOMENTS]
    strips = [(rollout, _strip(rollout, i)) for i, rollout in enumerate(rollouts)]
    joint = {"joint": metrics["joint"], "columns": JOINT_METRICS, "labels": PREDICTORS}
    parts: Mapping[str, tuple[str, Record]] = {
        "What the head knows": ("headline", _headline(metrics, judged)),
        "What did not work, or cannot be told": ("findings", {"findings": failures}),
        "Does it know when it is right?": ("prediction", _prediction(metrics)),
        "Do its probabilities mean what they say?": ("calibration", {"figures": reliability}),
        "Does it know how much is left?": ("length", _length(metrics)),
        "The joint against many rollouts": ("joint", joint if metrics["joint"] else {}),
        "How the joint evolves": ("strips", {"strips": strips} if strips else {}),
        "Is it still the same policy?": ("policy", {"policy": metrics["policy"], "drift": metrics["drift"]}),
        "The base model on unseen prompts": ("base", {"base": metrics["base"]}),
        "What was run": ("run", {"counts": metrics["counts"], "seed": seed}),
    }
    return [samplers.section(frontier, live, judged)] + [
        Section(title, f"zip_rc/{name}.html", data) for title, (name, data) in parts.items() if data
    ]


def _headline(metrics: Record, judged: bool) -> Record:
    known = {key: metrics[key] for key in ("confidence", "replicates")}
    return {"rows": metrics["headline"], "prompts": metrics["counts"]["prompts"]["test"], "judged": judged, **known}
