"""A rubric in the reward of the on-policy trainer: what is asked, what is learned, and what a dark batch costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.test_online import EASY, Run, one_thread  # noqa: F401, a fixture that every test here uses
from ziprc.config.base import Runtime
from ziprc.config.online import Arm, RubricReward
from ziprc.errors import Dark, UserError
from ziprc.rewards.base import Grade, graded, ungraded
from ziprc.rewards.rubric import assessed
from ziprc.tables.grades import GradeStatus
from ziprc.tables.progress import PROGRESS
from ziprc.tasks.worked import TASK
from ziprc.training.rubric import Judged, Row, Work, described, step_advantages

CHAIN = {"extra": json.dumps({"start": 9, "chain": [["-", 5], ["+", 4], ["-", 2]]}), "prompt_id": "p", "messages": []}
SOUND, BLUFF, WRONG = (
    f"<think>\n{work}\n</think>\n\n{said}"
    for work, said in (("9-5=4+4=8-2=6", 6), ("9-5=9+4=3-2=6", 6), ("9-5=4+4=8-2=7", 7))
)


def by_program(asked: Sequence[tuple[Row, str]]) -> list[Grade]:
    return [assessed(TASK.assess(json.loads(row["extra"]), text)) for row, text in asked]


def judged(setup: str, **own: Any) -> list[Judged]:
    asked: list[str] = []

    def ask(questions: Sequence[tuple[Row, str]]) -> list[Grade]:
        asked.extend(text for _, text in questions)
        return by_program(questions)

    work = Work(RubricReward(setup=setup, **own), ask, TASK)
    texts = [SOUND, BLUFF, WRONG, SOUND]
    found = work.judge([CHAIN] * 4, texts, [True, True, True, False], [1.0, 1.0, 0.0, 0.0])
    assert asked == [text for text, one in zip(texts, found, strict=True) if one.grade is not None]
    return found


@pytest.mark.parametrize(
    ("setup", "rewards", "asked"),
    [
        ("outcome", [1, 1, 0, 0], 0), ("gated", [1, 0.2, 0, 0], 2), ("tinyv_only", [1, 0.2, 0.6, 0], 3),
        ("addon", [1, 1, 0.3, 0], 1), ("mixed", [1, 0.6, 0.3, 0], 3),
    ],
)  # fmt: skip
def test_every_setup_asks_for_what_it_needs_and_pays_what_it_says(setup: str, rewards: list[float], asked: int) -> None:
    found = judged(setup, weight=0.5)
    assert [one.reward for one in found] == pytest.approx(rewards)
    assert sum(one.grade is not None for one in found) == asked


def test_what_the_program_thinks_is_written_down_for_every_setup() -> None:
    row = described(judged("outcome"))
    assert (row["asked"], row["rubric_score"], row["unsound"]) == (0, None, 0.5)
    row = described(judged("tinyv_only"))
    assert row["grader_gap"] == 0 and row["suspected_hacking"] == 0 and row["suspected_false"] == 0.5
    assert row["verified"] == pytest.approx(1 / 3)  # of the finished responses


def test_a_response_without_its_score_has_no_reward() -> None:
    work = Work(RubricReward(setup="gated"), lambda asked: [ungraded(GradeStatus.UNSCORED) for _ in asked], None)
    found = work.judge([CHAIN] * 3, [SOUND, WRONG, SOUND], [True] * 3, [1.0, 0.0, None])
    assert [one.reward for one in found] == [None, 0.0, None]
    assert described(found)["unscored"] == 1


def test_tokens_of_a_step_get_its_verdict_within_the_group() -> None:
    found = judged("tinyv_only")[:2]  # a sound response and a bluff
    texts = [SOUND, BLUFF]
    letters = [[ord(letter) for letter in text] for text in texts]
    more = step_advantages(found, letters, Letters(), 2, 1.0)
    for one, text, sign in zip(more, texts, (1, -1), strict=True):
        span = found[0].program.spans["1"]  # type: ignore[union-attr]
        assert one[span[0] : span[1]] == pytest.approx([sign] * (span[1] - span[0]), rel=1e-3)
        assert not one[: span[0]].any() and not one[text.index("</think>") :].any()
    alike = step_advantages([found[0]] * 2, letters[:1] * 2, Letters(), 2, 1.0)
    assert not np.concatenate(alike).any(), "where all are the same there is nothing to learn"
    with pytest.raises(UserError, match="cut between processes"):
        step_advantages(found, letters, Letters(), 3, 1.0)


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        return "".join(map(chr, ids))


# --- in the trainer: right is to say nothing, and the rubric wants a prompt of an even number ----------------------------


def rubric_arm(setup: str = "gated", **own: Any) -> Arm:
    return Arm.model_validate({**EASY.model_dump(exclude={"rewards"}), "rubric": {"setup": setup, **own}})


class Asked(Run):
    """A run whose work is graded by `ask`."""

    def __init__(self, folder: Path, arm: Arm, ask: Any, **own: Any) -> None:
        super().__init__(folder, arm, **own)
        assert arm.rubric is not None
        self.trainer.work = Work(arm.rubric, ask, None)


def even(asked: Sequence[tuple[Row, str]]) -> list[Grade]:
    return [graded(float(row["difficulty"] == "even")) for row, _ in asked]


def test_the_reward_is_the_combined_one_and_the_verdict_stays_what_it_is(tmp_path: Path) -> None:
    run = Asked(tmp_path, rubric_arm().model_copy(update={"rollouts": 4}), even)
    rows = run.train()
    table = PROGRESS.make({name: [row.get(name) for row in rows] for name in PROGRESS.columns.names})
    for row in table.to_pylist():
        right = json.loads(row["by_difficulty"])
        assert row["success"] == pytest.approx(sum(good for _, good in right.values()) / 32)
        assert row["reward"] == pytest.approx(right.get("even", [0, 0])[1] / 32, abs=1e-6)
        assert row["asked"] == sum(good for _, good in right.values())


def test_the_outcome_setup_is_the_arm_without_a_rubric_to_the_bit(tmp_path: Path) -> None:
    plain = Run(tmp_path / "plain", EASY.model_copy(update={"rollouts": 3}))
    plain.train()
    outcome = Asked(
        tmp_path / "outcome",
        rubric_arm(
            "outcome",
        ).model_copy(update={"rollouts": 3}),
        even,
    )
    outcome.train()
    for name, weight in plain.weights().items():
        assert torch.equal(weight, outcome.weights()[name]), name


def test_a_dark_batch_takes_no_step_and_the_run_goes_on_from_there_to_the_same_bits(tmp_path: Path) -> None:
    arm = rubric_arm().model_copy(update={"rollouts": 5})
    straight = Asked(tmp_path / "straight", arm, even)
    straight.train()

    def dark_at_last(calls: list[int]) -> Any:
        def ask(asked: Sequence[tuple[Row, str]]) -> list[Grade]:
            calls.append(len(asked))
            if len(calls) == 4:
                raise Dark("Not one of 3 questions to the grader was answered.")
            return even(asked)

        return ask

    calm = Runtime(rollouts_per_device=32, save_steps=100)
    dark = Asked(tmp_path / "dark", arm, dark_at_last([]), runtime=calm)
    with pytest.raises(Dark, match="No step was taken in rollout 4; the training state is saved"):
        dark.train()
    assert [row["rollout"] for row in dark.trainer.rows] == [1, 2, 3]
    assert (dark.states / "checkpoint-3" / "complete.json").exists()
    again = Asked(tmp_path / "dark", arm, even, runtime=calm)
    again.train()
    assert [row["rollout"] for row in again.trainer.rows] == [1, 2, 3, 4, 5]
    for name, weight in straight.weights().items():
        assert torch.equal(weight, again.weights()[name]), name


def test_missing_scores_of_some_teach_nothing_and_are_counted(tmp_path: Path) -> None:
    def some(asked: Sequence[tuple[Row, str]]) -> list[Grade]:
        return [graded(1.0) if i % 2 else ungraded(GradeStatus.UNSCORED) for i in range(len(asked))]

    run = Asked(tmp_path, rubric_arm().model_copy(update={"rollouts": 2}), some)
    rows = run.train()
    assert all(row["unscored"] > 0 for row in rows)
    assert all(row["reward"] < row["success"] for row in rows)


def test_credit_to_steps_reaches_the_loss(tmp_path: Path) -> None:
    task_prompts = [
        {"prompt_id": p.prompt_id, "messages": list(p.messages), "answer": p.answer, "extra": json.dumps(p.extra),
        "difficulty": p.difficulty} for p in TASK.prompts({"mix": {"3 steps": 1}, "slips": {}}, "train", 40, 0)
    ]  # fmt: skip
    run = Run(
        tmp_path, rubric_arm("tinyv_only", credit="steps").model_copy(update={"rollouts": 1}), prompts=task_prompts
    )
    run.trainer.work = Work(RubricReward(setup="tinyv_only", credit="steps"), by_program, TASK)
    seen: list[tuple[int, ...]] = []
    plain = run.trainer._compute_loss

    def loss(model: Any, inputs: Any) -> torch.Tensor:
        seen.append(tuple(inputs["advantages"].shape))
        assert inputs["advantages"].shape == inputs["completion_mask"].shape
        return plain(model, inputs)

    run.trainer._compute_loss = loss  # type: ignore[method-assign]
    run.train()
    assert seen
