"""Where copies of a reasoning vocabulary may be used follows from ids, and what they are worth adds up to what was there."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ziprc.joint.reasoning import AFTER, BEFORE, INSIDE, ReasoningVocabulary, as_ranges

TURN, OPENS, CLOSES, START = 6, 7, 8, 12  # ids 0 … 5 have copies
IDS = st.integers(0, START + 11)


def vocabulary(
    copies: int = 2, sources: tuple[int, ...] = (0, 1, 2, 3, 4, 5), only: bool = False
) -> ReasoningVocabulary:
    return ReasoningVocabulary(START, as_ranges(sources), copies, TURN, OPENS, CLOSES, only)


@given(st.sampled_from([BEFORE, INSIDE, AFTER]), st.lists(IDS, min_size=1, max_size=12))
def test_all_at_once_is_token_by_token(begin: int, ids: list[int]) -> None:
    own, state, slow = vocabulary(), begin, []
    for token in ids:
        slow.append(state == INSIDE)
        state = own.after(state, [token])
    np.testing.assert_array_equal(own.inside([begin], np.array([ids]))[0], slow)
    assert own.after(begin, ids) == state


@given(st.lists(IDS, max_size=10), st.lists(IDS.filter(lambda i: i != TURN), max_size=10), st.integers(0, 10))
def test_a_prompt_counts_from_its_last_turn_and_may_hold_a_part_of_the_response(
    before: list[int], response: list[int], cut: int
) -> None:
    own, kept = vocabulary(), response[:cut]
    whole = own.at_end([*before, TURN, *kept])
    assert whole == own.after(BEFORE, kept)  # whatever stands before the turn, tags included
    assert own.after(whole, response[cut:]) == own.after(BEFORE, response)


def test_a_prompt_without_a_turn_opens_nothing() -> None:
    assert vocabulary().at_end([OPENS, 1]) == BEFORE
    assert vocabulary().at_end([TURN, OPENS, 1]) == INSIDE
    assert vocabulary().at_end([TURN, OPENS, CLOSES, OPENS]) == AFTER  # there is one block


@given(st.sets(st.integers(0, 5), min_size=1), st.integers(1, 3), st.lists(IDS, max_size=12))
def test_a_copy_is_known_by_its_source(sources: set[int], copies: int, ids: list[int]) -> None:
    own = vocabulary(copies, tuple(sources))
    assert own.size == copies * len(sources) == len(own.of_row)
    found = own.plain(ids)
    for before, after in zip(ids, found.tolist(), strict=True):
        if START <= before < START + own.size:
            assert after == sorted(sources)[(before - START) % len(sources)] and own.is_copy([before])[0]
        else:
            assert after == before and not own.is_copy([before])[0]


@settings(deadline=None)
@given(st.sets(st.integers(0, 5), min_size=1), st.integers(1, 3), st.integers(0, 100), st.floats(0.3, 3))
def test_a_token_and_its_copies_are_as_likely_as_the_token_was(
    sources: set[int], copies: int, seed: int, temperature: float
) -> None:
    """At any temperature, which divides what is said before the bias is added."""
    own = vocabulary(copies, tuple(sources))
    logits = torch.randn(START, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = torch.cat([logits, logits[torch.from_numpy(own.of_row)]]) / temperature
    law = (whole + torch.from_numpy(own.bias(START + own.size)).double()).log_softmax(-1)
    base = (logits / temperature).log_softmax(-1)
    together = torch.full((START,), -torch.inf, dtype=torch.float64)
    ids = own.plain(np.arange(START + own.size))
    for row, source in enumerate(ids.tolist()):
        together[source] = torch.logaddexp(together[source], law[row])
    torch.testing.assert_close(together, base, rtol=0, atol=1e-6)


@given(st.sets(st.integers(0, 400), max_size=40))
def test_ranges_hold_what_they_were_made_from(ids: set[int]) -> None:
    found = as_ranges(ids)
    assert [i for a, b in found for i in range(a, b)] == sorted(ids)
    assert all(a < b for a, b in found) and all(b < c for (_, b), (c, _) in itertools.pairwise(found))


def test_a_block_for_copies_alone_allows_them_and_its_end() -> None:
    own = vocabulary(1, only=True)
    allowed = np.flatnonzero(np.isfinite(own.bias(START + own.size))).tolist()
    assert allowed == [CLOSES, *range(START, START + 6)]
