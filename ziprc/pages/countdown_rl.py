"""The report's sections on on-policy training with windows: what the policy learned, for which tokens, and why windows moved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ziprc.config.load import Config
from ziprc.pages import figures
from ziprc.pages.html import Record, Section, missed, side
from ziprc.store.files import read_json
from ziprc.store.layout import Layout
from ziprc.systems.online import trained
from ziprc.tables.grades import GRADES
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS

QUESTION = (
    "Does a policy that is rewarded for right answers learn as much when its responses are cut where answers end?"
)
SHOWN_CHARACTERS = 400  # of a response
PARTS = ("generate", "score", "grade", "push")  # of a rollout, whose seconds are shown


def sections(config: Config, layout: Layout, reads: Mapping[str, Path]) -> list[Section]:
    """All sections in their order."""
    metrics, judged = read_json(reads["metrics/countdown-rl"]), config.evaluate.targets
    arms = {
        short(name): {**of["training"], "seconds": seconds(layout.seconds(name))}
        for name, of in metrics["policies"].items()
        if name != "base"
    }
    failures = [*findings(metrics, judged, config.runtime.mismatch)]
    rows = {short(name): {**of, "seconds": whole(arms.get(short(name)))} for name, of in metrics["policies"].items()}
    known = {**metrics, "judged": judged, "rows": rows}
    times = {name: {part: spent(of, f"seconds_{part}") for part in PARTS} for name, of in arms.items()}
    known["equal"] = {short(name): of for name, of in metrics["equal_tokens"].items()}
    return [
        Section("What on-policy training was worth", "countdown_rl/arms.html", known | {"figures": learning(arms)}),
        Section("How the windows moved", "countdown_rl/windows.html", {"arms": arms, "figures": windows(arms), "spent": times}),
        Section("The same prompts before and after", "countdown_rl/responses.html", {"shown": responses(config, reads)}),
        Section("On-policy training: what did not work, or cannot be told", "findings.html", {"findings": failures}),
    ]  # fmt: skip


def short(name: str) -> str:
    """`online-fixed` → `fixed`."""
    return name.removeprefix("online-")


def seconds(path: Path) -> list[Record]:
    """What every rollout took, by part and, as `total`, since the beginning without judgements; [] where that is unknown."""
    if not path.exists():
        return []
    total, found = 0.0, []
    for row in read_json(path)["rollouts"]:
        total += row["seconds"] - row["seconds_judge"] if row["rollout"] else 0.0
        found.append({**row, "total": total})
    return found


def whole(of: Record | None) -> float | None:
    """Seconds of training without judgements; None for the base, and where times are unknown."""
    return of["seconds"][-1]["total"] if of and of["seconds"] else None


def spent(of: Record, part: str) -> float | None:
    """Seconds of a part of training over all rollouts; None where times are unknown."""
    return sum(row[part] for row in of["seconds"] if row["rollout"]) if of["seconds"] else None


def learning(arms: Mapping[str, Record]) -> list[Any]:
    """Held-out accuracy against tokens and against seconds."""
    judged = {name: of for name, of in arms.items() if of["curve"]}
    timed = {
        name: {row["rollout"]: row["total"] for row in of["seconds"]} for name, of in judged.items() if of["seconds"]
    }
    across = {
        "tokens sampled for training": {
            name: [point["tokens"] for point in of["curve"]] for name, of in judged.items()
        },
        "seconds of training": {
            name: [at[point["rollout"]] for point in judged[name]["curve"]] for name, at in timed.items()
        },
    }
    return [
        figures.over_training(
            "Accuracy on validation prompts", what,
            {name: (x, [point["held_out"] for point in judged[name]["curve"]]) for name, x in lines.items()},
        )
        for what, lines in across.items()
        if lines
    ]  # fmt: skip


def windows(arms: Mapping[str, Record]) -> list[Any]:
    """Window, lengths of right answers and share of cut responses, rollout by rollout."""
    drawn = {
        "windows": "Window in tokens",
        "right_length": "Right answers: 95 % are shorter",
        "truncated": "Share cut by the window",
    }
    return [
        figures.over_training(
            title, "rollout", {name: (list(range(1, of["rollouts"] + 1)), of[key]) for name, of in arms.items()}
        )
        for key, title in drawn.items()
    ]


def responses(config: Config, reads: Mapping[str, Path]) -> list[Record]:
    """The first response of the base and of every arm to some test prompts."""
    prompts = PROMPTS.read(reads["prompts/test"]).slice(0, config.report.rollouts_shown).to_pylist()
    tests = {"base": "test"} | {short(name): f"test-{name}" for name in trained(config)}
    first = {name: _first(reads, test, [row["prompt_id"] for row in prompts]) for name, test in tests.items()}
    return [
        {
            "question": row["messages"][-1]["content"],
            "answers": {name: of[row["prompt_id"]] for name, of in first.items()},
        }
        for row in prompts
    ]


def _first(reads: Mapping[str, Path], test: str, prompts: list[str]) -> dict[str, Record]:
    rollouts, grades = ROLLOUTS.read(reads[f"rollouts/{test}"]), GRADES.read(reads[f"grades/{test}"])
    wanted = rollouts.filter(
        pc.and_(
            pc.equal(rollouts["sample_index"], 0), pc.is_in(rollouts["prompt_id"], pa.array(prompts, pa.large_string()))
        )
    )
    score = dict(zip(grades["rollout_id"].to_pylist(), grades["score"].to_pylist(), strict=True))
    return {
        row["prompt_id"]: {
            "text": row["response_text"][:SHOWN_CHARACTERS] + (" …" if len(row["response_text"]) > SHOWN_CHARACTERS else ""),
            "tokens": len(row["response_token_ids"]), "finish": row["finish_reason"], "right": score[row["rollout_id"]] == 1,
        }
        for row in wanted.to_pylist()
    }  # fmt: skip


def findings(metrics: Record, judged: bool, mismatch: float) -> Iterator[str]:
    """Missed gates, arms that do not beat the base or the fixed window, and what would make the numbers suspect."""
    if judged:
        yield from missed(metrics["headline"], "there was no judgement to compare")
    arms = {name: of for name, of in metrics["policies"].items() if name != "base"}
    for rival, said in (("base", "the base"), ("online-fixed", "the largest window")):
        gaps = {
            short(n): side(of["difference"][rival]["accuracy"]) for n, of in arms.items() if rival in of["difference"]
        }
        if lost := [name for name, gap in gaps.items() if gap < 0]:
            yield f"In accuracy on test prompts {said} beats {', '.join(lost)}."
        if tied := [name for name, gap in gaps.items() if gap == 0]:
            yield f"In accuracy on test prompts {', '.join(tied)} cannot be told from {said}."
    for name, of in ((short(name), of["training"]) for name, of in arms.items()):
        if of["seen"] > 1:
            yield f"{name} has seen every training prompt {of['seen']:.1f} times: what it gained may be memory."
        if of["ungraded"]:
            yield f"{of['ungraded']} responses of {name} could not be graded and were left out of their groups."
        if (of["mismatch"] or 0) > mismatch:
            yield f"The sampler of {name} differed from its trainer by up to {of['mismatch']:.2g} nats a token."
