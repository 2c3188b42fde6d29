"""Mathematical answers, compared by math-verify in child processes that can be killed (children.py).

Of model text, the only part that SymPy's own parser is given consists of digits and operators.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping
from typing import Any

from ziprc.chat import visible_answer
from ziprc.config.load import Config
from ziprc.rewards.base import Grade, Item, graded
from ziprc.rewards.children import EXTRACTED_CHARACTERS, ChildGrader, outcome, serve, workers
from ziprc.rewards.exact import canonical_text


class MathGrader(ChildGrader):
    """Right when math-verify finds the visible answer equal to the reference."""

    name = "math"
    command = (sys.executable, "-m", "ziprc.rewards.math")

    def settled(self, item: Item) -> Grade | None:
        answer = visible_answer(item.response)
        if canonical_text(answer) == canonical_text(item.answer or ""):
            return graded(1, answer[:EXTRACTED_CHARACTERS])  # the same text: nothing to work out
        return None

    def question(self, item: Item) -> Mapping[str, Any]:
        return {"reference": item.answer, "answer": visible_answer(item.response)}


def grader(config: Config) -> MathGrader:
    return MathGrader(config.grades.timeout_s, workers())


# --- the child -------------------------------------------------------------------------------------------------------


def compare(reference: str, answer: str) -> dict[str, Any]:
    """One comparison, in this process and without limits: an `outcome`, of which the score None is an error."""
    from math_verify import parse, verify

    marked = reference if "$" in reference or "\\boxed" in reference else f"${reference}$"
    gold = parse(marked, parsing_timeout=None)
    if not gold:
        return outcome(None, why=f"math-verify cannot read the reference {reference!r}")
    found = parse(answer, parsing_timeout=None)
    extracted = str(found[-1]) if found else None
    why = None
    for g, f in itertools.product(gold, found):
        try:
            if verify(g, f, timeout_seconds=None, raise_on_error=True):
                return outcome(1.0, extracted)
        except Exception as error:  # the boundary to SymPy, which raises anything; recorded, never "wrong"
            why = f"comparison failed: {type(error).__name__}: {error}"
    return outcome(None if why else 0.0, extracted, why)


def warm_up() -> None:
    """Compile the expressions that find answers."""
    from math_verify import parse

    parse("$1$", parsing_timeout=None)


if __name__ == "__main__":
    serve(compare, warm_up, float(sys.argv[1]))
