"""The report's sections on ZIP-RC: sampling first, for which the head is there, then what the head knows and at what price.

Made from metrics/zip-rc.json, frontier.json and the live samples; no number is computed here. A baseline that is as good
as the head, or an idea that changes nothing, gets a sentence in the section on what did not work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ziprc.config.load import Config
from ziprc.evaluation.head.metrics import MAIN
from ziprc.evaluation.outcomes import MOMENTS
from ziprc.evaluation.samplers.decisions import live_record
from ziprc.pages import figures, samplers
from ziprc.pages.html import Record, Section, missed, side
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


def findings(metrics: Record, judged: bool) -> Iterator[str]:
    """What did not work, in sentences: missed targets where they are for this experiment, baselines that are not beaten."""
    if judged:
        yield from missed(metrics["headline"], "there are too few prompts, successes or failures")
    for name, by_moment in metrics["difference"].items():
        label = PREDICTORS.get(name, name)
        for metric, what in (("auroc", "AUROC"), ("within_prompt_auroc", "AUROC within a prompt")):
            gaps = {moment: by_moment[moment][metric] for moment in MOMENTS if moment in by_moment}
            if lost := [moment for moment, gap in gaps.items() if side(gap) < 0]:
                yield f"{label} beats the head in {what} at {', '.join(lost)}."
            tied = [moment for moment, gap in gaps.items() if side(gap) == 0 and gap["low"] != gap["high"]]
            if tied and name != "constant":
                yield f"{label} cannot be told from the head in {what} at {', '.join(tied)}."
    best = {cell["best_style"] for cell in metrics["base"]["cells"]} - {None}
    if len(best) == 1:
        yield f"One style ({best.pop()}) is best in every cell: a fixed rule would do as well as adapting."


def sections(config: Config, layout: Layout, reads: Mapping[str, Path]) -> list[Section]:
    """All sections in their order, from the files that the report reads.

    Wall-clock times of a live run, where they lie beside its table, are no artifact.
    """
    own, live = config.evaluate, {}
    for policy in config.samples.policies:
        samples = reads[f"samples/{policy}"]
        timing = samples.with_suffix(".timing.json")
        times = read_json(timing) if timing.exists() else {}
        live[policy] = live_record(SAMPLES.read(samples), times, own.bootstrap, own.confidence)
    rollouts = load_rollouts(layout, "ziprc", config.report.rollouts_shown) if config.report.rollouts_shown else []
    metrics, frontier = read_json(reads["metrics/zip-rc"]), read_json(reads["frontier"])
    return laid_out(metrics, frontier, live, rollouts, config.seed, own.targets)


def laid_out(
    metrics: Record, frontier: Record, live: Record, rollouts: Sequence[InspectedRollout], seed: int, judged: bool
) -> list[Section]:
    """The sections of records that have been read; `judged`: by the targets, which belong to the toy scale."""
    moments, prediction = list(MOMENTS), metrics["prediction"]
    main, left = prediction[MAIN], metrics["length"][MAIN]
    strips = [
        (rollout, figures.heat_strip(str(i), rollout.joint, rollout.remaining, length_labels(rollout.joint.grid)))
        for i, rollout in enumerate(rollouts)
    ]
    lines = {"auroc": "AUROC", "within_prompt_auroc": "AUROC within prompt"}
    along = [figures.over_moments(metric, title, prediction, moments) for metric, title in lines.items()]
    names = [*(name for name in PREDICTORS if name in prediction), *sorted(set(prediction) - set(PREDICTORS))]
    reliability = [figures.reliability(m, main[m]["reliability"], main[m]["ece"]) for m in moments]
    curves = [figures.remaining_length(m, left[m]["curve"], left[m]["mae_gain"]) for m in moments if m != "end"]
    failures = [*samplers.findings(frontier, judged), *findings(metrics, judged)]
    parts: dict[str, tuple[str, Record]] = {
        "What the head knows": ("zip_rc/headline", {"judged": judged}),
        "What did not work, or cannot be told": ("findings", {"findings": failures}),
        "Does it know when it is right?": ("zip_rc/prediction", {"figures": along, "names": names}),
        "Do its probabilities mean what they say?": ("zip_rc/calibration", {"figures": reliability}),
        "Does it know how much is left?": ("zip_rc/length", {"figures": curves}),
        "The joint against many rollouts": ("zip_rc/joint", {}),
        "How the joint evolves": ("zip_rc/strips", {"strips": strips}),
        "Is it still the same policy?": ("zip_rc/policy", {}),
        "The base model on unseen prompts": ("zip_rc/base", {}),
        "What was run": ("zip_rc/run", {"seed": seed}),
    }
    known = {**metrics, "labels": PREDICTORS, "moments": moments}
    if not metrics["joint"]:
        del parts["The joint against many rollouts"]
    if not strips:
        del parts["How the joint evolves"]
    found = [Section(title, f"{name}.html", known | data) for title, (name, data) in parts.items()]
    return [samplers.section(frontier, live, judged), *found]
