"""Tasks: what is asked, which split it belongs to, and what counts as the answer of a response."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from ziprc.errors import UserError
from ziprc.tasks.arithmetic import DEFAULTS, Chain, columns_step, direct_step, draw_chain, split_step, work_out
from ziprc.tasks.base import TeachingTask, apportion, get_task, split_of
from ziprc.tasks.countdown import chains, solve
from ziprc.tasks.expressions import parse_expression
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
    with pytest.raises(UserError, match="above zero"):
        apportion(3, {"a": 0})


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
    assert cells == apportion(2400, DEFAULTS["mix"])


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
        chain = draw_chain(rng, cell)
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


def test_an_arithmetic_answer_is_an_integer_after_the_thinking_block() -> None:
    task = get_task("arithmetic")
    assert task.canonical_answer("<think>\n47+8=55\n</think>\n\n055") == "55"
    assert task.canonical_answer("55 ") == "55"
    assert task.canonical_answer("<think>\n47+8=55\n</think>\n\n") is None
    assert task.canonical_answer("about 55") is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixx": {}}, "did you mean 'mix'"),
        ({"mix": {"three steps": 1.0}}, "no cell of the difficulty mix"),
        ({"styles": {"colums": 1.0}}, "did you mean 'columns'"),
        ({"slips": {"direct": {"huge": 0.1}}}, "huge"),
        ({"slips": {"direct": {"big": 1.5}}}, "1.5"),
    ],
)
def test_bad_arithmetic_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task("arithmetic").prompts(settings, "train", 4, 0)


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


def test_the_solver_is_exact() -> None:
    assert parse_expression(solve((3, 3, 8, 8), 24) or "").value() == 24  # needs the fraction 8/(3-8/3)
    assert solve((1, 1, 1), 5) is None
    assert {attempt.values[-1] for attempt in chains((2, 3))} == {5, 6, 1}


def test_search_traces_mark_each_attempt_truthfully() -> None:
    task = get_task("countdown")
    for prompt, trace in task.traces({"non_thinking": 0.0}, 200, 1):
        reasoning, answer = trace.response.removeprefix("<think>\n").split("\n</think>\n\n")
        for value, mark in re.findall(r"=(\d+)([<>!])", reasoning):
            difference = int(value) - prompt.extra["target"]
            assert mark == ("!" if difference == 0 else "<" if difference < 0 else ">")
        expression = parse_expression(answer)
        assert (expression.value() == prompt.extra["target"]) == reasoning.endswith("!")


def test_countdown_votes_merge_equivalent_expressions() -> None:
    task = get_task("countdown")
    one, other = "<think>\n5*3=15-2=13!\n</think>\n\n(5*3)-2", "3*5-2"
    assert task.canonical_answer(one) == task.canonical_answer(other)
    assert task.canonical_answer("no idea") is None


# --- hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def problems(tmp_path):
    rows = [{"question": f"What is {i}+{i}?", "answer": f"So.\n#### {2 * i}", "level": i % 3} for i in range(200)]
    rows.append(dict(rows[0]))  # a duplicate
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


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


def test_beside_benchmarks_the_data_set_is_for_training_only(problems) -> None:
    settings = {"dataset": str(problems), "prompt_column": "question", "benchmarks": ["math500"]}
    assert len(get_task("hub").prompts(settings, "train", 0, 0)) == 200
    with pytest.raises(UserError, match="has no split 'validation'"):
        get_task("hub").prompts(settings, "validation", 0, 0)


def test_parquet_reads_like_jsonl_and_the_cap_holds(problems, tmp_path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [json.loads(line) for line in problems.read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "problems.parquet")
    settings = {"dataset": str(problems), "prompt_column": "question", "splits": {"train": "train"}, "shuffle_seed": 7}
    same = {**settings, "dataset": str(tmp_path / "problems.parquet")}
    first, second = (get_task("hub").prompts(s, "train", 20, 0) for s in (settings, same))
    assert len(first) == 20
    assert [p.messages for p in first] == [p.messages for p in second]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"benchmarks": ["gsm8"]}, "did you mean 'gsm8k'"),
        ({"datset": "x"}, "did you mean 'dataset'"),
        ({}, "name a `dataset`"),
        ({"dataset": "missing.parquet"}, "does not exist"),
    ],
)
def test_bad_hub_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_task("hub").prompts(settings, "test", 4, 0)


def test_a_missing_column_lists_the_columns_found(problems) -> None:
    with pytest.raises(UserError, match=r"no column 'problem'.*answer, level, question"):
        get_task("hub").prompts({"dataset": str(problems)}, "train", 4, 0)


def test_a_truncated_file_is_refused(tmp_path) -> None:
    path = tmp_path / "broken.parquet"
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="cannot be read as parquet"):
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
