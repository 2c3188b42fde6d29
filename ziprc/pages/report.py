"""One self-contained page that says what was run and what came out, failures included.

Everything is made from the metrics, frontier.json, the manifests, the resolved configuration and the benchmark files; no
number is computed here. Adaptive sampling, for which the head is there, comes first (report_sampling.py). Styles are
inline, figures are inline SVG, text that a model or a user wrote is escaped, and nothing is fetched, so the file can be
mailed or archived.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ziprc.evaluation.head.metrics import MAIN
from ziprc.evaluation.outcomes import MOMENTS
from ziprc.pages import dag, figures
from ziprc.pages.html import REPORT_CSS, cards, esc, interval, number, panels, say, section, table
from ziprc.pages.inspect import InspectedRollout, length_labels
from ziprc.pages.samplers import sampling_findings, sampling_section
from ziprc.store.files import read_json

Record = Mapping[str, Any]

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


@dataclass(frozen=True)
class Cost:
    """What making one artifact took, as its provenance says: seconds of work, and memory of its largest process."""

    job: str
    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Page:
    """All that the report shows."""

    metrics: Record
    config: Record
    graph: dag.Parents
    costs: Sequence[Cost] = ()
    rollouts: Sequence[InspectedRollout] = field(default_factory=tuple)
    sampling: Record | None = None  # frontier.json
    live: Record = field(default_factory=dict)  # samples/<policy>.json by policy


def read_costs(folder: Path) -> list[Cost]:
    """The cost of every artifact whose provenance lies in `folder`."""
    records = [read_json(path) for path in sorted(folder.glob("*.json"))]
    return [
        Cost(
            f"{r['stage']} {r['name']}",
            r["seconds"],
            max(r["peak_memory_mib"][p] for p in ("process", "largest_child")),
        )
        for r in records
    ]


# --- findings --------------------------------------------------------------------------------------------------------


def negative_findings(metrics: Record, sampling: Record | None = None) -> list[str]:
    """What did not work, in sentences: missed targets, baselines that are not beaten, ideas that change nothing."""
    out = sampling_findings(sampling) if sampling else []
    for record in metrics["headline"]:
        found = record["result"]["value"]
        if record["met"] is None:
            out.append(f"{record['name']}: cannot be said, there are too few prompts, successes or failures.")
        elif not record["met"]:
            out.append(f"{record['name']}: {found:.3f}, wanted {record['direction']} {record['target']:g}.")
    for name, by_moment in metrics["difference"].items():
        for metric, label in (("auroc", "AUROC"), ("within_prompt_auroc", "AUROC within a prompt")):
            lost = [m for m in MOMENTS if m in by_moment and (by_moment[m][metric]["high"] or 0.0) < 0]
            tied = [m for m in MOMENTS if m in by_moment and _straddles(by_moment[m][metric])]
            if lost:
                out.append(f"{PREDICTORS.get(name, name)} beats the head in {label} at {', '.join(lost)}.")
            if tied and name != "constant":
                out.append(
                    f"{PREDICTORS.get(name, name)} cannot be told from the head in {label} at {', '.join(tied)}."
                )
    best = {cell["best_style"] for cell in metrics["base"]["cells"]} - {None}
    if len(best) == 1:
        out.append(f"One style ({next(iter(best))}) is best in every cell: a fixed rule would do as well as adapting.")
    return out


def _straddles(interval: Record) -> bool:
    return (
        interval["low"] is not None and interval["low"] <= 0 <= interval["high"] and interval["low"] != interval["high"]
    )


# --- sections --------------------------------------------------------------------------------------------------------


def _headline(metrics: Record) -> str:
    met = sum(bool(r["met"]) for r in metrics["headline"])
    text = (
        f"{met} of {len(metrics['headline'])} targets reached on {metrics['counts']['prompts']['test']:,} "
        "held-out prompts. "
        f"The targets belong to the toy scale. Small numbers are {metrics['confidence']:.0%} intervals, "
        "bootstrapped over "
        f"prompts ({metrics['replicates']:,} replicates)."
    )
    return section("What the head knows", say(text), cards(metrics["headline"]))


def _negative(page: Page) -> str:
    found = negative_findings(page.metrics, page.sampling)
    items = (
        "".join(f"<li>{esc(line)}</li>" for line in found) or "<li>Nothing that the checks of this page look for.</li>"
    )
    return section("What did not work, or cannot be told", f"<ul>{items}</ul>")


def _run(page: Page) -> str:
    counts = page.metrics["counts"]
    splits = counts["rollouts"]
    rows = [
        [esc(s), number(counts["prompts"][s], 0), number(splits[s], 0), number(counts["tokens_generated"][s], 0)]
        for s in splits
    ]
    trained = [f"{name} about {tokens:,} tokens" for name, tokens in counts["tokens_trained"].items()]
    if counts["base_tokens"]:
        trained.insert(0, f"base {counts['base_tokens']:,} tokens")
    lost = counts["without_score"]
    text = (
        f"Seed {page.config['seed']}. Trained: {', '.join(trained)}. "
        f"Cut-off test rollouts: {counts['unfinished_test']:.1%} "
        f"(score 0). Left out for want of a score: {lost['test']} test, {lost['train']} training rollouts."
    )
    settings = esc(json.dumps(page.config, indent=2, ensure_ascii=False))
    return section(
        "What was run",
        say(text),
        table(["split", "prompts", "rollouts", "tokens generated"], rows),
        f"<details><summary>Resolved configuration</summary><pre>{settings}</pre></details>",
        "<h3>Artifacts</h3>",
        say("Read from the manifests: what was made from what. Edges that a longer path implies are not drawn."),
        f'<div class="scroll">{dag.draw(page.graph)}</div>',
    )


def _ordered(prediction: Record) -> list[str]:
    return [*(name for name in PREDICTORS if name in prediction), *sorted(set(prediction) - set(PREDICTORS))]


def _prediction(metrics: Record) -> str:
    prediction = metrics["prediction"]
    lines = [
        figures.over_moments("auroc", "AUROC", prediction, list(MOMENTS)),
        figures.over_moments("within_prompt_auroc", "AUROC within prompt", prediction, list(MOMENTS)),
    ]
    tables = []
    for moment in MOMENTS:
        rows = [
            [
                esc(PREDICTORS.get(name, name)),
                *(interval(prediction[name][moment][metric]) for metric in REWARD_METRICS),
            ]
            for name in _ordered(prediction)
        ]
        grid = table(["predictor", *REWARD_METRICS.values()], rows)
        opened = " open" if moment in ("start", "end") else ""
        tables.append(f"<details{opened}><summary>{esc(moment)}</summary>{grid}</details>")
    text = (
        "Expected score against the score that the response then got. Moments are shares of the final length, "
        "which gives "
        "that length away to every predictor that knows how many tokens have passed; the line “length” shows how much "
        f"that is worth. At the end the head's mean over the last {metrics['last_k']} states is taken."
    )
    return section("Does it know when it is right?", say(text), panels(lines), *tables, _differences(metrics))


def _differences(metrics: Record) -> str:
    rows = [
        [esc(PREDICTORS.get(name, name)), *(interval(metrics["difference"][name][m]["auroc"]) for m in MOMENTS)]
        for name in _ordered(metrics["difference"])
    ]
    return table(["AUROC of the head minus …", *MOMENTS], rows, "Paired differences; above 0 the head is better.")


def _calibration(metrics: Record) -> str:
    prediction = metrics["prediction"][MAIN]
    curves = [figures.reliability(m, prediction[m]["reliability"], prediction[m]["ece"]) for m in MOMENTS]
    return section("Do its probabilities mean what they say?", panels(curves))


def _length(metrics: Record) -> str:
    parts = []
    for head, by_moment in metrics["length"].items():
        rows = [[esc(m), *(interval(by_moment[m][k], 2) for k in LENGTH_METRICS)] for m in MOMENTS]
        parts.append(table(["moment", *LENGTH_METRICS.values()], rows, PREDICTORS.get(head, head)))
    main = metrics["length"][MAIN]
    curves = [figures.remaining_length(m, main[m]["curve"], main[m]["mae_gain"]) for m in MOMENTS if m != "end"]
    text = (
        "Remaining tokens of finished responses, stop token included. Dots: medians of ten equally large groups by "
        "prediction; bars: 10 to 90 %. The best constant is the median of the training rollouts at that moment."
    )
    return section("Does it know how much is left?", say(text), panels(curves), *parts)


def _joint(metrics: Record) -> str:
    if not metrics["joint"]:
        return ""
    names = {
        "start_tv": "joint", "floor": "floor", "excess": "above the floor", "constant_tv": "constant joint",
        "reward_tv": "reward only", "length_tv": "length only",
    }  # fmt: skip
    rows = [[esc(PREDICTORS.get(h, h)), *(interval(r[k]) for k in names)] for h, r in metrics["joint"].items()]
    first = next(iter(metrics["joint"].values()))
    text = (
        f"Total variation between the joint predicted before the first token and the histogram of "
        f"{first['samples']:.0f} "
        f"rollouts, for {first['prompts']} prompts. The floor is what an exact prediction would get "
        "with that many rollouts."
    )
    return section("The joint against many rollouts", say(text), table(["head", *names.values()], rows))


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
    verdict = "cut off" if not rollout.finished else "right" if rollout.score >= 0.5 else "wrong"
    tag = "right" if verdict == "right" else "wrong"
    return (
        f'<figure class="strip"><figcaption><b>{esc(rollout.question)}</b> <span class="{tag}">{verdict}</span> '
        f"<small>{esc(rollout.difficulty)}, {rollout.length} tokens</small></figcaption>{figures.heat_strip(strip)}"
        f'<pre class="response">{esc("".join(rollout.tokens))}</pre></figure>'
    )


def _strips(rollouts: Sequence[InspectedRollout]) -> str:
    if not rollouts:
        return ""
    text = (
        "Above: probability of each score (line: expected score). Below: probability of each remaining length "
        "(line: what "
        "really remained). Time runs to the right, token by token."
    )
    return section("How the joint evolves", say(text), *(_strip(r, i) for i, r in enumerate(rollouts)))


def _policy(metrics: Record) -> str:
    drift, policy = metrics["drift"], metrics["policy"]
    rows = [
        [interval(policy["base"]), interval(policy["ziprc"]), interval(policy["difference"]), interval(drift["kl"], 5)]
    ]
    text = (
        f"pass@1 on the same {policy['prompts']:,} prompts before and after the head was trained, "
        "and the exact KL from the "
        f"base to the model with the head, outside the reserved rows, over {drift['states']:,} states of "
        f"{drift['rollouts']:,} "
        "test rollouts."
    )
    header = ["pass@1 before", "pass@1 after", "difference (paired)", "KL, nats per token"]
    return section("Is it still the same policy?", say(text), table(header, rows))


def _base(metrics: Record) -> str:
    base = metrics["base"]
    percentiles = " / ".join(number(v, 0) for v in base["length_percentiles"].values())
    k = base["samples_per_prompt"]
    header = [
        "pass@1", f"majority of {k:g}", f"any of {k:g} right", "finished", "mean length", "5 / 50 / 95 %",
        "longest ÷ shortest (median)",
    ]  # fmt: skip
    row = [interval(base[name]) for name in ("pass_at_1", "majority", "oracle", "finished")]
    row += [interval(base["mean_length"], 1), percentiles, number(base["length_ratio_within_prompt"]["median"], 2)]
    cells = [
        [
            esc(c["cell"]), number(c["prompts"], 0), interval(c["pass_at_1"]), number(c["majority"]),
            number(c["mean_length"], 1), f"<b>{esc(c['best_style'] or '–')}</b>", _styles(c["styles"]),
        ]
        for c in base["cells"]
    ]  # fmt: skip
    text = f"Prompts with both right and wrong responses: {base['prompts_with_both_outcomes']:.0%}."
    return section(
        "The base model on unseen prompts",
        say(text),
        table(header, [row]),
        table(["cell", "prompts", "pass@1", "majority", "length", "best fixed style", "styles: pass@1 (share)"], cells),
    )


def _styles(styles: Sequence[Record]) -> str:
    shown = (f"{esc(s['style'])} {number(s['pass_at_1']['value'], 2)} ({s['share']:.0%})" for s in styles)
    return "<br>".join(shown)


def _costs(costs: Sequence[Cost]) -> str:
    if not costs:
        return section("Costs", say("There is no provenance: the artifacts were not made by stages of this version."))
    longest = max(max(c.seconds for c in costs), 1e-9)
    rows = [
        [
            esc(c.job), f"{c.seconds:,.1f}", f"{c.peak_mib:,.0f}",
            f'<div class="bar" style="width:{100 * c.seconds / longest:.1f}%"></div>',
        ]
        for c in sorted(costs, key=lambda c: -c.seconds)
    ]  # fmt: skip
    text = (
        f"{sum(c.seconds for c in costs) / 60:,.1f} minutes of work in all, starting processes not counted; the largest "
        f"process took {max(c.peak_mib for c in costs):,.0f} MiB."
    )
    return section("Costs", say(text), table(["artifact", "seconds", "peak MiB", ""], rows))


QUESTION = (
    "How well does the model know, while it writes, whether it will be right and how much is left? "
    "And what is gained by deciding on that what to sample?"
)


def render(page: Page) -> str:
    """The whole page."""
    name = esc(page.metrics["experiment"])
    body = "".join(
        [
            f"<header><h1>{name}</h1>{say(QUESTION)}</header>",
            sampling_section(page.sampling, page.live),
            _headline(page.metrics),
            _negative(page),
            _prediction(page.metrics),
            _calibration(page.metrics),
            _length(page.metrics),
            _joint(page.metrics),
            _strips(page.rollouts),
            _policy(page.metrics),
            _base(page.metrics),
            _run(page),
            _costs(page.costs),
        ]
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name} · report</title><style>{REPORT_CSS}</style></head><body><main>{body}</main></body></html>\n"
    )
