"""What really happened to each rollout, as arrays, and the moments at which predictions are compared with it.

The state at position j has seen the prompt and j response tokens; m - j tokens are still to come, the stop token
included (m = response length). Moments are shares of the *final* length, which nobody knows online: a predictor that
is told the elapsed tokens j at "50 %" is thereby told m. Every predictor here has that same advantage; the `length`
baseline shows how much it is worth. A response that was cut off has score 0; one without a score for any other reason
(unparseable, timeout, error) is left out and counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ziprc.errors import UserError
from ziprc.tables.grades import GradeStatus, one_a_rollout
from ziprc.tables.rollouts import FinishReason

MOMENTS: dict[str, float] = {"start": 0.0, "25%": 0.25, "50%": 0.5, "75%": 0.75, "end": 1.0}


def align(table: pa.Table, ids: pa.Array, where: str) -> pa.Table:
    """Rows of `table` in the order of `ids` (rollout ids); UserError when one is missing or is there twice."""
    one_a_rollout(table, where)
    index = pc.index_in(ids, value_set=table["rollout_id"].combine_chunks())
    if index.null_count:
        missing = ids.filter(pc.is_null(index))[0].as_py()
        raise UserError(
            f"{where}: rollout {missing} and {index.null_count - 1} others are missing. Build the table again."
        )
    return table.take(index)


def response_lengths(rollouts: pa.Table) -> NDArray[np.int64]:
    """[n] response tokens, stop token included."""
    return pc.list_value_length(rollouts["response_token_ids"]).to_numpy().astype(np.int64)


@dataclass(frozen=True)
class Outcomes:
    """Rollouts with their grades: `rows` are row numbers of the rollouts table, `group` numbers the prompts."""

    rollout_ids: pa.Array
    prompt_ids: pa.Array
    group: NDArray[np.int64]
    rows: NDArray[np.int64]
    length: NDArray[np.int64]
    finished: NDArray[np.bool_]
    score: NDArray[np.float64]
    ungraded: int

    @property
    def success(self) -> NDArray[np.bool_]:
        return self.score >= 0.5


def join_outcomes(rollouts: pa.Table, grades: pa.Table, where: str) -> Outcomes:
    """Outcomes of all rollouts that have a score or were cut off."""
    grades = align(grades, rollouts["rollout_id"].combine_chunks(), where)
    unfinished = np.asarray(pc.equal(grades["status"], GradeStatus.UNFINISHED.value))
    score = np.where(unfinished, 0.0, grades["score"].to_numpy().astype(np.float64))
    rows = np.flatnonzero(np.isfinite(score))
    if not len(rows):
        raise UserError(
            f"{where}: not one rollout has a score, so nothing can be evaluated. Look at the status column."
        )
    kept = rollouts.select(["rollout_id", "prompt_id", "finish_reason"]).take(pa.array(rows))
    encoded = kept["prompt_id"].combine_chunks().dictionary_encode()
    return Outcomes(
        rollout_ids=kept["rollout_id"].combine_chunks(),
        prompt_ids=encoded.dictionary,
        group=encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64),
        rows=rows,
        length=response_lengths(rollouts)[rows],
        finished=np.asarray(pc.equal(kept["finish_reason"], FinishReason.STOP.value)),
        score=score[rows],
        ungraded=rollouts.num_rows - len(rows),
    )


def moment_positions(length: NDArray[np.int64]) -> NDArray[np.int64]:
    """[n, M] position of the labelled state at every moment; the end is the state that emits the last token."""
    shares = np.array(list(MOMENTS.values()))
    return np.minimum((length[:, None] * shares).astype(np.int64), length[:, None] - 1)
