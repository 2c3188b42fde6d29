"""How often rule verifiers say what is expected of them, and how fast they are.

The cases are JSON lists of records `{"id", "expected", "input": {"reference", "response"}}`, `expected` being 1.0 or 0.0; others
are skipped. Each rule grades all of them `--repeats` times, in turns, with one child process where it has any, once before the
clock starts. `agree` counts cases whose score is the expected one: `right` are cases that are expected to be right, `wrong` the
others; a case without a score agrees with nothing. Speed is the median over the repeats, relative to `math`.
Run: OMP_NUM_THREADS=1 python tests/benchmarks/verifiers.py cases.json [more.json …] [--show prime]
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from ziprc.rewards.base import Grade, Item
from ziprc.rewards.exact import ExactGrader
from ziprc.rewards.gsm8k import Gsm8kGrader
from ziprc.rewards.hendrycks import HendrycksGrader
from ziprc.rewards.math import MathGrader
from ziprc.rewards.prime import PrimeGrader

TIMEOUT_S = 5.0


def cases_of(path: Path) -> list[tuple[str, Item, float]]:
    """Id, response and expected score of the cases that have all of them."""
    found = []
    for case in json.loads(path.read_text()):
        asked = case["input"] if isinstance(case["input"], dict) else {}
        call = asked.get("call")
        if case["expected"] in (0.0, 1.0) and {"reference", "response"} <= set(asked) and "Math" in (call or "Math"):
            found.append((case["id"], Item((), asked["response"], asked["reference"]), float(case["expected"])))
    return found


def row(name: str, cases: list[tuple[str, Item, float]], grades: list[Grade]) -> str:
    right, wrong = [], []
    for (_, _, expected), grade in zip(cases, grades, strict=True):
        (right if expected else wrong).append(grade.score == expected)
    agree, none = sum(right) + sum(wrong), sum(grade.score is None for grade in grades)
    return (
        f"  {name:14} {agree:4} of {len(cases)}   right {sum(right):4} of {len(right):3}   wrong {sum(wrong):4} of {len(wrong):3}"
        f"   no score {none}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--show", help="print where this rule does not agree")
    options = parser.parse_args()
    files = {path: cases_of(path) for path in options.cases}
    everything = [item for cases in files.values() for _, item, _ in cases]
    seconds: dict[str, list[float]] = {}
    with contextlib.ExitStack() as stack:
        graders = {
            "math": stack.enter_context(MathGrader(TIMEOUT_S)),
            "prime": stack.enter_context(PrimeGrader(TIMEOUT_S)),
            "prime, legacy": stack.enter_context(PrimeGrader(TIMEOUT_S, legacy=True)),
            "hendrycks": HendrycksGrader(),
            "gsm8k": Gsm8kGrader(),
            "exact": ExactGrader(),
        }
        grades = {name: grader.grade(everything) for name, grader in graders.items()}
        for _ in range(options.repeats):
            for name, grader in graders.items():
                began = time.perf_counter()
                again = grader.grade(everything)
                seconds.setdefault(name, []).append(time.perf_counter() - began)
                assert again == grades[name], f"{name}: another run, another grade"
    start = 0
    for path, cases in files.items():
        print(f"{path.name}: {len(cases)} cases")
        for name, found in grades.items():
            part = found[start : start + len(cases)]
            print(row(name, cases, part))
            for (case, item, expected), grade in zip(cases, part, strict=True):
                if name == options.show and grade.score != expected:
                    print(
                        f"    {case}: {item.answer!r} and {item.response[-80:]!r}: {grade.score}, expected {expected}"
                    )
        start += len(cases)
    today, load = datetime.date.today(), os.getloadavg()[0]
    print(f"speed, responses a second relative to math, median of {options.repeats} on {today}, load {load:.1f}")
    for name, times in seconds.items():
        print(f"  {name:14} {statistics.median(seconds['math']) / statistics.median(times):8.1f}")


if __name__ == "__main__":
    main()
