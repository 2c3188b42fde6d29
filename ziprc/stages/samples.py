"""samples: adaptive sampling live on the engine, at some token budgets, every decision written down.

The settings are those that `frontier` chose for the budget on validation prompts. The stage is named after the policy:
`zip-rc-plus`, `zip-rc-plus-branching` (the same, and it may branch), `zip-rc-plus-wide` (four branches at a time), `zip-rc`
or `majority`. The table follows from its inputs alone; wall-clock times go into `<policy>.timing.json` beside it, which is
no artifact.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from ziprc.chat import visible_answer
from ziprc.config.load import Config
from ziprc.config.zip_rc import LIVE_POLICIES
from ziprc.engines.base import Engine
from ziprc.errors import UserError, nearest
from ziprc.evaluation.samplers.decisions import Asked, decision_table
from ziprc.joint.head import read_joint_head
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.progress import progress
from ziprc.rewards.base import Question as Graded
from ziprc.sampling.controller import Controller
from ziprc.sampling.families import Setting, live_setting
from ziprc.sampling.fitting import Fitted, read_fitted
from ziprc.sampling.live.bench import AnswerBook, budget_of, open_engine, questions_of
from ziprc.sampling.live.records import Answered, Question, Timing
from ziprc.sampling.live.runner import Runner
from ziprc.stages.context import Context, run_stage
from ziprc.stages.grades import rule_grader
from ziprc.store.files import read_json, write_json
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import FinishReason
from ziprc.tables.samples import SAMPLES
from ziprc.tasks.base import get_task

Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """Answers in the order of the questions, and where the time went."""

    answers: list[Answered]
    timing: Timing


@dataclass(frozen=True)
class Bench:
    """The open engine and what is asked of it."""

    engine: Engine
    questions: Sequence[Question]
    prompts: Sequence[Row]
    config: Config
    tokenizer: Any

    def book(self) -> AnswerBook:
        return AnswerBook(get_task(self.config.prompts.task), self.tokenizer, self.engine.settings.stop_token_ids)

    def play(self, setting: Setting, count: int, in_flight: int, title: str, book: AnswerBook) -> Run:
        """Answer the first `count` questions, in their order, with the time it took."""
        own = self.config
        controller = Controller(setting.policy, budget_of(own, setting))
        options = dict(
            window=setting.window, max_new_tokens=own.rollouts.max_new_tokens, in_flight=in_flight,
            cells=self.engine.settings.joint.grid.size,
        )  # fmt: skip
        answers = []
        with contextlib.closing(self.engine.session()) as session, progress(count, title, "prompts") as bar:
            runner = Runner(
                session, controller, self.questions[:count], book, new_session=self.engine.session, **options
            )
            for answer in runner.run():
                answers.append(answer)
                bar.update(1)
        return Run(sorted(answers, key=lambda a: a.index), runner.timing)

    def at_budget(self, setting: Setting, budget: str, title: str) -> tuple[pa.Table, dict[str, Any]]:
        """Decisions and times of one setting, all prompts together and, where asked for, some one by one."""
        own, book = self.config.samples, self.book()
        run = self.play(setting, len(self.questions), own.in_flight, f"{title} at {budget}", book)
        for failed in (a for a in run.answers if a.error):
            print(f"samples: {failed.error}", file=sys.stderr)
        if all(a.error for a in run.answers):
            raise UserError(f"Not one prompt was answered. The first error: {run.answers[0].error}")
        times = {"together": asdict(run.timing), "alone": own.one_at_a_time}
        if own.one_at_a_time:
            alone = self.play(setting, own.one_at_a_time, 1, f"{title} at {budget}, one by one", self.book())
            times["one_by_one"] = asdict(alone.timing)
        asked = grade(run.answers, self.prompts, book, self.config)
        return decision_table(run.answers, asked, setting, budget), times


def grade(answers: Sequence[Answered], prompts: Sequence[Row], book: AnswerBook, config: Config) -> Asked:
    """Texts and scores of all finished branches."""
    finished = [
        (a.index, slot, visible_answer(book.text(b.token_ids)))
        for a in answers
        for slot, b in enumerate(a.branches)
        if b.finish_reason is FinishReason.STOP
    ]
    with rule_grader(config) as grader:
        if grader is None:
            raise UserError(
                "samples are graded by rule, but grades.rule is 'none'. Name a rule, or empty samples.policies."
            )
        scores = [g.score for g in grader.grade([_graded(prompts[i], text) for i, _, text in finished])]
    return Asked({(i, slot): (text, score or 0.0) for (i, slot, text), score in zip(finished, scores, strict=True)})


def _graded(prompt: Row, text: str) -> Graded:
    return Graded(tuple(prompt["messages"]), text, prompt["answer"], json.loads(prompt["extra"]))


def setting_for(name: str, budget: float, frontier: dict[str, Any], fitted: Fitted) -> Setting:
    """What the policy `name` does with a budget; UserError naming the known ones."""
    if name not in LIVE_POLICIES:
        raise UserError(f"There is no live policy '{name}'{nearest(name, LIVE_POLICIES)} (samples.policies).")
    return live_setting(name, budget, frontier, fitted)


def run(context: Context) -> str:
    config, name, target, reads = context.config, context.name, context.target, context.reads
    folder = reads["checkpoint"]
    fitted, frontier = read_fitted(folder, read_joint_head(folder).grid), read_json(reads["frontier"])
    budgets = config.samples.majority_budgets if name == "majority" else config.samples.budgets
    settings = {budget: setting_for(name, budget, frontier, fitted) for budget in budgets}
    for setting in settings.values():
        budget_of(config, setting)
    prompts = PROMPTS.read(reads["prompts"]).slice(0, config.samples.prompts).to_pylist()
    tokenizer = load_tokenizer(folder)
    questions = questions_of(prompts, tokenizer, config)
    with open_engine(config, folder, tokenizer) as engine:
        bench = Bench(engine, questions, prompts, config, tokenizer)
        done = {f"{b:g}": bench.at_budget(setting, f"{b:g}", f"samples {name}") for b, setting in settings.items()}
    table = pa.concat_tables(table for table, _ in done.values())
    write_json(target.with_suffix(".timing.json"), {budget: times for budget, (_, times) in done.items()})
    context.write(SAMPLES, table)
    return f"answered {len(questions)} prompts at {len(settings)} budgets, {table.num_rows} rows, wrote {target}"


if __name__ == "__main__":
    run_stage("samples", run)
