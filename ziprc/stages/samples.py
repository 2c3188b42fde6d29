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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from ziprc.artifacts import derived_seed, read_json, write_json
from ziprc.chat import prompt_token_ids, visible_answer
from ziprc.config import Config
from ziprc.engines.base import Engine, make_engine, settings_for
from ziprc.errors import UserError, nearest
from ziprc.evaluation.decisions import Asked, decision_table
from ziprc.joint.checkpoint import load_tokenizer, read_joint_head
from ziprc.progress import progress
from ziprc.rewards.base import Question as Graded
from ziprc.sampling.calibration import Fitted, read_fitted
from ziprc.sampling.controller import Budget, Controller
from ziprc.sampling.families import Setting, live_policies, live_setting
from ziprc.sampling.live import Answered, Question, Runner, Timing
from ziprc.schemas import FinishReason, read_table, write_table
from ziprc.stages.context import Context, run_stage
from ziprc.stages.grades import rule_grader
from ziprc.tasks.base import get_task

UNLIMITED = 1 << 30
Row = dict[str, Any]


class AnswerBook:
    """Numbers the canonical answers of every prompt, and remembers their texts."""

    def __init__(self, task: Any, tokenizer: Any, stops: Sequence[int]) -> None:
        self.task, self.tokenizer, self.stops = task, tokenizer, frozenset(stops)
        self.numbers: dict[tuple[int, str], int] = {}

    def text(self, token_ids: Sequence[int]) -> str:
        """A response without its stop token, special tokens kept."""
        kept = token_ids[:-1] if token_ids and token_ids[-1] in self.stops else token_ids
        return self.tokenizer.decode(list(kept), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def __call__(self, prompt: int, token_ids: Sequence[int]) -> int | None:
        found = self.task.canonical_answer(self.text(token_ids))
        return None if found is None else self.numbers.setdefault((prompt, found), len(self.numbers))


@dataclass(frozen=True)
class Run:
    """Answers in the order of the questions, and where the time went."""

    answers: list[Answered]
    timing: Timing


def questions_of(prompts: Sequence[Row], tokenizer: Any, config: Config) -> list[Question]:
    """Prompts as the live runner takes them."""
    thinking = config.rollouts.test_thinking
    return [
        Question(
            p["prompt_id"],
            tuple(prompt_token_ids(tokenizer, p["messages"], thinking)),
            derived_seed(config.seed, "samples", p["prompt_id"]),
        )
        for p in prompts
    ]


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


def budget_of(config: Config, setting: Setting) -> Budget:
    """The hard limits of a prompt; UserError when they leave no room for one decision."""
    own = config.samples
    return Budget(own.branches, own.max_tokens or UNLIMITED, own.max_latency or UNLIMITED, setting.interval)


@contextlib.contextmanager
def open_engine(config: Config, folder: Any, tokenizer: Any) -> Iterator[Engine]:
    """The engine of the rollouts, reading the joint."""
    own, machine = config.rollouts, config.runtime
    settings = settings_for(folder, tokenizer, own, own.sampling, machine, machine.tensor_parallel)
    engine = make_engine(own.engine, replace(settings, joint=read_joint_head(folder)))
    with contextlib.closing(engine):
        yield engine


def setting_for(name: str, budget: float, frontier: dict[str, Any], fitted: Fitted) -> Setting:
    """What the policy `name` does with a budget; UserError naming the known ones."""
    if name not in live_policies():
        raise UserError(f"There is no live policy '{name}'{nearest(name, live_policies())} (samples.policies).")
    return live_setting(name, budget, frontier, fitted)


def run(context: Context) -> str:
    config, layout, name = context.config, context.layout, context.name
    folder, target = layout.checkpoint("ziprc"), layout.table("samples", name)
    fitted, frontier = read_fitted(folder, read_joint_head(folder).grid), read_json(layout.home / "frontier.json")
    budgets = config.samples.majority_budgets if name == "majority" else config.samples.budgets
    settings = {budget: setting_for(name, budget, frontier, fitted) for budget in budgets}
    for setting in settings.values():
        budget_of(config, setting)
    prompts = read_table(layout.table("prompts", "test"), "prompts").slice(0, config.samples.prompts).to_pylist()
    tokenizer = load_tokenizer(folder)
    questions = questions_of(prompts, tokenizer, config)
    with open_engine(config, folder, tokenizer) as engine:
        bench = Bench(engine, questions, prompts, config, tokenizer)
        done = {f"{b:g}": bench.at_budget(setting, f"{b:g}", f"samples {name}") for b, setting in settings.items()}
    table = pa.concat_tables(table for table, _ in done.values())
    write_table(target, "samples", table)
    write_json(target.with_suffix(".timing.json"), {budget: times for budget, (_, times) in done.items()})
    context.write_manifest("samples")
    return f"answered {len(questions)} prompts at {len(settings)} budgets, {table.num_rows} rows, wrote {target}"


if __name__ == "__main__":
    run_stage("samples", run)
