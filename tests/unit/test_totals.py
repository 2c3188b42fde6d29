"""Totals of graders' texts: the golden readings, ours and the published ones, and what a total is paid."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ziprc.rewards.base import Item
from ziprc.rewards.grade import GradeGrader
from ziprc.rewards.totals import Reading, Total, best_constant, grade_reward, legacy_score, strict_total

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "score_parser.json").read_text())


def same(found: float | None, wanted: Any) -> bool:
    if found is None or wanted is None:
        return found is wanted
    return found == float(wanted) or math.isclose(found, float(wanted), rel_tol=1e-9)


def test_golden_cases_are_there() -> None:
    assert len(GOLDEN["cases"]) > 80 and len(GOLDEN["rewards"]) == 15


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=range(len(GOLDEN["cases"])))
def test_totals_are_read_as_written_down(case: dict[str, Any]) -> None:
    total = strict_total(case["text"], case["finished"])
    assert (total.reading, same(total.score, case["strict"]["score"])) == (case["strict"]["reading"], True)
    assert same(legacy_score(case["text"]), case["legacy"])


@pytest.mark.parametrize("case", GOLDEN["rewards"], ids=range(len(GOLDEN["rewards"])))
def test_totals_are_paid_as_written_down(case: dict[str, Any]) -> None:
    if case["strict_reward"] == "error":
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            grade_reward(strict_total(case["text"]), case["target"])
    else:
        assert same(grade_reward(strict_total(case["text"]), case["target"]), case["strict_reward"])


@pytest.mark.parametrize(
    ("text", "reading"),
    [("Total Score: 2/2 points", "malformed"), ("Total Score: 7", "ok"), ("total score: 7/10", "ok")],
)
def test_a_grader_of_ours_cannot_choose_its_scale(text: str, reading: str) -> None:
    assert strict_total(text, scale=10).reading == reading


def test_a_minus_zero_does_not_travel() -> None:
    score = strict_total("Total Score: -0/10").score
    assert score == 0 and math.copysign(1, score) == 1


def test_the_best_constant_is_found_where_it_is_known() -> None:
    assert best_constant([0.7] * 5) == pytest.approx((0.7, 1.0))
    value, paid = best_constant([0.0, 1.0])  # either end is paid 1/2, the middle 1/4
    assert value in (0.0, 1.0) and paid == pytest.approx(0.5)


def test_a_grader_is_paid_by_its_distance_and_nothing_for_words_without_a_total() -> None:
    def of(text: str, answer: str) -> float | None:
        return GradeGrader().grade([Item((), text, answer)])[0].score

    assert of("1 4 5 bad 0\nTotal Score: 5/10 points", "0.7") == pytest.approx(0.64)
    assert of("<think>\nhm\n</think>\n\nTotal Score: 5/10", "0.5") == 1
    assert of("Total Score: nan", "1") == 0
    assert of("no total", "0.5") == 0


def test_there_is_no_best_constant_of_scores_that_are_none() -> None:
    for targets in ([], [7.0], [0.5, math.nan], [-0.1]):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            best_constant(targets)


def test_a_total_has_a_score_exactly_when_it_was_read() -> None:
    for reading, score in ((Reading.OK, None), (Reading.MISSING, 0.5), (Reading.OK, math.nan), (Reading.OK, 1.5)):
        with pytest.raises(AssertionError):
            Total(reading, score)


@pytest.mark.parametrize("case", GOLDEN["rewards"], ids=range(len(GOLDEN["rewards"])))
def test_published_rewards_are_what_the_published_reading_gives(case: dict[str, Any]) -> None:
    score = legacy_score(case["text"])  # no bound, above or below: why ours is another
    found = 0.0 if score is None else (1 - abs(score - case["target"])) ** 2
    assert found == float(case["legacy_reward"]) or math.isclose(found, float(case["legacy_reward"]), rel_tol=1e-6)


@pytest.mark.parametrize("answer", ["7", "-0.1", "nan", "", None, "seven"])
def test_a_teachers_score_outside_its_range_is_refused(answer: str | None) -> None:
    assert GradeGrader().lacks(Item((), "", answer)) == "a teacher's score in [0, 1]"


def test_what_cannot_be_read_says_why() -> None:
    assert strict_total("Total Score: 11/10").reading is Reading.OUT_OF_RANGE
    assert strict_total("Total Score: 7/10", finished=False).reading is Reading.TRUNCATED
