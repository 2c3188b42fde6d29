"""What holds of graders for all inputs."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from ziprc.rewards.base import Item
from ziprc.rewards.countdown import CountdownGrader
from ziprc.rewards.exact import ExactGrader, canonical_integer
from ziprc.rewards.gsm8k import Gsm8kGrader
from ziprc.rewards.hendrycks import HendrycksGrader
from ziprc.rewards.judge import as_data
from ziprc.rewards.prime import PrimeGrader, answer_of, near, same


@given(st.integers())
def test_canonical_integers_are_those_of_python(number: int) -> None:
    assert canonical_integer(f" {number:+} ") == canonical_integer(f"{number:040d}") == str(number)


@given(st.integers(), st.integers())
def test_exact_is_equality_of_integers(answer: int, said: int) -> None:
    grade = ExactGrader().grade([Item((), f"<think>{answer}</think>{said}", str(answer))])[0]
    assert grade.score == float(answer == said)


@given(st.text(max_size=60))
def test_no_text_breaks_a_rule_grader(text: str) -> None:
    question = Item((), text, "12", {"numbers": [3, 4], "target": 12})
    assert Gsm8kGrader().grade([question])[0].score in (0.0, 1.0)
    assert HendrycksGrader().grade([question])[0].score in (0.0, 1.0)
    assert PrimeGrader(5).grade([question])[0].score in (0.0, 1.0), "an integer needs no algebra"
    assert ExactGrader().grade([question])[0].score in (0.0, 1.0)
    assert CountdownGrader().grade([question])[0].score in (0.0, 1.0)


@given(
    st.text(max_size=60),
    st.text("0123456789./,-+ \\{}()[]$%xyfracboed", max_size=40),
    st.sampled_from(["1/2", "(1,2)", "x"]),
)
def test_what_is_compared_is_told_or_left_to_algebra(text: str, formula: str, truth: str) -> None:
    for legacy in (False, True):
        found = answer_of(f"{text}\\boxed{{{formula}}}{text}", legacy)
        assert same(truth, found, legacy) in (True, False, None)
        assert same(truth, truth, legacy) is True


@given(st.fractions(), st.fractions())
def test_nearness_has_no_side_and_a_hundred_is_for_the_published_rule(one: Fraction, other: Fraction) -> None:
    assert near(one, other, False) == near(other, one, False)
    assert near(one, one * 100, True) and near(one, one / 100, True)
    assert near(one, one * 100, False) == (one == 0)


@given(st.text("<|/ab>", max_size=40), st.lists(st.text("<|/ab>", min_size=2, max_size=4), max_size=3))
def test_broken_strings_are_gone_and_nothing_else_is_lost(text: str, forbidden: list[str]) -> None:
    safe = as_data(text, forbidden)
    assert not any(word in safe for word in forbidden)
    assert safe.replace(" ", "") == text
