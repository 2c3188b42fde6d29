"""samples: adaptive sampling live on the engine, at some token budgets, every decision written down.

The settings are those that `frontier` chose for the budget on validation prompts. The stage is named after the policy:
`zip-rc-plus`, `zip-rc-plus-branching` (the same, and it may branch), `zip-rc-plus-wide` (four branches at a time), `zip-rc`
or `majority`. Answers are graded as those of recorded rollouts are, once the engine has made room for a judge. The table
follows from its inputs alone; wall-clock times go into `<policy>.timing.json` beside it, which is no artifact.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from typing import Any

from ziprc.engines.base import Engine
from ziprc.errors import UserError
from ziprc.evaluation.samplers.decisions import decision_table, ungraded_answers, with_grades
from ziprc.joint.head import read_joint_head
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.grading import VERDICTS, check_gradable, grade_answers, parts_of
from ziprc.sampling.families import Setting, live_setting
from ziprc.sampling.fitting import read_fitted
from ziprc.sampling.live.bench import budget_of, open_engine, play, questions_of
from ziprc.sampling.live.records import Question
from ziprc.stages.context import Context, run_stage
from ziprc.store.files import read_json, write_json
from ziprc.tables.pieces import Pieces, cut
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.samples import SAMPLES

FLIGHTS_PER_PIECE = 4  # prompts of a piece, in those that are in flight: a batch drains once per piece


def make_piece(
    context: Context,
    engine: Engine,
    tokenizer: Any,
    pieces: Pieces,
    number: int,
    questions: list[Question],
    setting: Setting,
) -> None:
    """Answer some prompts at one budget, all together and, where asked for, the first few one by one as well."""
    budget, start, stop = pieces.parts[number]
    own, title = context.config.samples, f"samples {context.name} at {budget}"
    run = play(engine, context.config, tokenizer, questions[start:stop], setting, own.in_flight, title)
    failed = [answer.error for answer in run.answers if answer.error]
    for error in failed:
        print(f"samples: {error}", file=sys.stderr)
    if len(failed) == len(run.answers):
        raise UserError(f"Not one prompt was answered. The first error: {failed[0]}")
    times = {"together": asdict(run.timing)}
    if own.one_at_a_time and start == 0:
        few = questions[: own.one_at_a_time]
        alone = play(engine, context.config, tokenizer, few, setting, 1, f"{title}, one by one")
        times["one_by_one"] = asdict(alone.timing)
    pieces.write(number, decision_table(run.answers, run.texts, setting, budget), {"times": json.dumps(times)})


def times_of(pieces: Pieces, alone: int) -> dict[str, Any]:
    """Wall-clock times by budget, summed over the pieces of each."""
    times: dict[str, dict[str, Any]] = {}
    for number, (budget, *_) in enumerate(pieces.parts):
        for how, spent in json.loads(pieces.metadata(number)["times"]).items():
            own = times.setdefault(budget, {"alone": alone})
            own[how] = {what: own.get(how, {}).get(what, 0) + value for what, value in spent.items()}
    return times


def run(context: Context) -> str:
    """Answer test prompts by a live policy and write every decision; the closing line."""
    config, name, target, reads = context.config, context.name, context.target, context.reads
    folder = reads["checkpoint"]
    fitted, frontier = read_fitted(folder, read_joint_head(folder).grid), read_json(reads["frontier"])
    budgets = config.samples.majority_budgets if name == "majority" else config.samples.budgets
    settings = {f"{budget:g}": live_setting(name, budget, frontier, fitted) for budget in budgets}
    for setting in settings.values():
        budget_of(config, setting)
    prompts = {p["prompt_id"]: p for p in PROMPTS.read(reads["prompts"]).slice(0, config.samples.prompts).to_pylist()}
    check_gradable(config, prompts, reads["prompts"])
    tokenizer = load_tokenizer(folder)
    questions = questions_of(list(prompts.values()), tokenizer, config)
    ranges = cut(len(questions), FLIGHTS_PER_PIECE * config.samples.in_flight)
    pieces = context.pieces(SAMPLES, [(budget, *part) for budget in settings for part in ranges])
    if missing := pieces.missing():
        with open_engine(config, folder, tokenizer) as engine:
            for number in missing:
                make_piece(context, engine, tokenizer, pieces, number, questions, settings[pieces.parts[number][0]])
    answers = {answer for table in pieces.groups() for answer in ungraded_answers(table)}
    grading = replace(pieces, folder=pieces.folder / "grades", schema=VERDICTS, parts=parts_of(answers))
    verdicts = grade_answers(config, prompts, grading)
    rows = pieces.merge(target, change=lambda table: with_grades(table, verdicts))
    write_json(target.with_suffix(".timing.json"), times_of(pieces, config.samples.one_at_a_time))
    context.write_manifest()
    pieces.remove()
    return f"answered {len(questions)} prompts at {len(settings)} budgets, {rows} rows, wrote {target}"


if __name__ == "__main__":
    run_stage("samples", run)
