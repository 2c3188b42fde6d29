"""Rules of public reward data: what each accepts, which holes of the published ones are shut, and which source has which rule."""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.doubles import TABLES, World, tiny_tables
from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.rewards import by_source
from ziprc.rewards.base import Item
from ziprc.rewards.by_source import TABLE, BySourceGrader, NoScore, compute_score, rule_of
from ziprc.rewards.gsm8k import Gsm8kGrader
from ziprc.rewards.hendrycks import HendrycksGrader, last_box, written
from ziprc.rewards.prime import PrimeGrader, answer_of, plain
from ziprc.stages import grades as stage
from ziprc.store.layout import Layout
from ziprc.store.manifest import write_manifest
from ziprc.systems.shared import grading_keys
from ziprc.tables.grades import GRADES, GradeStatus
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tasks.hub import BENCHMARKS


def asked(response: str, answer: str | None, source: str = "", **extra: object) -> Item:
    return Item((), response, answer, extra, source)


# --- gsm8k


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        ("9 * 2 = 18\n#### 18", "18", 1),
        ("#### 1,800", "1800", 1),
        ("#### -3", "-3", 1),
        ("#### 18\nwait, #### 19", "18", 1),  # the first one counts
        ("#### 18", "1,8", 1),
        ("<think>\n#### 17\n</think>\n#### 18", "18", 1),
        ("#### 18.0", "18", 0),  # text, not a number
        ("#### 18.", "18", 0),
        ("####18", "18", 0),
        ("#### $18", "18", 0),
        ("The answer is 18", "18", 0),
        ("", "18", 0),
    ],
)
def test_gsm8k_is_the_first_marked_number_as_text(response: str, answer: str, score: float) -> None:
    assert Gsm8kGrader().grade([asked(response, answer)])[0].score == score


# --- hendrycks


@pytest.mark.parametrize(
    ("response", "answer", "score"),
    [
        (r"\boxed{\dfrac12}", r"\frac{1}{2}", 1),
        (r"\boxed{\frac1{72}}", r"\frac{1}{72}", 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", 1),
        (r"\boxed{3/4}", r"\frac{3}{4}", 1),
        (r"\boxed{x = 5}", "5", 1),
        (r"\boxed{\sqrt3}", r"\sqrt{3}", 1),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)", 1),
        (r"\boxed{90^\circ}", "90", 1),
        (r"\boxed{15\%}", "15", 1),
        (r"\boxed{\$ 7}", "7", 1),
        (r"\boxed{.5x}", "0.5x", 1),
        (r"\boxed{20 \text{ cm}}", "20", 1),
        (r"first \boxed{1}, then \boxed{2}", "2", 1),
        (r"so $\boxed 42$", "42", 1),
        (r"$\fbox{42}$", "42", 1),
        (r"\boxed{42}", r"Adding both gives \boxed{42}.", 1),
        (r"\boxed{0.25}", r"\frac{1}{4}", 0),
        (r"\boxed{x+2}", "2+x", 0),
        (r"\boxed{1800}", "18", 0),
        (r"\boxed{42", "42", 0),
        ("42", "42", 0),
    ],
)
def test_hendrycks_compares_the_last_box_as_text(response: str, answer: str, score: float) -> None:
    assert HendrycksGrader().grade([asked(response, answer)])[0].score == score


def test_a_box_ends_at_its_own_brace() -> None:
    assert last_box(r"\boxed{\frac{1}{2}} and }") == r"\frac{1}{2}"
    assert last_box("no box") is None and last_box("\\boxed") is None
    assert written(written(r"\frac12 + .5")) == written(r"\frac12 + .5")


# --- prime


@pytest.fixture(scope="module")
def prime() -> Iterator[PrimeGrader]:
    with PrimeGrader(timeout_s=5) as grader:
        yield grader


@pytest.fixture(scope="module")
def published() -> Iterator[PrimeGrader]:
    with PrimeGrader(timeout_s=5, legacy=True) as grader:
        yield grader


@pytest.mark.parametrize(
    ("text", "found", "published"),
    [
        ("So the answer is 18. That is all", "18", "18"),
        ("Answer: x = 5", "5", "5"),
        ("18 is the answer to it", "18", "18"),
        (r"The answer is \boxed{3}. Is it?", "3", "3"),
        (r"\boxed{x=5}", "x=5", "5"),  # the box of ours is what stands in it
        (r"\boxed{\text{this is A}}", r"\text{this is A}", "A}"),
        (r"\boxed{this is A}", "this is A", "A"),
        (r"\boxed{3. 5}", "3. 5", "3"),
        (r"We get \boxed{7}. So the answer is clear", "7", "clear"),
        ("**Final answer:** 58", "58", "** 58"),
    ],
)
def test_an_answer_is_found_by_words_and_a_box_is_left_alone(text: str, found: str, published: str) -> None:
    assert answer_of(text) == found
    assert answer_of(text, legacy=True) == published


LENIENT = [
    (r"\boxed{x=5}", "5", 1), (r"\boxed{5}", "x=5", 1), (r"\boxed{20\text{ cm}^2}", "20", 1), (r"\boxed{70,000}", "70000", 1),
    (r"\boxed{11111111100}", r"11,\! 111,\! 111,\! 100", 1),
    (r"\boxed{2\frac{1}{2}}", "2.5", 1), (r"\boxed{15\%}", "15", 1), (r"\boxed{033}", "33", 1), (r"\boxed{18.0}", "18", 1),
    (r"\boxed{x+2}", "2+x", 1), (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1), (r"\boxed{(1, \frac{1}{2})}", "(1,0.5)", 1),
    (r"\boxed{\begin{bmatrix}1&0\\0&1\end{bmatrix}}", r"\begin{bmatrix} 1 & 0 \\ 0 & 1 \end{bmatrix}", 1),
    (r"\boxed{\begin{pmatrix}1&x+1\\0&1\end{pmatrix}}", r"\begin{bmatrix} 1 & 1+x \\ 0 & 1 \end{bmatrix}", 1),
    (r"\boxed{0.3333}", r"\frac{1}{3}", 1), (r"\boxed{9.42}", r"3\pi", 1), (r"\boxed{9.4248}", r"3\pi", 1),
    ("The answer is yes.", r"\text{Yes}", 1),
    (r"\boxed{[1,2)}", "(1,2)", 0), (r"\boxed{(2,1)}", "(1,2)", 0), (r"\boxed{(1,2,3)}", "(1,2)", 0),
    (r"\boxed{\frac{2}{4}}", r"\frac{1}{2}", 0), (r"\boxed{2/4}", "1/2", 0), (r"\boxed{1/0}", "0.5", 0),
    (r"\boxed{on}", "No", 0), (r"\boxed{1.2.3}", "0.36", 0), (r"\boxed{52_9}", "52_8", 0), (r"\boxed{5}", r"5 \text{ or } -5", 0),
    (r"\boxed{x+y+z}", "z+y+x", 0),  # three unknown letters are not simplified
    (r"\boxed{}", "5", 0), ("", "5", 0),
]  # fmt: skip


@pytest.mark.parametrize(("response", "answer", "score"), LENIENT)
def test_prime_is_lenient_about_writing_and_not_about_values(
    prime: PrimeGrader, response: str, answer: str, score: float
) -> None:
    grade = prime.grade([asked(response, answer)])[0]
    assert (grade.score, grade.status) == (score, GradeStatus.GRADED)


HOLES = [
    ("1800", "18"), ("0.18", "18"), ("17.9999", "18"), ("50", "0.5"), ("0.005", "0.5"), (r"100\pi", r"\pi"), ("15", "0.15"),
]  # fmt: skip


@pytest.mark.parametrize(("response", "answer"), HOLES)
def test_a_hundred_times_the_reference_is_right_as_published_alone(
    prime: PrimeGrader, published: PrimeGrader, response: str, answer: str
) -> None:
    item = asked(rf"\boxed{{{response}}}", answer)
    assert (prime.grade([item])[0].score, published.grade([item])[0].score) == (0, 1)


@pytest.mark.parametrize(("response", "answer"), [("180", "18"), ("2000", "18"), ("19", "18"), ("2/4", "1/2")])
def test_what_the_published_rule_calls_wrong_is_wrong(published: PrimeGrader, response: str, answer: str) -> None:
    assert published.grade([asked(rf"\boxed{{{response}}}", answer)])[0].score == 0


def test_one_writing_for_an_answer() -> None:
    same = [r"\dfrac{1}{2}", "1/2", r"\frac12", "$1/2$", r"\frac{1}{2} \text{ miles}", r" 1 / 2 cm^2"]
    assert {plain(text) for text in same} == {"1/2"}
    assert {plain(text) for text in ("-2 1/3", r"-2\frac{1}{3}", r"-2\frac13")} == {"-(2+1/3)"}
    assert plain("today") == "today", "a unit is a word"


def test_prime_survives_hostile_answers_and_long_ones() -> None:
    began = time.monotonic()
    hostile = "{x}" + "!" * 8  # a tower of factorials
    with PrimeGrader(timeout_s=1) as grader:
        grades = grader.grade(
            [
                asked(r"\boxed{9^9^9^9}", "0.5"),
                asked(r"\boxed{((((9!)!)!)!)!}", r"\sqrt{2}"),
                asked("answer is " * 20_000 + "5", "5"),
                asked("\\boxed{" * 20_000, "5"),
                asked(hostile, "5"),
                asked(r"\boxed{\sqrt{4}+x}", "x+2"),
            ]
        )
    assert [grade.score for grade in grades] == [0, None, 1, 0, 0, 1]
    assert grades[1].status in (GradeStatus.TIMEOUT, GradeStatus.ERROR)
    assert time.monotonic() - began < 60


# --- by source


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("openai/gsm8k", "gsm8k"), ("grade", "grade"), (" Grade ", "grade"), ("math", "hendrycks"), ("MATH", "hendrycks"),
        ("lighteval/MATH", "hendrycks"), ("DigitalLearningGmbH/MATH-lighteval", "hendrycks"), ("simplelr_qwen", "hendrycks"),
        ("polaris_mathverify", "math"), ("numina_aops_forum", "prime"), ("numina_synthetic_math", "prime"),
        ("numina_amc_aime", "prime"), ("numina_synthetic_amc", "prime"), ("numina_cn_k12", "prime"),
        ("numina_olympiads", "prime"), ("polaris_prime", "prime"), ("OLYMPIAD_BENCH", "prime"), ("MINERVA", "prime"),
        ("AMC", "prime"), ("AIME", "prime"),
    ],
)  # fmt: skip
def test_sources_have_the_published_rules(source: str, rule: str) -> None:
    assert rule_of(source) == (rule, "")


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("openai/gsm8k ", "no rule is known for it (did you mean 'openai/gsm8k'?)"), ("aime", "no rule is known for it"),
        ("numina_olympiad", "did you mean 'numina_olympiads'"), ("", "no rule is known"), ("_prime", "no rule is known"),
        ("my_prime_data", "no rule is known"), ("apps", "by running the code"), ("codecontests", "by running the code"),
        ("codeforces", "by running the code"), ("taco", "by running the code"), ("polaris_tinyv", "graded by a model"),
        ("x_mathverify_tinyv", "graded by a model"), ("HardVerify-Math", "graded by a model"),
    ],
)  # fmt: skip
def test_other_sources_are_refused_and_say_why(source: str, why: str) -> None:
    rule, found = rule_of(source)
    assert rule is None and why in found
    assert why in str(BySourceGrader(1).lacks(asked("", "1", source)))
    with pytest.raises(UserError, match=re.escape(why)):
        BySourceGrader(1).grade([asked("1", "1", source)])


def test_the_named_benchmarks_have_a_rule() -> None:
    assert {rule_of(name) for name in BENCHMARKS} == {("math", "")}


def test_every_row_of_the_table_is_reached_and_known() -> None:
    grader = BySourceGrader(1)
    for row in TABLE:
        assert bool(row.rule) != bool(row.refused) and (row.refused or row.rule in grader.graders)
        for source in (*row.names, *([f"x{row.suffix}"] if row.suffix else [])):
            assert rule_of(source) == (row.rule or None, row.refused)


def test_every_response_is_graded_by_its_own_rule_in_order() -> None:
    items = [
        asked("#### 18", "18", "arithmetic", data_source="openai/gsm8k"),  # of the data, and not of the table
        asked(r"\boxed{0.25}", r"\frac{1}{4}", "math"),
        asked(r"\boxed{0.25}", r"\frac{1}{4}", "x_mathverify"),
        asked(r"\boxed{0.25}", r"\frac{1}{4}", "AIME"),
        asked("Total Score: 5/10", "0.7", "grade"),
        asked("no total", "0.7", "grade"),
        asked(r"\boxed{1800}", "18", "AMC"),
    ]
    with BySourceGrader(5) as grader:
        grades = grader.grade(items)
    assert [grade.score for grade in grades] == pytest.approx([1, 0, 1, 1, 0.64, 0, 0])
    rules = [str(grade.rationale).partition(":")[0] for grade in grades]
    assert rules == ["gsm8k", "hendrycks", "math", "prime", "grade", "grade", "prime"]
    with BySourceGrader(5, legacy=True) as grader:
        assert grader.grade(items[-1:])[0].score == 1


def test_a_rule_needs_what_it_compares_with() -> None:
    grader = BySourceGrader(1)
    assert grader.lacks(asked("", None, "math")) == "a reference answer"
    assert grader.lacks(asked("", "7", "grade")) == "a teacher's score in [0, 1]"
    assert grader.lacks(asked("", "7", "math")) is None


# --- for other trainers


def score_in_a_child(answers: Any) -> None:
    answers.put(compute_score("x_mathverify", r"\boxed{0.5}", r"\frac{1}{2}"))


def test_other_trainers_get_scores_by_their_argument_names() -> None:
    ask = {"data_source": "AIME", "solution_str": r"so \boxed{033}", "ground_truth": 33, "extra_info": {"index": 0}}
    assert compute_score(**ask) == 1.0
    assert compute_score("grade", "Total Score: 5/10", 0.7) == pytest.approx(0.64)
    assert compute_score("x_mathverify", r"\boxed{0.5}", r"\frac{1}{2}") == 1.0
    forked = multiprocessing.get_context("fork")
    answers = forked.Queue()
    process = forked.Process(target=score_in_a_child, args=(answers,))
    process.start()
    assert answers.get(timeout=60) == 1.0, "a forked trainer has processes of its own"
    process.join(10)
    assert compute_score("x_mathverify", r"\boxed{0.25}", r"\frac{1}{2}") == 0.0


@pytest.mark.parametrize(
    ("source", "truth", "why"),
    [("numina_olympiad", "1", "did you mean 'numina_olympiads'"), ("apps", "1", "running the code"), ("math", "", "reference"),
     ("grade", 7, "teacher's score")],
)  # fmt: skip
def test_a_source_or_truth_that_cannot_be_used_is_an_error(source: str, truth: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        compute_score(source, "1", truth)


def test_a_failure_to_grade_is_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = by_source._Shared()
    monkeypatch.setattr(by_source, "_shared", lambda process: shared)
    crash = "import os, sys; print('{\"ready\": true}', flush=True); sys.stdin.readline(); os.abort()"
    shared.grader.symbolic[0].command = (sys.executable, "-c", crash)
    with pytest.raises(NoScore, match="error: math: the grading process ended"):
        compute_score("x_mathverify", "1", "2")


# --- the stage


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path, "tiny")
    tiny_tables(layout, "train", prompts=4, samples=2)
    return layout


def prompts_from(layout: Layout, source: str) -> None:
    rows = PROMPTS.read(layout.table("prompts", "train")).to_pylist()
    TABLES["prompts"].write(layout.table("prompts", "train"), PROMPTS.make([row | {"source": source} for row in rows]))
    write_manifest(layout.table("prompts", "train"), {}, {})


def run(layout: Layout, **settings: object) -> list[dict[str, object]]:
    stage.run(World(Config.model_validate({"grades": settings}), layout).context("grades", "train"))
    return GRADES.read(layout.table("grades", "train")).to_pylist()


@pytest.mark.parametrize("rule", ["gsm8k", "hendrycks", "prime"])
def test_rules_are_found_by_name(layout: Layout, rule: str) -> None:
    found = run(layout, rule=rule)
    assert {row["grader"] for row in found} <= {rule, "none"} and any(row["score"] is not None for row in found)


def test_a_table_from_a_known_source_is_graded_and_an_unknown_one_is_not(layout: Layout) -> None:
    before = layout.table("grades", "train").read_bytes()
    with pytest.raises(UserError, match=r"4 prompts lack a source with a rule .*'by_source' needs.*train-0"):
        run(layout, rule="by_source")
    assert layout.table("grades", "train").read_bytes() == before
    prompts_from(layout, "AIME")
    answers = {row["prompt_id"]: row["answer"] for row in PROMPTS.read(layout.table("prompts", "train")).to_pylist()}
    said = {row["rollout_id"]: row for row in ROLLOUTS.read(layout.table("rollouts", "train")).to_pylist()}
    found = [row for row in run(layout, rule="by_source") if row["status"] == "graded"]
    assert found and {row["rationale"] for row in found} == {"prime"}
    for row in found:
        rollout = said[str(row["rollout_id"])]
        if answer_of(rollout["response_text"].rpartition("</think>")[2].strip()) == answers[rollout["prompt_id"]]:
            assert row["score"] == 1


def test_params_of_a_rule_are_what_it_reads() -> None:
    def keys(rule: str) -> set[str]:
        return set(grading_keys(Config.model_validate({"grades": {"rule": rule}}))) - {"grades.rule", "grades.judge"}

    assert keys("prime") == keys("by_source") == {"grades.timeout_s", "grades.style"}
    assert keys("gsm8k") == keys("hendrycks") == keys("exact") == set()
