"""The recorded rollouts of a split with their grades and readings, as the pool that replays draw from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ziprc.errors import UserError
from ziprc.evaluation.outcomes import join_outcomes, response_lengths
from ziprc.joint.bins import BinGrid
from ziprc.joint.head import read_joint_head
from ziprc.reading.recorded import read_all
from ziprc.sampling.replay import Pool, track
from ziprc.tables.grades import GRADES
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS, FinishReason
from ziprc.tasks.base import Task, get_task

NO_STYLE = -1.0


@dataclass(frozen=True)
class RecordedPool:
    """A pool and who is in it: prompt ids and difficulties [N], names of the style codes."""

    pool: Pool
    grid: BinGrid
    prompt_ids: list[str]
    difficulty: NDArray[np.str_]
    styles: list[str]


def read_pool(reads: Mapping[str, Path], split: str, task: str) -> RecordedPool:
    """The pool of a split, from its tables and the head that sampled it.

    A rollout without a score that did finish makes its prompt unusable: left out.
    """
    rollouts = ROLLOUTS.read(reads[f"{split}/rollouts"])
    rollouts = rollouts.sort_by([("prompt_id", "ascending"), ("sample_index", "ascending")])
    grades = reads[f"{split}/grades"]
    outcomes = join_outcomes(rollouts, GRADES.read(grades), str(grades))
    samples = int(rollouts["sample_index"].to_numpy().max()) + 1
    score = np.full(rollouts.num_rows, np.nan)
    score[outcomes.rows] = outcomes.score
    whole = np.repeat(np.isfinite(score.reshape(-1, samples)).all(-1), samples)  # rows are sorted by prompt
    kept, score = rollouts.filter(pa.array(whole)), score[whole]
    if not kept.num_rows:
        raise UserError(
            f"{grades}: no prompt has a score for each of its {samples} rollouts. Look at the status column."
        )
    grid = read_joint_head(reads["checkpoint"]).grid
    length = response_lengths(kept)
    found = read_all(reads[f"{split}/introspection"], kept["rollout_id"].combine_chunks(), length, grid.size)
    finished = np.asarray(pc.equal(kept["finish_reason"], FinishReason.STOP.value))
    answer, style, styles = _texts(get_task(task), kept, finished)
    before = np.concatenate([[0.0], found.log_prob[:-1]]).astype(np.float32)
    before[found.start] = 0.0  # the reading of a state knows the token before it
    seen = track(length.astype(np.int32), before, found.entropy)
    prompt_ids = kept["prompt_id"].to_pylist()[::samples]
    prompts = PROMPTS.read(reads[f"{split}/prompts"])
    cell = dict(zip(prompts["prompt_id"].to_pylist(), prompts["difficulty"].to_pylist(), strict=True))
    shape = (-1, samples)
    pool = Pool(
        length=length.astype(np.int32).reshape(shape),
        finished=finished.reshape(shape),
        answer=answer.reshape(shape),
        score=score.astype(np.float32).reshape(shape),
        prompt_tokens=np.array([len(ids) for ids in kept["prompt_token_ids"].to_pylist()[::samples]], np.int32),
        joint=found.joint,
        features=np.concatenate([seen, np.repeat(style, length)[:, None]], -1),
    )
    return RecordedPool(pool, grid, prompt_ids, np.array([cell[p] for p in prompt_ids]), styles)


def _texts(
    task: Task, rollouts: pa.Table, finished: NDArray[np.bool_]
) -> tuple[NDArray[np.int32], NDArray[np.float32], list[str]]:
    """Numbers of the canonical answers within each prompt, style codes, and the names of the styles.

    A style's code is its place among the styles of the task, so that it means the same in every pool.
    """
    style_of, styles = getattr(task, "style_of", lambda _: None), sorted(getattr(task, "styles", ()))
    texts, prompts = rollouts["response_text"].to_pylist(), rollouts["prompt_id"].to_pylist()
    numbers: dict[tuple[str, str], int] = {}
    answer = np.full(len(texts), -1, np.int32)
    for i in np.flatnonzero(finished).tolist():
        found = task.canonical_answer(texts[i])
        if found is not None:
            answer[i] = numbers.setdefault((prompts[i], found), len(numbers))
    names = [style_of(text) for text in texts]
    code = np.array([styles.index(name) if name else NO_STYLE for name in names], np.float32)
    return answer, code, styles
