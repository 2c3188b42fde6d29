"""The report's sections on a reasoning vocabulary: what policies with copies learned, and what the copies carry."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ziprc.config.load import Config
from ziprc.joint.reasoning import ReasoningVocabulary, read_reasoning
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.pages import figures
from ziprc.pages.countdown_rl import short
from ziprc.pages.html import Record, Section, side
from ziprc.store.files import read_json
from ziprc.store.layout import Layout
from ziprc.systems.reasoning_vocabulary import with_copies
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS, FinishReason

QUESTION = "If a model may think in a second copy of its vocabulary, does the copy come to mean anything?"
DRAWN = {
    "copies_share": "Copies, as a share of thoughts",
    "drift_mean": "Distance of copies from their sources",
    "copy_kl": "Nats between the laws after a copy and its source",
    "entropy_inside": "Entropy in the thinking block, nats a token",
}
SHOWN_TOKENS = 240  # of a response


def sections(config: Config, layout: Layout, reads: Mapping[str, Path]) -> list[Section]:
    """All sections in their order."""
    metrics = read_json(reads["metrics/reasoning-vocabulary"])
    arms = {short(name): of for name, of in metrics["policies"].items() if name != "base"}
    copied = {name: of for name, of in arms.items() if "copies" in of}
    plain = next((short(rival) for of in arms.values() for rival in of["difference"] if rival != "base"), None)
    rows = {short(name): of for name, of in metrics["policies"].items()}
    said = {"findings": [*findings(arms, plain)]}
    known = {**metrics, "rows": rows, "plain": plain, "figures": drawings(arms)}
    return [
        Section("What a reasoning vocabulary was worth", "reasoning_vocabulary/arms.html", known),
        Section("What became of the copies", "reasoning_vocabulary/copies.html", {"arms": copied}),
        Section("Thoughts whose copies are marked", "reasoning_vocabulary/thoughts.html", {"shown": marked(config, reads)}),
        Section("A reasoning vocabulary: what did not work, or cannot be told", "findings.html", said),
    ]  # fmt: skip


def drawings(arms: Mapping[str, Record]) -> list[Any]:
    """Accuracy of judgements, and what became of copies, rollout by rollout."""
    judged = {n: of["training"]["curve"] for n, of in arms.items() if of["training"]["curve"]}
    found = []
    if judged:
        lines = {n: ([p["rollout"] for p in of], [p["held_out"] for p in of]) for n, of in judged.items()}
        found.append(figures.over_training("Accuracy on validation prompts", "rollout", lines, list(arms)))
    for key, title in DRAWN.items():
        series = {n: of["series"][key] for n, of in arms.items() if "copies" in of}
        if series:
            across = {n: (list(range(1, len(y) + 1)), y) for n, y in series.items()}
            found.append(figures.over_training(title, "rollout", across, list(arms)))
    return found


def marked(config: Config, reads: Mapping[str, Path]) -> list[Record]:
    """The first response of every policy with copies to some test prompts, in stretches that are copies or are not."""
    prompts = PROMPTS.read(reads["prompts/test"]).slice(0, config.report.rollouts_shown).to_pylist()
    answers: dict[str, dict[str, list[Record]]] = {row["prompt_id"]: {} for row in prompts}
    for name in with_copies(config):
        reasoning, tokenizer = read_reasoning(reads[name]), load_tokenizer(reads[name])
        assert reasoning is not None, f"{name} has copies"
        for row in ROLLOUTS.read(reads[f"rollouts/test-{name}"]).to_pylist():
            if row["sample_index"] == 0 and row["prompt_id"] in answers:
                ended = row["finish_reason"] == FinishReason.STOP.value  # its last token is the end
                ids = (row["response_token_ids"][:-1] if ended else row["response_token_ids"])[:SHOWN_TOKENS]
                answers[row["prompt_id"]][short(name)] = stretches(ids, reasoning, tokenizer)
    return [{"question": row["messages"][-1]["content"], "answers": answers[row["prompt_id"]]} for row in prompts]


def stretches(ids: list[int], reasoning: ReasoningVocabulary, tokenizer: Any) -> list[Record]:
    """Runs of tokens that are copies or are not, as text."""
    runs = itertools.groupby(ids, key=lambda i: bool(reasoning.is_copy(i)))
    return [{"is_copy": copy, "text": tokenizer.decode(list(run))} for copy, run in runs]


def findings(arms: Mapping[str, Record], plain: str | None) -> Iterator[str]:
    """What is claimed of copies, and what is not; without the swap and the frozen copies nothing would be."""
    copied = {name: of for name, of in arms.items() if "copies" in of}
    if outside := {name: of["copies"]["violations"] for name, of in copied.items() if of["copies"]["violations"]}:
        yield f"Copies were sampled outside the thinking block: {outside}. The numbers of these arms mean nothing."
    moved = {name: side(of["tests"]["effect"]["swapped"]) for name, of in copied.items()}
    if carried := [name for name, way in moved.items() if way < 0]:
        yield (
            f"Putting the copies of half a thought back into ordinary tokens costs accuracy in {', '.join(carried)}: there they "
            "carry something that their sources do not."
        )
    if nothing := [name for name, way in moved.items() if way == 0]:
        yield (
            f"In {', '.join(nothing)} putting copies back into ordinary tokens changes nothing that could be told: that the "
            "copies carry anything is not shown."
        )
    if plain is not None:
        gaps = {
            name: side(of["difference"][f"online-{plain}"]["accuracy"]) for name, of in arms.items() if name != plain
        }
        if tied := [name for name, gap in gaps.items() if gap == 0]:
            yield f"In accuracy {', '.join(tied)} cannot be told from {plain}, which has no copies."
        if lost := [name for name, gap in gaps.items() if gap < 0]:
            yield f"In accuracy {plain}, which has no copies, beats {', '.join(lost)}."
    frozen = [name for name, of in copied.items() if of["copies_rate"] == 0]
    if not frozen:
        yield "There is no arm whose copies are frozen: what copies do by adding entropy alone is not known."
    for name, of in arms.items():
        if of["training"]["seen"] > 1:
            yield f"{name} has seen every training prompt {of['training']['seen']:.1f} times: what it gained may be memory."
