"""Properties of tasks that hold for every seed, cell and chain."""

from __future__ import annotations

import random
from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from ziprc.tasks.arithmetic import LARGEST, TASK, Chain, Settings, apply, work_out
from ziprc.tasks.base import get_task, split_of
from ziprc.tasks.expressions import parse_expression
from ziprc.tasks.generated import apportion

cells = st.builds(lambda k, size: f"{k} steps, {size}", st.integers(1, 6), st.sampled_from(["small", "medium", "big"]))


@given(cells, st.integers(0, 10**6), st.sampled_from(TASK.styles))
def test_faultless_work_ends_on_the_value_and_stays_in_range(cell: str, seed: int, style: str) -> None:
    chain = TASK.draw(random.Random(seed), cell, Settings())
    value = chain.start
    for op, operand in chain.steps:
        value = apply(value, op, operand)
        assert 0 <= value <= LARGEST
    assert work_out(chain, style, lambda: False)[1] == chain.value


@given(cells, st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_reordered_terms_keep_the_canonical_form_and_the_split(cell: str, seed: int, rng: random.Random) -> None:
    chain = TASK.draw(random.Random(seed), cell, Settings())
    steps = list(chain.steps)
    rng.shuffle(steps)
    moved = Chain(chain.start, tuple(steps))
    assert moved.canonical == chain.canonical
    assert split_of(moved.canonical, TASK.shares) == split_of(chain.canonical, TASK.shares)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(["base", "train", "validation", "test"]))
def test_prompts_are_distinct_and_answered_at_every_seed(seed: int, split: str) -> None:
    prompts = get_task("arithmetic").prompts({}, split, 40, seed)
    assert len({prompt.prompt_id for prompt in prompts}) == 40
    assert all(prompt.split == split and prompt.answer for prompt in prompts)


@given(st.integers(1, 5000), st.dictionaries(st.text(max_size=5), st.floats(0.001, 1), min_size=1, max_size=9))
def test_apportioning_is_within_one_of_exact(count: int, mix: dict[str, float]) -> None:
    counts = apportion(count, mix)
    assert sum(counts.values()) == count
    assert all(abs(counts[cell] - count * mix[cell] / sum(mix.values())) < 1 + 1e-9 for cell in mix)


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
    max_leaves=8,
)


@given(expressions)
def test_values_agree_with_an_independent_evaluation(text: str) -> None:
    source = "".join(f"F({token})" if token.isdigit() else token for token in _tokens(text))
    try:
        expected = eval(source, {"F": Fraction})  # our own generated text, in a test only
    except ZeroDivisionError:
        expected = None
    try:
        assert parse_expression(text).value() == expected
    except ZeroDivisionError:
        assert expected is None


@given(expressions, expressions)
def test_commuting_keeps_the_canonical_form(one: str, other: str) -> None:
    for op in "+*":
        assert parse_expression(f"{one}{op}{other}").canonical() == parse_expression(f"{other}{op}{one}").canonical()


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    for character in text:
        if character.isdigit() and tokens and tokens[-1].isdigit():
            tokens[-1] += character
        else:
            tokens.append(character)
    return tokens
