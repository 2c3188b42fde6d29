"""The first section of the report: what adaptive sampling buys, from frontier.json and the records of live runs.

Numbers are selected here and laid out in `templates/zip_rc/sampling.html`, never computed. Parts of the record that are
missing leave out their part of the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ziprc.pages import figures
from ziprc.pages.figures import accuracy_at, best_rivals, in_order, point_at, rivals
from ziprc.pages.html import Record, Section, missed, number, percent, side, signed
from ziprc.sampling.families import PLUS, PUBLISHED

MAJORITY = "majority"
OURS = (PLUS, PUBLISHED)
PARALLEL = f"{PLUS}: four at a time"
NARROW = ("2", "4", "8")  # budgets of the tables that show several numbers for each
MIDDLE = 4.0  # the budget by which families are ordered, and whose reliability is drawn
PARTS = ("prompts", "difference", "ablations", "cells", "answer")  # of the record, by name; they may be missing

# What each ablation takes away, and what that means.
# fmt: off
ABLATIONS = {
    f"{PLUS}: head alone": ("the token log-probabilities", "The score of a branch is read from the joint alone."),
    f"{PLUS}: log-probs alone": ("the head", "The score of a branch is read from its tokens' statistics alone."),
    f"{PLUS}: no latent difficulty": ("the latent difficulty", "A failed sample says nothing about the next one of its prompt."),
    f"{PLUS}: threshold instead of utility": ("the utility", "One whole sample after the other until the probability of the answer reaches a threshold."),  # noqa: E501
    f"{PLUS}: whole samples": ("decisions on the way", "It decides only when a sample has ended; none is paused or left behind."),
    f"{PLUS}: no pause": ("pausing", "A branch that is not continued is dropped for good instead of waiting."),
    f"{PLUS}: no vote": ("the vote", "The sample with the best score is the answer, whatever the others say."),
    PARALLEL: ("taking one branch at a time", "Four branches of a prompt may run at once: faster, with less choice."),
    f"{PUBLISHED}: marginals": ("the joint", "Reward and remaining length are taken as independent: the two marginals only."),
    f"{PUBLISHED}: no horizon": ("horizons", "A set of samples is worth what it is worth when all of them run to the end."),
    f"{PUBLISHED}: own horizons": ("the shared horizon (each sample has its own instead)", "Each sample of a set has its own horizon."),  # noqa: E501
    f"{PUBLISHED}: no pause": ("pausing", "A sample that is not continued is dropped for good instead of waiting."),
    f"{PUBLISHED}: smoothed": ("the latest joint (the last ones are averaged instead)", "The joint is averaged over the last readings."),  # noqa: E501
    f"{PUBLISHED}: calibrated": ("the raw joint (it is calibrated instead)", "Two numbers fitted on validation correct the joint."),  # noqa: E501
    f"{PUBLISHED}: uncalibrated": ("the calibration", "The joint is read as the head gives it."),
}
# fmt: on


def _complete(record: Record) -> Record:
    """The record in order, with empty parts where parts are missing; ablations that the table does not know come last."""
    full = {"headline": [], **{part: {} for part in PARTS}, **in_order(record)}
    order = sorted(full["ablations"], key=lambda name: [*ABLATIONS, name].index(name))
    return full | {"ablations": {name: full["ablations"][name] for name in order}}


def _shown(record: Record) -> list[str]:
    """Budgets for the tables that have little room: 2, 4 and 8, or what there is."""
    return [k for k in NARROW if k in record["budgets"]] or list(record["budgets"])[:3]


def _middle(budgets: Mapping[str, Any]) -> str:
    """The budget nearest to four samples."""
    return min(budgets, key=lambda k: abs(float(k) - MIDDLE))


def findings(record: Record, judged: bool) -> list[str]:
    """What did not work, in sentences: missed targets, competitors that are not beaten, ideas that change nothing."""
    record = _complete(record)
    said = missed(record["headline"], "the budgets or prompts for it are missing") if judged else ()
    return [*(f"Sampling, {line}" for line in said), *_unbeaten(record), *_idle(record)]


def _unbeaten(record: Record) -> Iterator[str]:
    """Families with the same verdict at the same budgets share a sentence; then whether one waits longer than for a vote."""
    for wanted, verdict in ((-1, f"better than {PLUS}"), (0, f"not to be told from {PLUS}")):
        groups: dict[str, list[str]] = {}
        for name in record["families"]:
            budgets = [k for k, gaps in record["difference"].items() if name in gaps and side(gaps[name]) == wanted]
            if budgets:
                groups.setdefault(", ".join(budgets), []).append(name)
        for budgets_text, names in groups.items():
            yield f"With tokens for {budgets_text} samples, {verdict}: {', '.join(names)}."
    pairs = [(k, point_at(record, PLUS, k), point_at(record, MAJORITY, k)) for k in _shown(record)]
    longer = [
        f"{number(a['latency'], 0)} serial steps against {number(b['latency'], 0)} with tokens for {k} samples"
        for k, a, b in pairs
        if a and b and a["latency"] > b["latency"]
    ]
    if longer:
        yield f"{PLUS} makes one wait longer than majority: {'; '.join(longer)}."


def _idle(record: Record) -> Iterator[str]:
    """Ideas without which the policy is no worse."""
    for name, ablation in record["ablations"].items():
        sides = {k: side(gap) for k, gap in ablation["difference"].items()}
        policy, _, short = name.partition(": ")
        what = ABLATIONS.get(name, (f"what “{short}” leaves out", ""))[0]
        better = [k for k, sign in sides.items() if sign > 0]
        if better:
            yield f"{policy}: taking away {what} makes it better with tokens for {', '.join(better)} samples."
        elif sides and not any(sides.values()):
            yield f"{policy}: taking away {what} changes nothing that can be told at any budget."


def _ends(interval: Record, form: Callable[[float], str]) -> str:
    return "" if interval["low"] is None else f" [{form(interval['low'])}, {form(interval['high'])}]"


def _sentences(record: Record) -> Iterator[str]:
    """How the shipped policy does at some budgets, beside the vote and the best competitor."""
    best = best_rivals(record)
    for budget in _shown(record):
        point = point_at(record, PLUS, budget)
        if point is None:
            continue
        tokens, result = f"{record['budgets'][budget]:,.0f}", point["accuracy"]
        said = f"At {budget} samples' worth of tokens ({tokens} per prompt) {PLUS} answers "
        said += f"{percent(result['value'])} %{_ends(result, percent)} right"
        if (vote := accuracy_at(record, MAJORITY, budget)) is not None:
            said += f", majority {percent(vote)} %"
        if name := best.get(budget):
            count = sum(accuracy_at(record, other, budget) is not None for other in rivals(record))
            said += f", the best of {count} competitors ({name}) {percent(accuracy_at(record, name, budget))} %"
            if gap := record["difference"].get(budget, {}).get(name):
                said += f"; paired difference {signed(gap['value'])} points{_ends(gap, signed)}"
        yield said + "."


def _accuracies(record: Record) -> dict[str, list[float | None]]:
    """By family, accuracy at each budget: by falling accuracy at the middle budget; ours first among equals, what cannot
    keep to it last."""
    budgets, middle = record["budgets"], _middle(record["budgets"])

    def place(name: str) -> tuple[bool, float, bool]:
        found = accuracy_at(record, name, middle)
        return found is None, -(found or 0.0), name not in OURS

    names = sorted(record["families"], key=place)
    return {name: [accuracy_at(record, name, k) for k in budgets] for name in names}


def _costs(record: Record) -> list[tuple[str, str, Record]]:
    """What the same budget means in other units: (budget, family, point)."""
    every = {"families": {**record["families"], **record["ablations"]}}
    names = (PLUS, PARALLEL, PUBLISHED, MAJORITY)
    return [(k, name, point) for k in _shown(record) for name in names if (point := point_at(every, name, k))]


def _cells(record: Record) -> Record:
    """What is spent on prompts of each difficulty, and what it brings; empty where that is not known."""
    cells = record["cells"]
    budgets = [k for k in _shown(record) if any(k in cell for cell in cells.values())]
    pairs = [(k, name) for k in budgets for name in (PLUS, MAJORITY)]
    rows = [(n, cell["prompts"], [cell.get(k, {}).get(name) for k, name in pairs]) for n, cell in cells.items()]
    return {"columns": [f"{name}, {k}" for k, name in pairs], "rows": rows} if pairs else {}


def section(record: Record, live: Record, judged: bool) -> Section:
    """All of it: `record` is frontier.json, `live` the records of live runs by policy and budget."""
    record, live = _complete(record), in_order(live)
    budgets, accuracies, difference = record["budgets"], _accuracies(record), record["difference"]
    compared = [name for name in accuracies if any(name in gaps for gaps in difference.values())]
    data = {
        "record": record,
        "judged": judged,
        "ours": OURS,
        "figure": figures.frontier(record),
        "sentences": list(_sentences(record)),
        "columns": [f"{k} ({tokens:,.0f})" for k, tokens in budgets.items()],
        "middle": _middle(budgets),
        "accuracies": accuracies,
        "best": [
            max((a for a in column if a is not None), default=None) for column in zip(*accuracies.values(), strict=True)
        ],
        "differences": {name: [difference.get(k, {}).get(name) for k in budgets] for name in compared},
        "costs": _costs(record),
        "ablations": [
            (name, ABLATIONS.get(name, ("", ""))[1], [ablation["difference"].get(k) for k in budgets])
            for name, ablation in record["ablations"].items()
        ],
        "cells": _cells(record),
        "answers": {k: answer for k, answer in record["answer"].items() if answer},
        "runs": [(policy, budget, run) for policy, runs in live.items() for budget, run in runs.items()],
    }
    if known := data["answers"]:  # reliability of the probability given with the answer
        middle = _middle(known)
        curve, ece = known[middle]["reliability"], known[middle]["ece"]
        data["reliability"] = figures.reliability(f"{middle} samples", curve, ece)
        data["answer_columns"] = [f"{k} samples" for k in known]
    return Section("Adaptive sampling", "zip_rc/sampling.html", data)
