"""The report's sections on ICL-V: does the critic learn in context, and more than its context says without a network?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ziprc.config.load import Config
from ziprc.evaluation.outcomes import MOMENTS
from ziprc.pages import figures
from ziprc.pages.html import Record, Section, missed, side
from ziprc.store.files import read_json
from ziprc.store.layout import Layout

QUESTION = (
    "Does a critic that has read graded rollouts of a prompt know better, token by token, whether the next is right?"
)
PREDICTORS = {
    "critic": "critic in context",
    "mean": "sibling mean (no network)",
    "lookup": "answer lookup (no network)",
    "trie": "prefix trie (no network)",
    "permuted": "critic, siblings' scores permuted",
    "alone": "critic without siblings",
}


def findings(metrics: Record, judged: bool) -> Iterator[str]:
    """Missed gates where they are for this experiment, and rivals that the critic does not beat with all siblings read."""
    if judged:
        yield from missed(metrics["headline"], "there are too few prompts, successes or failures")
    last = str(metrics["pack_rollouts"] - 1)
    what_of = {"log_loss": "log-loss", "brier": "Brier score", "within_prompt_auroc": "AUROC within a prompt"}
    for (metric, what), name in zip(what_of.items(), ("alone", "mean", "trie"), strict=True):
        sign = 1 if metric == "within_prompt_auroc" else -1
        gaps = {moment: sign * side(metrics["difference"][name][moment][last][metric]) for moment in MOMENTS}
        if lost := [moment for moment, gap in gaps.items() if gap < 0]:
            yield f"The {PREDICTORS[name]} beats the critic in {what} at {', '.join(lost)}."
        if tied := [moment for moment, gap in gaps.items() if gap == 0]:
            yield f"The {PREDICTORS[name]} cannot be told from the critic in {what} at {', '.join(tied)}."


def sections(config: Config, layout: Layout, reads: Mapping[str, Path]) -> list[Section]:
    """All sections in their order."""
    metrics, judged = read_json(reads["metrics/icl-v"]), config.evaluate.targets
    curve, shown = metrics["curve"], ("start", "75%", "end")
    lines = [figures.over_siblings("brier", f"Brier score at the {shown[0]}", curve, "start")]
    lines += [figures.over_siblings("within_prompt_auroc", f"AUROC within prompt, {m}", curve, m) for m in shown[1:]]
    known = {**metrics, "labels": PREDICTORS, "moments": list(MOMENTS), "judged": judged}
    failures = list(findings(metrics, judged))
    return [
        Section("What the critic learns in context", "icl_v/curve.html", known | {"figures": lines}),
        Section("ICL-V: what did not work, or cannot be told", "findings.html", {"findings": failures}),
    ]
