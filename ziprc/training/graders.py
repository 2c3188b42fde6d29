"""Who grades the work of an on-policy arm: the task's program, or a grader behind a server that lives as long as training.

The server is asked as anyone would ask it (the OpenAI chat API), so the same code speaks to the small one around our engine, to
vLLM, and to an address that somebody else keeps up.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ziprc.config.base import GREEDY
from ziprc.config.load import Config
from ziprc.config.online import RubricReward
from ziprc.engines.base import settings_for
from ziprc.engines.server import Remote, Server
from ziprc.errors import UserError
from ziprc.joint.head import read_manifest
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.base import Grade
from ziprc.rewards.judge import control_strings
from ziprc.rewards.rubric import TEMPLATE_DIGEST, assessed, question_of, read_total, render
from ziprc.rewards.served import Scorer
from ziprc.tables.rubrics import RUBRICS
from ziprc.tasks.base import AssessedTask, get_task
from ziprc.training.rubric import Row, Work

TRIES = 3  # of a question, with back-off, before it counts as unanswered
GOLDEN = ("2+2", "1 2+2=4 (8)\na 4 (2)", "<think>\n2+2=4\n</think>\n\n4")  # question, criteria, response


def rubrics_of(prompts: Sequence[Row], sources: Mapping[str, Path]) -> dict[str, str]:
    """The valid rubrics of the prompts, by id, where a grader reads them; else none. UserError when no prompt has one."""
    if "rubrics/train" not in sources:
        return {}
    rows = RUBRICS.read(sources["rubrics/train"]).to_pylist()
    found = {row["prompt_id"]: row["text"] for row in rows if row["valid"]}
    if not any(row["prompt_id"] in found for row in prompts):
        raise UserError(
            f"{sources['rubrics/train']} has no valid rubric for any prompt: there is nothing to be graded by."
        )
    return found


def work_of(
    config: Config, own: RubricReward, rubrics: Mapping[str, str], sources: Mapping[str, Path], folder: Path,
    stack: contextlib.ExitStack,
) -> Work:  # fmt: skip
    """How the rubric of an arm is asked. A server ends with `stack`; its log lies in `folder`.

    UserError for a grader that reads questions of another form than ours.
    """
    task = get_task(config.prompts.task)
    program = task if isinstance(task, AssessedTask) else None
    if "grader" not in sources:
        assert program is not None, "checked by the declaration"
        look = program.assess
        return Work(own, lambda asked: [assessed(look(json.loads(row["extra"]), text)) for row, text in asked], program)
    grader = sources["grader"]
    if (found := (read_manifest(grader).get("grader") or {}).get("template")) != TEMPLATE_DIGEST:
        raise UserError(
            f"{grader} was taught questions of another form ({found or 'none'}) than this package asks ({TEMPLATE_DIGEST}). "
            "Train the grader again (train_grader)."
        )
    tokenizer = load_tokenizer(grader)
    forbidden = control_strings(tokenizer)
    scorer = None
    if os.environ.get("RANK", "0") == "0":
        scorer = stack.enter_context(served(config, grader, tokenizer, folder, stack))

    def ask(asked: Sequence[tuple[Row, str]]) -> list[Grade]:
        assert scorer is not None, "the first process alone asks"
        return scorer.grade(
            [render(question_of(row["messages"]), rubrics[row["prompt_id"]], text, forbidden) for row, text in asked]
        )

    return Work(own, ask, program, scorer.counts if scorer is not None else dict)


def served(config: Config, grader: Path, tokenizer: Any, folder: Path, stack: contextlib.ExitStack) -> Scorer:
    """A client of the grader's server, which is started or found."""
    own, runtime = config.gradings, config.runtime
    golden = render(*GOLDEN)
    if runtime.grader.startswith("http"):
        server: Any = Remote(runtime.grader, runtime.grader_model, golden, accepts, own.max_new_tokens)
    else:
        settings = settings_for(grader, tokenizer, own, GREEDY, runtime, 1)
        settings = replace(settings, gpu_memory_utilization=runtime.grader_memory)
        server = Server(
            runtime.grader, settings, folder / "grader.log", golden, accepts, own.max_new_tokens,
            start_limit_s=runtime.grader_start_s, restarts=runtime.grader_restarts,
        )  # fmt: skip
    stack.enter_context(server)
    return Scorer(
        server, read_total, own.max_new_tokens, concurrency=runtime.grader_requests, deadline_s=runtime.grader_deadline_s,
        tries=TRIES,
    )  # fmt: skip


def accepts(text: str) -> bool:
    """Whether these are a grader's words: a server may be well and serve something else."""
    return read_total(text, True).score is not None
