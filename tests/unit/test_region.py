"""The tap of a reasoning vocabulary: what it reads at each step, and what it does to rows in the block and outside."""

from __future__ import annotations

import numpy as np
import torch

from ziprc.engines.taps import Region, Text
from ziprc.joint.reasoning import BEFORE, INSIDE, ReasoningVocabulary

OWN = ReasoningVocabulary(10, ((0, 4),), 1, turn=5, opens=6, closes=7)
WORDS = [6, 1, 7, 2]  # opens, thinks, closes, answers


class Row:
    """A response in the making, which notes what is read of it."""

    def __init__(self, number: int, begin: int = BEFORE, temperature: float = 1.0) -> None:
        self.number, self.asked = number, list[tuple[int, int]]()
        self.text = Text(begin, temperature, self.read)

    def read(self, first: int, last: int) -> list[int]:
        self.asked.append((first, last))
        return WORDS[first:last]


def allowed(region: Region, rows: list[tuple[Row, int]]) -> list[bool]:
    """Whether each row, at its position, may draw copies."""
    logits = torch.zeros(len(rows), 14)
    region.apply([(row.number, position) for row, position in rows], logits, [row.text for row, _ in rows])
    return torch.isfinite(logits[:, OWN.rows]).all(-1).tolist()


def test_a_step_reads_the_newest_token_alone() -> None:
    region, row = Region(OWN), Row(0)
    assert [allowed(region, [(row, position)])[0] for position in range(5)] == [False, True, True, False, False]
    assert row.asked == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_a_row_that_was_away_or_is_computed_again_is_read_anew() -> None:
    region, row, other = Region(OWN), Row(0), Row(1, INSIDE)
    assert allowed(region, [(row, 3)]) == [False]
    assert allowed(region, [(row, 1)]) == [True]  # back in the block
    assert allowed(region, [(other, 0)]) == [True]  # and the first is away
    assert row.asked == [(0, 3), (0, 1)]
    assert allowed(region, [(other, 0), (row, 3)]) == [True, False]
    assert row.asked[-1] == (0, 3) and other.asked == []
    assert allowed(region, [(Row(2, INSIDE), -4)]) == [True]  # a part of a prompt, from which nothing is drawn


def test_each_row_has_the_bias_of_its_own_temperature() -> None:
    region, logits = Region(OWN), torch.zeros(3, 14)
    rows = [Row(0, INSIDE, 0.5), Row(1), Row(2, INSIDE, 0.0)]
    region.apply([(row.number, 0) for row in rows], logits, [row.text for row in rows])
    np.testing.assert_allclose(logits[0, :4], -0.5 * np.log(2), rtol=1e-6)
    np.testing.assert_allclose(logits[0, OWN.rows], -0.5 * np.log(2), rtol=1e-6)
    assert not logits[0, 4:10].any() and not logits[1, :10].any() and not logits[2].any()
