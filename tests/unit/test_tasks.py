"""Tasks: what is asked, which split it belongs to, and what counts as the answer of a response."""

from __future__ import annotations

import csv
import json
import random
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from tests.doubles import World
from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.evaluation.samplers.pools import _texts
from ziprc.stages import prompts as prompts_stage
from ziprc.store.layout import Layout
from ziprc.tables.prompts import PROMPTS, check_disjoint
from ziprc.tasks import arithmetic
from ziprc.tasks.arithmetic import MIX, SLIPS, TASK, Chain, columns_step, direct_step, split_step, work_out
from ziprc.tasks.base import Prompt, TeachingTask, get_task, split_of
from ziprc.tasks.countdown import count_solutions, needs_muldiv
from ziprc.tasks.expressions import parse_expression
from ziprc.tasks.generated import apportion
from ziprc.tasks.hub import last_boxed, normalise

NESTED_OR_LONG = ["(" * 50 + "1" + ")" * 50, "1+" * 150 + "1"]


def always() -> bool:
    return True


def never() -> bool:
    return False


def chain_of(content: str) -> Chain:
    match = re.match(r"Compute (\d+)(.*)", content)
    assert match
    return Chain(int(match[1]), tuple((s[0], int(s[1:])) for s in re.findall(r"[+-]\d+", match[2])))


# --- lookup and mix -------------------------------------------------------------------------------------------------


def test_a_misspelt_task_names_the_nearest_one() -> None:
    with pytest.raises(UserError, match="arithmetic"):
        get_task("arithmetics")


def test_generated_tasks_can_teach_and_the_hub_cannot() -> None:
    assert isinstance(get_task("arithmetic"), TeachingTask)
    assert isinstance(get_task("countdown"), TeachingTask)
    assert not isinstance(get_task("hub"), TeachingTask)


def test_apportioned_counts_sum_to_the_count() -> None:
    assert apportion(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert apportion(7, {"a": 0.5, "b": 0.0, "c": 0.5}) == {"a": 4, "c": 3}


def test_split_shares_are_realised() -> None:
    shares = {"train": 0.8, "test": 0.2}
    realised = Counter(split_of(f"problem {i}", shares) for i in range(5000))
    assert realised["test"] / 5000 == pytest.approx(0.2, abs=0.02)  # 3.5 standard deviations


# --- arithmetic -----------------------------------------------------------------------------------------------------


def test_prompts_repeat_for_the_same_seed_and_differ_for_another() -> None:
    task = get_task("arithmetic")
    assert task.prompts({}, "test", 50, 1) == task.prompts({}, "test", 50, 1)
    assert task.prompts({}, "test", 50, 1) != task.prompts({}, "test", 50, 2)


def test_toy_sized_splits_have_the_mix_asked_for_and_hundreds_of_prompts_in_every_cell() -> None:
    prompts = get_task("arithmetic").prompts({}, "test", 2400, 0)
    cells = Counter(prompt.difficulty for prompt in prompts)
    assert len({prompt.prompt_id for prompt in prompts}) == 2400
    assert min(cells.values()) >= 100
    assert cells == apportion(2400, MIX)


def test_splits_and_traces_share_no_problem() -> None:
    task = get_task("arithmetic")
    ids = {split: {p.prompt_id for p in task.prompts({}, split, 400, 3)} for split in ("train", "validation", "test")}
    ids["base"] = {prompt.prompt_id for prompt, _ in task.traces({}, 2000, 3)}
    splits = list(ids)
    assert all(ids[a].isdisjoint(ids[b]) for a in splits for b in splits if a != b)


def test_commuted_chains_are_one_problem() -> None:
    chains_ = [Chain(47, (("+", 39), ("-", 6))), Chain(39, (("+", 47), ("-", 6))), Chain(47, (("-", 6), ("+", 39)))]
    assert len({chain.canonical for chain in chains_}) == 1
    assert chains_[0].canonical != Chain(47, (("+", 39), ("+", 6))).canonical


def test_a_cell_that_is_too_small_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"'1 step, small'.*400 wanted, \d+ found"):
        get_task("arithmetic").prompts({"mix": {"1 step, small": 1.0}}, "test", 400, 0)


@pytest.mark.parametrize("style", ["direct", "split", "columns"])
@pytest.mark.parametrize("cell", ["3 steps, small", "3 steps, medium", "3 steps, big"])
def test_without_slips_every_style_ends_on_the_value(style: str, cell: str) -> None:
    rng = random.Random(5)
    for _ in range(300):
        chain = TASK.draw(rng, cell, arithmetic.Settings())
        assert work_out(chain, style, never)[1] == chain.value


def test_steps_read_as_documented() -> None:
    assert direct_step(47, "+", 8, never) == ("+8=55", 55)
    assert split_step(47, "+", 8, never) == ("+8>50+5=55", 55)
    assert split_step(347, "+", 286, never) == ("+286>547+86>627+6=633", 633)
    assert columns_step(347, "+", 286, never) == ("+286=7+6=13,4+8+1=13,3+2+1=6=633", 633)
    assert columns_step(52, "-", 38, never) == ("-38=12-8=4,5-3-1=1=14", 14)


def test_slips_are_in_the_text_and_change_the_result() -> None:
    assert direct_step(55, "-", 12, always) == ("-21=34", 34)
    assert direct_step(55, "-", 8, always) == ("-8=47", 47)  # nothing to swap in one digit
    assert split_step(47, "+", 8, always) == ("+8>50+8=58", 58)
    assert split_step(127, "+", 86, always) == ("+86>207+8=215", 215)
    assert columns_step(47, "+", 8, always) == ("+8=7+8=15,4=4=45", 45)
    assert columns_step(52, "-", 38, always) == ("-38=12-8=4,5-3=2=24", 24)


def test_traces_follow_the_response_format_and_contain_right_and_wrong_answers() -> None:
    task = get_task("arithmetic")
    graded = Counter()
    for prompt, trace in task.traces({}, 600, 0):
        answer = task.canonical_answer(trace.response)
        graded[trace.thinking, answer == prompt.answer] += 1
        assert trace.thinking == trace.response.startswith("<think>\n")
        assert trace.thinking == ("\n</think>\n\n" in trace.response)
        assert prompt.answer == str(chain_of(prompt.messages[0]["content"]).value)
    assert graded[False, False] == 0 and graded[False, True] > 15
    assert min(graded[True, True], graded[True, False]) > 100


def test_styles_are_recognised_by_their_separators() -> None:
    task = get_task("arithmetic")
    for _, trace in task.traces({"mix": {"3 steps, big": 1.0}, "non_thinking": 0.0}, 200, 0):
        assert task.style_of(trace.response) == trace.style
    assert task.style_of("43") is None


def test_a_style_has_one_number_in_every_pool_even_where_a_pool_lacks_another_style() -> None:
    responses = {"columns": "47+8=7+8=15,4+1=5=55", "direct": "47+8=55", "split": "47+8>50+5=55"}
    codes = {}
    for missing in (None, "columns"):
        texts = [f"<think>\n{text}\n</think>\n\n55" for style, text in responses.items() if style != missing]
        pool = pyarrow.table({"response_text": texts, "prompt_id": ["a"] * len(texts)})
        _, code, styles = _texts(get_task("arithmetic"), pool, np.ones(len(texts), bool))
        codes[missing] = [styles[int(c)] for c in code], code.tolist()
    assert codes[None] == (["columns", "direct", "split"], [0, 1, 2])
    assert codes["columns"] == (["direct", "split"], [1, 2])


def test_an_arithmetic_answer_is_an_integer_after_the_thinking_block() -> None:
    task = get_task("arithmetic")
    assert task.canonical_answer("<think>\n47+8=55\n</think>\n\n055") == "55"
    assert task.canonical_answer("55 ") == "55"
    assert task.canonical_answer("<think>\n47+8=55\n</think>\n\n") is None
    assert task.canonical_answer("about 55") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixx": {}}, "mixx\n"),
        ({"mix": {"three steps": 1.0}}, r"mix.three steps.*\n.*steps\?, \(small"),
        ({"mix": {"1 step, big": 0}}, "at least one weight above zero"),
        ({"mix": {"1 step, big": -1}}, r"mix.1 step, big\n.*greater than or equal to 0"),
        ({"styles": {"colums": 1.0}}, r"styles.colums.*\n.*'direct', 'split' or 'columns'"),
        ({"slips": {"dirct": {"big": 0.1}}}, r"slips.dirct.*\n.*'direct', 'split' or 'columns'"),
        ({"slips": {"direct": {"huge": 0.1}}}, "huge"),
        ({"slips": {"direct": {"big": 1.5}}}, r"slips.direct.big\n.*less than 1"),
    ],
)
def test_bad_arithmetic_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        get_task("arithmetic").prompts(settings, "train", 4, 0)


def test_a_slip_rate_changes_one_of_the_defaults() -> None:
    settings = arithmetic.Settings(slips={"direct": {"small": 0.2}})
    assert settings.slips["direct"] == {"small": 0.2, "medium": 0.5, "big": 0.7}
    assert settings.slips["split"] == SLIPS["split"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": {"6 numbers": 1.0}}, "mix.6 numbers"),
        ({"max_operand": 100}, r"max_operand\n.*less than or equal to 99"),
        ({"attempts": []}, "attempts"),
        ({"attempt": [2]}, "attempt\n"),
    ],
)
def test_bad_countdown_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        get_task("countdown").prompts(settings, "train", 4, 0)


def test_every_task_publishes_described_settings_and_imports_neither_torch_nor_datasets() -> None:
    source = """
import importlib, pkgutil, sys
import ziprc.tasks
found = []
for name in (module.name for module in pkgutil.iter_modules(ziprc.tasks.__path__)):
    module = importlib.import_module(f"ziprc.tasks.{name}")
    if hasattr(module, "TASK"):
        assert module.TASK.name == name, name
        for key, field in module.Settings.model_fields.items():
            assert field.description, (name, key)
        found.append(name)
assert found == ["arithmetic", "countdown", "hub", "multiplication", "worked"], found
assert not {"torch", "datasets", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", source], check=True)


def test_a_module_of_the_folder_that_is_no_task_is_refused() -> None:
    for name in ("base", "expressions", "generated", ""):
        with pytest.raises(UserError, match="Unknown task"):
            get_task(name)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="Unknown split 'dev'"):
        get_task("arithmetic").prompts({}, "dev", 4, 0)


# --- expressions and countdown --------------------------------------------------------------------------------------


def test_expressions_have_exact_values_and_operands() -> None:
    expression = parse_expression(" (5*3) - 2/4 ")
    assert expression.value() == Fraction(29, 2)
    assert expression.numbers() == (5, 3, 2, 4)
    assert parse_expression("7-2-1").value() == 4
    assert parse_expression("8/4/2").value() == 1
    with pytest.raises(ZeroDivisionError):
        parse_expression("3/(5-5)").value()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5+",
        "(5",
        "5)",
        "5 6",
        "-5",
        "5**2",
        "2^3",
        "x",
        "5=5",
        "1.5",
        "__import__('os')",
        "1" * 10,
        *NESTED_OR_LONG,
    ],
)
def test_anything_else_is_no_expression(text: str) -> None:
    with pytest.raises(ValueError):
        parse_expression(text)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("(5*3)-2", "3*5-2", True),
        ("9-(4-2)", "9-4+2", True),
        ("8/(4/2)", "8*2/4", True),
        ("(3-5)*(2-7)", "(5-3)*(7-2)", True),
        ("4-2", "4/2", False),
        ("2+2", "2*2", False),
        ("5+3-2", "5+3", False),
        ("3/(5-5)", "3/(5-5)", True),
    ],
)
def test_equivalent_writings_share_a_canonical_form(one: str, other: str, same: bool) -> None:
    assert (parse_expression(one).canonical() == parse_expression(other).canonical()) is same


def test_countdown_answers_solve_their_prompts() -> None:
    prompts = get_task("countdown").prompts({}, "test", 300, 0)
    for prompt in prompts:
        expression = parse_expression(prompt.answer or "")
        assert expression.value() == prompt.extra["target"]
        assert sorted(expression.numbers()) == sorted(prompt.extra["numbers"])
        numbers = ",".join(map(str, prompt.extra["numbers"]))
        assert prompt.messages[0]["content"] == f"Make {prompt.extra['target']} from {numbers}"
    assert Counter(prompt.difficulty for prompt in prompts) == {"3 numbers": 90, "4 numbers": 150, "5 numbers": 60}


def test_search_traces_mark_each_attempt_truthfully() -> None:
    task = get_task("countdown")
    for prompt, trace in task.traces({"non_thinking": 0.0}, 200, 1):
        reasoning, answer = trace.response.removeprefix("<think>\n").split("\n</think>\n\n")
        marks = re.findall(r"=(\d+)([<>!])", reasoning)
        assert marks
        for value, mark in marks:
            difference = int(value) - prompt.extra["target"]
            assert mark == ("!" if difference == 0 else "<" if difference < 0 else ">")
        expression = parse_expression(answer)
        assert (expression.value() == prompt.extra["target"]) == reasoning.endswith("!")


RAMBLING = {
    "mix": {"2 numbers": 1}, "max_operand": 99, "max_value": 199, "attempts": [1, 2], "careful": 0.2, "miss": 0.7,
    "ramble": 0.9, "non_thinking": 0,
}  # fmt: skip


def test_a_teacher_that_misses_and_rambles_does_so_and_no_more() -> None:
    traces = [trace.response for _, trace in get_task("countdown").traces(RAMBLING, 2000, 0)]
    attempts = [
        len(re.findall(r"[<>!](?=[\d\n])", text.partition("</think>")[0].removeprefix("<think>\n"))) for text in traces
    ]
    hits = np.array(["!" in text for text in traces])
    rambling = np.array(attempts) == 20
    assert set(attempts) == {1, 2, 20}
    assert 0.35 < hits.mean() < 0.45 and not (hits & rambling).any()
    assert 0.85 < rambling.sum() / (~hits).sum() < 0.95
    assert all(text.index("!") > text.rindex("=") for text, hit in zip(traces, hits, strict=True) if hit)
    largest = max(int(value) for text in traces for value in re.findall(r"=(\d+)", text))
    assert 99 < largest <= 199


def test_thousands_of_prompts_are_distinct_and_none_is_in_two_splits() -> None:
    task = get_task("countdown")
    prompts = {split: task.prompts(RAMBLING, split, count, 0) for split, count in (("train", 2000), ("test", 1000))}
    seen = {split: {(*sorted(p.extra["numbers"]), p.extra["target"]) for p in of} for split, of in prompts.items()}
    assert len(seen["train"]) == 2000 and len(seen["test"]) == 1000 and not seen["train"] & seen["test"]
    for prompt in [*prompts["train"], *prompts["test"]]:
        a, b = prompt.extra["numbers"]
        assert prompt.extra["needs_muldiv"] == (prompt.extra["target"] not in (a + b, a - b, b - a))
        assert prompt.extra["n_solutions"] >= 1


@pytest.mark.parametrize(
    ("numbers", "target", "solutions", "muldiv"),
    [((3, 5), 8, 1, False), ((3, 5), 15, 1, True), ((2, 2), 4, 2, False), ((2, 2), 1, 1, True), ((1, 1, 1), 3, 1, False),
     ((3, 5), 7, 0, True), ((1, 2, 3), 6, 3, False)],
)  # fmt: skip
def test_solutions_are_counted_up_to_algebra(
    numbers: tuple[int, ...], target: int, solutions: int, muldiv: bool
) -> None:
    assert count_solutions(numbers, target) == solutions
    assert needs_muldiv(numbers, target) is muldiv


def test_countdown_votes_merge_equivalent_expressions() -> None:
    task = get_task("countdown")
    one, other = "<think>\n5*3=15-2=13!\n</think>\n\n(5*3)-2", "3*5-2"
    assert task.canonical_answer(one) == task.canonical_answer(other)
    assert task.canonical_answer("no idea") is None


# --- multiplication -------------------------------------------------------------------------------------------------


def test_products_are_asked_and_split_by_their_factors_alone() -> None:
    task = get_task("multiplication")
    prompts = [prompt for split in ("train", "test") for prompt in task.prompts({}, split, 300, 0)]
    pairs = set()
    for prompt in prompts:
        left, right = map(int, re.findall(r"\d+", prompt.messages[0]["content"]))
        assert prompt.answer == str(left * right)
        assert prompt.difficulty == f"{len(str(left))} by {len(str(right))} digits"
        pairs.add((min(left, right), max(left, right)))
    assert len(pairs) == 600
    assert Counter(p.difficulty for p in prompts[:300]) == {
        "3 by 3 digits": 150,
        "2 by 2 digits": 75,
        "3 by 1 digits": 75,
    }


@pytest.mark.parametrize(("slip", "right"), [(0.0, (1.0, 1.0)), (0.2, (0.05, 0.6))])
def test_long_multiplication_is_right_unless_it_slips_and_its_answer_is_what_it_wrote(
    slip: float, right: tuple[float, float]
) -> None:
    task = get_task("multiplication")
    found = []
    for prompt, trace in task.traces({"slip": slip, "guesses": 0.0}, 300, 0):
        work, answer = trace.response.removeprefix("<think>\n").split("\n</think>\n\n")
        assert work.splitlines()[-1].endswith(f"={answer}")
        for line in work.splitlines():
            if "+" in line:
                a, b, total = map(int, re.findall(r"\d+", line))
                assert a + b == total
        assert (
            task.style_of(trace.response) in ("worked", "guessed") and task.canonical_answer(trace.response) == answer
        )
        found.append(answer == prompt.answer)
    assert right[0] <= np.mean(found) <= right[1]


def test_guesses_are_seldom_right() -> None:
    task = get_task("multiplication")
    traces = list(task.traces({"guesses": 1.0}, 200, 0))
    assert {task.style_of(trace.response) for _, trace in traces} == {"guessed"}
    assert np.mean([task.canonical_answer(trace.response) == prompt.answer for prompt, trace in traces]) < 0.05


# --- hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def problems(tmp_path):
    rows = [{"question": f"What is {i}+{i}?", "answer": f"So.\n#### {2 * i}", "level": i % 3} for i in range(200)]
    rows.append(dict(rows[0]))  # a duplicate
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_template_makes_the_problem_of_columns_and_hands_others_to_graders(tmp_path) -> None:
    path = tmp_path / "countdown.jsonl"
    rows = [{"nums": [i, i + 1, i + 2][: 2 + i % 2], "target": 2 * i} for i in range(40)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    settings = {
        "dataset": str(path), "template": "Make {target} from {nums}", "difficulty_column": "nums",
        "extra_columns": {"numbers": "nums", "target": "target"},
        "splits": {"train": "train[:30]", "validation": "train[30:35]", "test": "train[35:]"},
    }  # fmt: skip
    prompts = get_task("hub").prompts(settings, "train", 0, 0)
    assert len(prompts) == 30 and {prompt.difficulty for prompt in prompts} == {"2", "3"}
    by_text = {prompt.messages[0]["content"]: prompt for prompt in prompts}
    assert by_text["Make 6 from [3, 4, 5]"].extra == {"numbers": [3, 4, 5], "target": 6}
    assert by_text["Make 6 from [3, 4, 5]"].answer is None
    for wrong, words in (("Make {goal}", "no column 'goal'"), ("Make {", "cannot be read")):
        with pytest.raises(UserError, match=words):
            get_task("hub").prompts({**settings, "template": wrong}, "train", 0, 0)


def test_a_local_file_is_read_by_column_mapping(problems) -> None:
    settings = {
        "dataset": str(problems),
        "prompt_column": "question",
        "answer_marker": "####",
        "difficulty_column": "level",
        "instruction": "Answer with a number.",
    }
    splits = {split: get_task("hub").prompts(settings, split, 0, 0) for split in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == 200
    assert len({prompt.prompt_id for prompts in splits.values() for prompt in prompts}) == 200
    first = splits["train"][0]
    number = int(re.search(r"\d+", first.messages[0]["content"])[0])
    assert first.messages[0]["content"] == f"What is {number}+{number}?\nAnswer with a number."
    assert (first.answer, first.difficulty) == (str(2 * number), str(number % 3))


def test_beside_benchmarks_the_data_set_is_for_training_and_leaves_out_their_problems(problems, monkeypatch) -> None:
    import datasets

    benchmark = [{"problem": "What is  5+5?", "answer": "10", "level": 1}, {"problem": "x?", "answer": "1", "level": 1}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: benchmark)
    settings = {"dataset": str(problems), "prompt_column": "question", "benchmarks": ["math500"]}
    train = get_task("hub").prompts(settings, "train", 0, 0)
    assert len(train) == 199 and "What is 5+5?" not in {prompt.messages[0]["content"] for prompt in train}
    assert len(get_task("hub").prompts(settings, "test", 0, 0)) == 2
    with pytest.raises(UserError, match="has no split 'validation'"):
        get_task("hub").prompts(settings, "validation", 0, 0)


FORMATS = [".jsonl", ".json", ".csv", ".parquet"]


def in_format(rows: list[dict], path: Path) -> str:
    """The path, as text, of a file of the rows in the format that its suffix names."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_is_cut_as_the_library_cuts_and_no_prompt_is_in_two_splits(tmp_path, suffix: str) -> None:
    rows = [{"problem": f"What is {i}?", "answer": f"0{i}"} for i in range(400)]
    splits = {"train": "train[30%:]", "validation": "train[:50]", "test": "train[50:100]"}
    settings = {"dataset": in_format(rows, tmp_path / f"problems{suffix}"), "splits": splits}
    found = {split: get_task("hub").prompts(settings, split, 0, 0) for split in splits}
    assert {split: len(prompts) for split, prompts in found.items()} == {"train": 280, "validation": 50, "test": 50}
    assert {prompt.answer for prompt in found["validation"]} == {f"0{i}" for i in range(50)}
    tables = {split: table_of(prompts) for split, prompts in found.items()}
    check_disjoint(tables)


def test_a_split_leaves_out_what_another_holds_already(tmp_path) -> None:
    rows = [{"problem": f"What is {i % 30}?", "answer": str(i)} for i in range(100)]
    file = in_format(rows, tmp_path / "problems.jsonl")
    splits = {"train": "train", "validation": "train[5:20]", "test": "train[:10]"}
    sizes = {s: len(get_task("hub").prompts({"dataset": file, "splits": splits}, s, 0, 0)) for s in splits}
    assert sizes == {"train": 10, "validation": 10, "test": 10}
    half = {"dataset": file, "splits": {"train": "train"}}  # validation and test by hash
    found = {split: get_task("hub").prompts(half, split, 0, 0) for split in ("train", "validation", "test")}
    check_disjoint({split: table_of(prompts) for split, prompts in found.items()})
    with pytest.raises(UserError, match=r"no prompt for 'validation'.*what is in test too is left out"):
        get_task("hub").prompts({"dataset": file, "splits": dict.fromkeys(splits, "train")}, "validation", 0, 0)


def table_of(prompts: list[Prompt]) -> pyarrow.Table:
    rows = [{**vars(p), "messages": list(p.messages), "extra": json.dumps(p.extra)} for p in prompts]
    return PROMPTS.make(rows)


def test_answers_are_read_as_they_are_written(tmp_path) -> None:
    path = tmp_path / "problems.csv"
    path.write_bytes(b'\xef\xbb\xbfproblem,answer\n"a,\nb",007\nNA,1.50\nc,2020-01-01\n')
    prompts = get_task("hub").prompts({"dataset": str(path), "splits": {"test": "train"}}, "test", 0, 0)
    assert {p.messages[0]["content"]: p.answer for p in prompts} == {"a,\nb": "007", "NA": "1.50", "c": "2020-01-01"}
    lines = ['{"problem": "a\u2028b", "answer": 1}', "", '{"problem": "c", "answer": 2.5}', '{"problem": "d"}']
    path = tmp_path / "problems.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    prompts = get_task("hub").prompts({"dataset": str(path), "splits": {"test": "train"}}, "test", 0, 0)
    assert {p.messages[0]["content"]: p.answer for p in prompts} == {"a\u2028b": "1", "c": "2.5", "d": None}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("problems.jsonl", '{"problem": "a", "answer": "1"}\n{"problem"}\n', "line 2, column 11"),
        ("problems.json", '{"problem": ["a"], "answer": ["1"]}', "expected a list of rows"),
        ("problems.csv", "problem,answer\na,1,2\n", "expected a list of rows"),
        ("problems.csv", 'problem,answer\n"a,1\n', "unexpected end"),
        ("problems.tsv", "problem\tanswer\n", r"none of the formats.*\.csv"),
        ("problems.jsonl", '{"problem": ["a"], "answer": "1"}', r"list of messages.*found \"\['a'\]\""),
        ("problems.jsonl", "", r"no prompt for 'train' \(0 rows"),
    ],
)
def test_a_file_that_holds_no_rows_is_refused_at_once(tmp_path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        get_task("hub").prompts({"dataset": str(tmp_path / name)}, "train", 4, 0)


@pytest.mark.parametrize(("split", "message"), [("test", r"Unknown split \"test\""), ("train[:5", r"train\[:5")])
def test_a_file_has_the_one_split_train(problems, split: str, message: str) -> None:
    settings = {"dataset": str(problems), "prompt_column": "question", "splits": {"test": split}}
    with pytest.raises(UserError, match=f"{message}.*one split, 'train'"):
        get_task("hub").prompts(settings, "test", 4, 0)


def prompt_of(name: str, text: str, source: str = "a") -> Prompt:
    return Prompt(name, "hub", source, "any", ({"role": "user", "content": text},), "1", "a")


def test_splits_that_share_a_prompt_are_refused_by_id_and_by_content() -> None:
    train = table_of([prompt_of(f"id{i}", f"What is {i}?") for i in range(9)])
    test = table_of([prompt_of("other", "What is 100?"), prompt_of("id7", "asked in other words")])
    check_disjoint({"train": train})
    check_disjoint({"train": train, "test": test.slice(0, 1)})
    with pytest.raises(UserError, match=r"'test' and 'train' are not disjoint: 1 of 'test'.*\(id7\)"):
        check_disjoint({"train": train, "test": test})
    copies = [prompt_of(f"math{i}", f"What  is\n{i}?", source="math500") for i in range(7)]
    with pytest.raises(UserError, match=r"7 of 'test' are in 'train' too \(math0, there id0, .* and 2 more\)"):
        check_disjoint({"train": train, "validation": test.slice(0, 1), "test": table_of(copies)})


def test_the_stage_says_that_a_split_has_fewer_prompts_than_asked_for(problems, tmp_path, capsys) -> None:
    splits = {"train": "train[:50]", "validation": "train[50:60]", "test": "train[60:70]"}
    settings = {"dataset": str(problems), "prompt_column": "question", "splits": splits}
    config = Config.model_validate({"prompts": {"task": "hub", "settings": settings, "train": 80}})
    line = prompts_stage.run(World(config, Layout(tmp_path, "own")).context("prompts", "train"))
    assert "wrote 50 prompts" in line and "fewer than prompts.train = 80" in line
    assert "fewer than prompts.train = 80" in capsys.readouterr().err
    config = Config.model_validate({"prompts": {"task": "hub", "settings": settings, "train": 50}})
    assert "fewer" not in prompts_stage.run(World(config, Layout(tmp_path, "own")).context("prompts", "train"))
    assert not capsys.readouterr().err


def test_parquet_reads_like_jsonl_and_the_cap_holds(problems, tmp_path) -> None:
    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    file = in_format(rows, tmp_path / "problems.parquet")
    settings = {"dataset": str(problems), "prompt_column": "question", "splits": {"train": "train"}, "shuffle_seed": 7}
    same = {**settings, "dataset": file}
    first, second = (get_task("hub").prompts(s, "train", 20, 0) for s in (settings, same))
    assert len(first) == 20
    assert [p.messages for p in first] == [p.messages for p in second]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"benchmarks": ["gsm8"]}, "did you mean 'gsm8k'"),
        ({"datset": "x"}, "datset\n"),
        ({"dataset": "x", "splits": {"dev": "train"}}, r"splits.dev.*\n.*'train', 'validation' or 'test'"),
    ],
)
def test_bad_hub_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        get_task("hub").prompts(settings, "test", 4, 0)


@pytest.mark.parametrize(
    ("settings", "message"), [({}, "name a `dataset`"), ({"dataset": "missing.parquet"}, "does not exist")]
)
def test_data_that_are_not_there_are_named(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task("hub").prompts(settings, "test", 4, 0)


def test_a_missing_column_lists_the_columns_found(problems) -> None:
    with pytest.raises(UserError, match=r"no column 'problem'.*answer, level, question"):
        get_task("hub").prompts({"dataset": str(problems)}, "train", 4, 0)


def test_a_truncated_file_is_refused(tmp_path) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"cannot be read: .*has to be parquet"):
        get_task("hub").prompts({"dataset": str(path)}, "train", 4, 0)


def test_an_unreadable_hub_says_which_stage_needs_network_and_how_to_fetch(monkeypatch) -> None:
    import datasets

    def offline(*args, **options):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"stage `prompts` needs network.*make fetch EXPERIMENT=.*HF_HOME"):
        get_task("hub").prompts({"benchmarks": ["math500"]}, "test", 4, 0)


def test_benchmarks_read_final_answers(monkeypatch) -> None:
    import datasets

    asked = {}

    def load(name, config, split, revision):
        asked[name] = (config, split)
        return [{"question": "1+1?", "answer": "1+1=2\n#### 2", "problem": "p", "solution": "long", "level": 3}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    gsm8k, math500 = get_task("hub").prompts({"benchmarks": ["gsm8k", "math500"]}, "test", 0, 0)
    assert (gsm8k.answer, gsm8k.source) == ("2", "gsm8k")
    assert (math500.source, math500.difficulty) == ("math500", "3")
    assert asked == {"openai/gsm8k": ("main", "test"), "HuggingFaceH4/MATH-500": (None, "test")}


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>\nmaybe \\boxed{7}\n</think>\n\nSo \\boxed{\\dfrac{1}{2}}.", "\\frac{1}{2}"),
        ("The answer is 1,234.0 dollars, I think, after all that has been said about it here.", "1234"),
        ("so\n#### 42", "42"),
        ("$x+1$", "x+1"),
        ("", None),
        ("\\boxed{unclosed", "\\boxed{unclosed"),
    ],
)
def test_hub_answers_are_normalised_for_voting(response: str, answer: str | None) -> None:
    assert get_task("hub").canonical_answer(response) == answer


def test_boxes_may_nest() -> None:
    assert last_boxed(r"\boxed{1} and \boxed{\frac{a}{b}}") == r"\frac{a}{b}"
    assert normalise(r"\text{Monday}.") == "Monday"
