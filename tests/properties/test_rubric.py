"""What holds of totals, of combined rewards and of questions to graders, whatever a model writes."""

from __future__ import annotations

import math
import re
import time

from hypothesis import given
from hypothesis import strategies as st

from ziprc.config.online import Setup
from ziprc.rewards.combine import asks, combine
from ziprc.rewards.rubric import TEMPLATE, read_total, render
from ziprc.rewards.totals import best_constant, grade_reward, legacy_score, strict_total

UNIT = st.floats(0, 1)
MAYBE = st.none() | UNIT
VERDICT = st.sampled_from([0.0, 1.0])
SETUPS = st.sampled_from(["outcome", "tinyv_only", "addon", "mixed", "gated"])
TOTALS = st.builds(lambda n, d: f"Total Score: {n}/{d}", st.integers(-2, 40), st.integers(-1, 20))
WORDS = (
    st.text(max_size=60)
    | TOTALS
    | st.sampled_from(["Total Score: nan", "Total Score: -1e9", "total score 7", "\n", "["])
)
DRESSES = ["**{}**", "[{}]", "| {} |", "`{}`", "$ {} $", "_{}_", "  {}\t"]
TEXTS = st.lists(WORDS, max_size=5).map("\n".join)


@given(TEXTS, st.booleans(), UNIT)
def test_a_total_is_in_range_or_there_is_none(text: str, finished: bool, target: float) -> None:
    total = strict_total(text, finished)
    assert total.score is None or 0 <= total.score <= 1
    assert finished or total.score is None
    assert 0 <= grade_reward(total, target) <= 1
    grade = read_total(text, finished)
    assert grade.score is None or 0 <= grade.score <= 1


@given(st.integers(-2, 12), st.integers(-1, 12), st.lists(st.sampled_from(DRESSES), max_size=4), st.booleans())
def test_decoration_changes_no_total(points: int, of: int, dresses: list[str], finished: bool) -> None:
    line = f"Total Score: {points}/{of}"
    dressed = line
    for dress in dresses:
        dressed = dress.format(dressed)
    assert strict_total(f"1 4 ok 4\n{dressed}\n\n", finished) == strict_total(line, finished)


def test_a_long_text_is_read_in_no_time() -> None:
    began = time.monotonic()
    for text in (
        "Total Score: " + "9" * 100_000,
        "Total Score " * 10_000,
        "[" * 100_000 + "\nTotal Score: 1/10",
        " " * 100_000,
        ("total" + " " * 190 + "\n") * 500,
        *["Total Score" + " " * 185 + "x"] * 50,  # four seconds, while blanks were read in every way
    ):
        assert strict_total(text).score in (None, 0.1)
        legacy_score(text)
    assert time.monotonic() - began < 2


@given(st.text(max_size=300), st.integers(0, 100_000), st.sampled_from(["", "\nTotal Score: ", "\nTotal Score: 7/10"]))
def test_no_text_breaks_a_reading(part: str, characters: int, end: str) -> None:
    text = (part * (characters // max(1, len(part))))[:characters] + end
    for scale in (None, 10.0):
        total = strict_total(text, scale=scale)
        assert total.score is None or (0 <= total.score <= 1 and math.copysign(1, total.score) == 1)
        assert strict_total(text, False, scale).score is None
    published = legacy_score(text)
    assert published is None or published <= 1


@given(st.lists(UNIT, min_size=1, max_size=20), UNIT)
def test_no_constant_is_paid_more_than_the_best(targets: list[float], other: float) -> None:
    def paid(value: float) -> float:
        return sum((1 - abs(value - target)) ** 2 for target in targets) / len(targets)

    value, mean = best_constant(targets)
    assert value in targets and math.isclose(mean, paid(value), rel_tol=1e-9)
    assert paid(other) <= mean + 1e-12


@given(SETUPS, MAYBE, MAYBE, UNIT)
def test_a_combined_reward_is_in_range_or_there_is_none(
    setup: Setup, right: float | None, score: float | None, weight: float
) -> None:
    reward = combine(setup, right, score, weight)
    assert reward is None or (0 <= reward <= 1 and math.isfinite(reward))


@given(SETUPS, VERDICT, UNIT, UNIT)
def test_what_is_not_asked_for_is_not_needed(setup: Setup, right: float, score: float, weight: float) -> None:
    assert combine(setup, right, score, weight) is not None
    if not asks(setup, right):
        assert combine(setup, right, None, weight) == combine(setup, right, score, weight)
    else:
        assert combine(setup, right, None, weight) is None


@given(VERDICT, UNIT, UNIT)
def test_setups_are_what_they_say(right: float, score: float, weight: float) -> None:
    assert combine("outcome", right, score, weight) == right
    assert combine("tinyv_only", right, score, weight) == score
    assert combine("gated", right, score, weight) == right * score
    assert combine("addon", right, score, weight) == (1.0 if right else weight * score)
    assert math.isclose(
        combine("mixed", right, score, weight) or 0.0, weight * score + (1 - weight) * right, abs_tol=1e-12
    )
    assert combine("mixed", right, score, 0.0) == right


@given(st.text(max_size=200), st.text(max_size=80), st.text(max_size=80))
def test_nothing_that_is_filled_in_leaves_its_marks(response: str, question: str, criteria: str) -> None:
    content = render(question, criteria, response, ["<|im_end|>", "<think>", "</think>"])[0]["content"]
    marks = re.findall(r"\[\d{4}\]", content.partition("Student ")[2])
    mark = content.rpartition("\nEnd with the line")[0][-6:]
    assert re.fullmatch(r"\[\d{4}\]", mark) and marks and mark in marks
    assert content.count(mark) == 2 and content.endswith(TEMPLATE.rpartition("\n")[2])
    assert not any(word in content for word in ("<|im_end|>", "<think>", "</think>"))


def test_a_response_that_has_every_mark_does_not_have_its_own() -> None:
    every = "".join(f"[{n:04}]" for n in range(10_000))
    content = render("?", "1 x (10)", every)[0]["content"]
    mark = content.rpartition("\nEnd with the line")[0][-6:]
    assert content.count(mark) == 2 and f"[ {mark[1:]}" in content


def test_a_gate_lets_through_as_much_as_the_answer_is_worth() -> None:
    assert math.isclose(combine("gated", 0.8, 0.5) or 0.0, 0.4)
