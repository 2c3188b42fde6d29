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

CHOICES = {
    "mean": "any of them, on average",
    "majority": "the commonest answer",
    "oracle": "a right one, where there is one",
    "critic": "the highest value at the end, after {} graded siblings",
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
    failures = [*findings(metrics, judged), *policy_findings(metrics["policies"]), *guided_findings(metrics["guided"])]
    counts = metrics["counts"]
    chosen = [
        (CHOICES[name.partition("/")[0]].format(name.partition("/")[2]), of) for name, of in metrics["choosing"].items()
    ]
    samples = counts["rollouts"]["test"] / counts["prompts"]["test"]
    found = [
        Section("What the critic learns in context", "icl_v/curve.html", known | {"figures": lines}),
        Section("The critic as a judge of answers", "icl_v/choosing.html", {"rows": chosen, "samples": samples}),
    ]
    if policies := metrics["policies"]:
        asked = {"prompts": metrics["asked"], "samples": policies["base"]["rollouts"] / metrics["asked"]}
        asked["ungraded"] = sum(record["ungraded"] for record in policies.values())
        shown_as = {"policies": policy_rows(policies), "labels": metrics["labels"], "confidence": metrics["confidence"]}
        found.append(Section("Policies made of the labels", "icl_v/policies.html", asked | shown_as))
    if guided := metrics["guided"]:
        found.append(Section("Guided decoding", "icl_v/guided.html", {"guided": guided}))
    return [*found, Section("ICL-V: what did not work, or cannot be told", "findings.html", {"findings": failures})]


def policy_rows(policies: Record) -> dict[str, Record]:
    """The rows of the table of policies, by what they are called; `rft` is the first student trained so."""
    plain = next((name for name, record in policies.items() if record.get("method") == "rft"), None)
    rows = {}
    for name, record in policies.items():
        gaps = record.get("difference", {})
        between = {"base": gaps.get("base", {}).get("accuracy"), "rft": gaps.get(plain, {}).get("accuracy")}
        missing = {"method": None, "labels": "", "kl": None, "rate": f"{record['learning_rate']:.2g}" if gaps else ""}
        learned = {"labels": ""} if record.get("method") == "rft" else {}  # from scores alone, whatever labels it has
        rows[name.removeprefix("policy-")] = {**missing, **record, **between, **learned}
    return rows


def policy_findings(policies: Record) -> Iterator[str]:
    """Students that do not beat the base, and those of labels that do not beat fine-tuning on right responses."""
    rows = policy_rows(policies)
    learned = {name: row for name, row in rows.items() if row["base"]}
    for rival, said in (("base", "the base"), ("rft", "fine-tuning on right responses (rft)")):
        gaps = {name: side(row[rival]) for name, row in learned.items() if row[rival]}
        if lost := [name for name, gap in gaps.items() if gap < 0]:
            yield f"In accuracy {said} beats {', '.join(lost)}."
        if tied := [name for name, gap in gaps.items() if gap == 0]:
            yield f"In accuracy {', '.join(tied)} cannot be told from {said}."


def guided_findings(guided: Record) -> Iterator[str]:
    """Modes that gain nothing, or lose."""
    for key, what in (("accuracy", "accuracy"), ("majority", "accuracy of the vote")):
        gaps = {name: side(record["difference"][key]) for name, record in guided.items()}
        if lost := [name for name, gap in gaps.items() if gap < 0]:
            yield f"Guidance lowers the {what}: {', '.join(lost)}."
        if tied := [name for name, gap in gaps.items() if gap == 0]:
            yield f"Guidance cannot be told from none in {what}: {', '.join(tied)}."
