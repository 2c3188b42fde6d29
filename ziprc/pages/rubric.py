"""The report's sections on rubric reward models: what each reward made of the policy, and what graders are worth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ziprc.config.load import Config
from ziprc.pages import figures
from ziprc.pages.countdown_rl import seconds, short, spent, whole
from ziprc.pages.html import Record, Section, missed, side
from ziprc.rewards.base import RIGHT
from ziprc.store.files import read_json
from ziprc.store.layout import Layout
from ziprc.systems.rubric import tests
from ziprc.tables.grades import GRADES
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.rubrics import RUBRICS

QUESTION = "If a policy is rewarded for work that a grader can follow, do its right answers come with sound work?"
DRAWN = {
    "success": "Right answers",
    "verified": "Right answers with sound work",
    "unsound": "Unsound share of right answers",
    "suspected_hacking": "Wrong answers with a score above .8",
}
SHOWN_CHARACTERS = 600  # of a response or an assessment
TENTH = 10


def sections(config: Config, layout: Layout, reads: Mapping[str, Path]) -> list[Section]:
    """All sections in their order."""
    metrics, judged = read_json(reads["metrics/rubric"]), config.evaluate.targets
    rows = {short(name): of for name, of in metrics["policies"].items()}
    arms, rival = {name: of for name, of in rows.items() if name != "base"}, metrics["rivals"][-1]
    known = {
        **metrics, "judged": judged, "rows": rows, "rival": rival, "plain": short(rival), "figures": drawings(arms),
        "ks": [f"k = {k}" for k in rows["base"]["pass_at"]],
    }  # fmt: skip
    kinds = sorted({kind for of in rows.values() for kind in of["kinds"]})
    cells = {"rows": rows, "cells": rows["base"]["cells"], "kinds": kinds}
    cells["chances"] = {cell: chances(of["ways"]) for cell, of in rows["base"]["cells"].items()}
    asked = {name: of for name, of in arms.items() if total(of["series"]["asked"])}
    served = {name: questions(of, seconds(layout.seconds(f"online-{name}"))) for name, of in asked.items()}
    graders = {"graders": metrics["graders"], "asked": served}
    said = {"findings": [*findings(metrics, arms, judged, short(rival))]}
    return [
        Section("What rewards of the answer and of the work made of the policy", "rubric/arms.html", known),
        Section("Where short cuts pay, and where they do not", "rubric/cells.html", cells),
        Section("What graders are worth", "rubric/graders.html", graders),
        Section("Responses and their verdicts, item by item", "rubric/responses.html", {"shown": responses(config, reads)}),
        Section("Rubric rewards: what did not work, or cannot be told", "findings.html", said),
    ]  # fmt: skip


def chances(ways: Mapping[str, Record]) -> str:
    """What a policy's chances to be right are, by how it goes about it."""
    return ": the base is right in " + ", ".join(f"{percent_of(of)} of {kind}" for kind, of in ways.items())


def drawings(arms: Mapping[str, Record]) -> list[Any]:
    """What training did, rollout by rollout, in means of a tenth of it."""
    found = []
    for key, title in DRAWN.items():
        lines = {name: smooth(of["series"][key]) for name, of in arms.items()}
        lines = {name: y for name, y in lines.items() if any(v is not None for v in y)}
        if lines:
            across = {name: (list(range(1, len(y) + 1)), y) for name, y in lines.items()}
            found.append(figures.over_training(title, "rollout", across, list(arms)))
    return found


def smooth(values: list[float | None]) -> list[float | None]:
    """Running means over a tenth of the run; what is not known counts in none."""
    width = max(1, len(values) // TENTH)
    windows = [[v for v in values[max(0, i + 1 - width) : i + 1] if v is not None] for i in range(len(values))]
    return [float(np.mean(of)) if of else None for of in windows]


def total(counts: list[float | None]) -> float:
    """Of all rollouts; an arm without a rubric has no counts."""
    return sum(count or 0 for count in counts)


def questions(of: Record, times: list[Record]) -> Record:
    """How many questions an arm had for its grader, and how far its answers were from the program's."""
    series, tenth = of["series"], max(1, len(of["series"]["asked"]) // TENTH)
    asked, saved = total(series["asked"]), total(series["saved"])
    gaps = [
        [v for v in part if v is not None] for part in (series["grader_gap"][:tenth], series["grader_gap"][-tenth:])
    ]
    known = {"seconds": times}
    every, own = whole(known), spent(known, "seconds_rubric")
    return {
        "asked": asked, "saved": saved / asked, "unscored": total(series["unscored"]), "unreadable": total(series["unreadable"]),
        "first": float(np.mean(gaps[0])) if gaps[0] else None, "last": float(np.mean(gaps[1])) if gaps[1] else None,
        "time": own / every if every else None,
    }  # fmt: skip


def responses(config: Config, reads: Mapping[str, Path]) -> list[Record]:
    """The first response of every policy to some test prompts, with the teacher's words."""
    prompts = PROMPTS.read(reads["prompts/test"]).slice(0, config.report.rollouts_shown).to_pylist()
    criteria = {row["prompt_id"]: row["text"] for row in RUBRICS.read(reads["rubrics/test"]).to_pylist()}
    answers: dict[str, dict[str, Record]] = {row["prompt_id"]: {} for row in prompts}
    for name, test in tests(config).items():
        right, said = (
            {row["rollout_id"]: row for row in GRADES.read(reads[f"{stage}/{test}"]).to_pylist()}
            for stage in ("grades", "assessments")
        )
        for row in ROLLOUTS.read(reads[f"rollouts/{test}"]).to_pylist():
            if row["sample_index"] == 0 and row["prompt_id"] in answers:
                verdict, word = right[row["rollout_id"]], said[row["rollout_id"]]
                answers[row["prompt_id"]][short(name)] = {
                    "text": row["response_text"][:SHOWN_CHARACTERS], "assessment": (word["rationale"] or
                    "none")[:SHOWN_CHARACTERS], "score": word["score"], "right": (verdict["score"] or 0) >= RIGHT, "sound":
                    word["score"] == 1,
                }  # fmt: skip
    return [
        {
            "question": row["messages"][-1]["content"], "reference": row["answer"], "criteria": criteria[row["prompt_id"]],
            "answers": answers[row["prompt_id"]],
        }
        for row in prompts
    ]  # fmt: skip


def findings(metrics: Record, arms: Mapping[str, Record], judged: bool, plain: str) -> Iterator[str]:
    """Missed gates, what outcome rewards did to the work, holes of setups, and what makes the numbers suspect."""
    if judged:
        yield from missed(metrics["headline"], "there was nothing to compare")
    base = metrics["policies"]["base"]
    for name, of in arms.items():
        change = of["difference"]["base"]["unsound"]
        if of["setup"] == "outcome":
            said = {1: "raised", -1: "lowered", 0: "did not clearly change"}[side(change)]
            yield f"The outcome reward of {name} {said} the unsound share of right answers."
        elif side(change) >= 0:
            yield f"{name} did not lower the unsound share of right answers, though its reward looks at the work."
        if of["setup"] == "addon":
            yield f"{name} pays full marks for every right answer, whatever its work: {percent_of(of['unsound'])} are unsound."
    gaps = {name: of["difference"].get(f"online-{plain}") for name, of in arms.items() if name != plain}
    if tied := [name for name, gap in gaps.items() if gap is not None and side(gap["verified"]) <= 0]:
        yield f"In verified accuracy {', '.join(tied)} cannot be told from {plain}, or is worse."
    for name, of in metrics["graders"].items():
        if of["mae"]["value"] is not None and of["mae"]["value"] >= (of["constant_mae"]["value"] or 0):
            yield f"{name} is no nearer to the teacher than a constant."
        if (of["parsed"]["value"] or 0) < 1:
            yield f"{name} wrote {percent_of(of['parsed'])} readable totals; the others count in no distance."
    for name, of in arms.items():
        if of["training"]["seen"] > 1:
            yield f"{name} has seen every training prompt {of['training']['seen']:.1f} times: what it gained may be memory."
        if lost := total(of["series"]["unscored"]):
            yield f"{lost} responses of {name} had no score from the server, and were left out of their groups."
    if (base["unassessed"] or 0) > 0:
        yield f"{base['unassessed']} finished responses of the base have no word of the teacher and count as unsound."


def percent_of(interval: Record) -> str:
    return "–" if interval["value"] is None else f"{100 * interval['value']:.0f}%"
