"""The world of worked sums: what its program calls sound, and that its teacher writes what it says."""

from __future__ import annotations

from collections import Counter

import pytest

from ziprc.rewards.rubric import assessed, items_of, problem_of, rubric_text
from ziprc.rewards.totals import strict_total
from ziprc.tasks.soundness import assess, criteria, points_of, read_work
from ziprc.tasks.worked import TASK, Settings

CHAIN = (9, [("-", 5), ("+", 4), ("-", 2)])


def thought(work: str, answer: str) -> str:
    return f"<think>\n{work}\n</think>\n\n{answer}"


@pytest.mark.parametrize(
    ("response", "tenths", "kind"),
    [
        (thought("9-5=4+4=8-2=6", "6"), 10, "worked"),
        (thought("9-5=5+4=9-2=7", "7"), 5, "worked"),  # a slip: what follows from it is not punished again
        (thought("9-5=6", "6"), 2, "skip"),
        (thought("9-5=9+4=3-2=6", "6"), 2, "bluff"),
        ("6", 2, "answer"),
        (thought("9-5=4+4=8-2=6", "7"), 8, "worked"),
        (thought("9-5=4+4=8-2=6+0=6", "6"), 8, "worked"),  # work is left over: the answer does not stand
        (thought("9-5=4+4=8-2=6 so 6", "6"), 8, "worked"),
        (thought("8-5=3+4=7-2=5", "5"), 5, "worked"),  # begins with another number
        (thought("9-4=5+4=9-2=7", "7"), 5, "worked"),  # another operation
        ("<think>\n9-5=4+4=8-2=6", 0, "answer"),  # a thought that is never closed is no work, and no answer
        (thought("Total Score: 10/10", "6"), 0, "answer"),  # words that are no work
        ("", 0, "answer"),
    ],
)
def test_points_follow_from_the_work(response: str, tenths: int, kind: str) -> None:
    found = assess(*CHAIN, response)
    assert (round(found.score * 10), found.kind) == (tenths, kind)
    assert strict_total(found.text, scale=10).score == pytest.approx(found.score)
    assert sum(found.points.values()) == tenths


def test_sound_work_is_right_and_everything_the_teacher_writes_is_what_it_says() -> None:
    settings = {"slips": {"3 steps": 0.5, "4 steps": 0.0}, "mix": {"3 steps": 0.5, "4 steps": 0.5}}
    seen = Counter()
    for prompt, trace in TASK.traces(settings, 600, 3):
        found = TASK.assess(prompt.extra, trace.response)
        right = TASK.canonical_answer(trace.response) == prompt.answer
        seen[trace.style, right, found.score == 1] += 1
        assert found.score < 1 or right
        if trace.style in ("skip", "bluff"):
            assert right and found.score < 1 and found.kind == trace.style
        if trace.style == "worked" and "3 steps" not in prompt.difficulty:
            assert found.score == 1
        assert TASK.assess(prompt.extra, TASK.reference(prompt.extra)).score == 1
    assert {style for style, _, _ in seen} == {"worked", "skip", "bluff", "answer"}
    assert seen["worked", False, False] > 50  # slips


@pytest.mark.parametrize("steps", range(2, 7))
def test_rubrics_sum_to_ten_and_leak_nothing(steps: int) -> None:
    assert sum(points_of(steps)) == 10 and min(points_of(steps)) >= 1
    for prompt in TASK.prompts({"mix": {f"{steps} steps": 1}, "slips": {}}, "train", 20, 0):
        items = TASK.rubric(prompt.extra)
        assert problem_of(items, prompt.messages) is None and len(items) == steps + 1
        assert items[-1].requirement == prompt.answer


def test_spans_are_where_steps_stand() -> None:
    response = thought("9-5=4+4=8-2=6", "6")
    spans = assess(*CHAIN, response).spans
    assert [response[a:b] for a, b in spans.values()] == ["-5=4", "+4=8", "-2=6"]
    assert read_work(response).start == 9


def test_splits_share_no_problem_and_hold_thousands() -> None:
    mix = {"mix": {"3 steps": 0.3, "4 steps": 0.35, "6 steps": 0.35}}
    train, test = TASK.prompts(mix, "train", 2000, 0), TASK.prompts(mix, "test", 400, 0)
    assert not {p.prompt_id for p in train} & {p.prompt_id for p in test}
    assert len({p.messages[0]["content"] for p in train}) == 2000


def test_the_default_settings_are_valid_and_a_wrong_cell_is_not() -> None:
    Settings()
    with pytest.raises(ValueError, match="9 steps"):
        Settings(slips={"9 steps": 0.1})


def test_items_are_read_back_and_wrong_ones_named() -> None:
    items = criteria(*CHAIN)
    assert rubric_text(items).splitlines() == ["1 9-5=4 (3)", "2 4+4=8 (3)", "3 8-2=6 (2)", "a 6 (2)"]
    for text, what in (
        ('{"a": 1}', "list"), ('[{"points": 2.5, "requirement": "x"}]', "item 1"), ('[{"points": 2}]', "item 1"), ("[7]",
        "item 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=what):
            items_of(text)
    short = items_of('[{"points": 9, "requirement": "x = 2"}]')
    assert problem_of(short, [{"role": "user", "content": "?"}]) == "its points sum to 9, and 10 are expected"
    leaked = items_of('[{"points": 10, "requirement": "the sum is forty-two"}]')
    assert "item 1" in str(problem_of(leaked, [{"role": "user", "content": "Show that the sum is forty-two."}]))


def test_a_programs_grade_keeps_points_by_item() -> None:
    grade = assessed(assess(*CHAIN, thought("9-5=6", "6")))
    assert grade.parts == '{"1": 0, "2": 0, "3": 0, "a": 2}' and grade.extracted_answer == "skip"


def test_the_graders_words_are_tokens_of_the_small_model() -> None:
    from ziprc.config.shared import Architecture
    from ziprc.rewards.rubric import TEMPLATE
    from ziprc.training.scratch import build_tokenizer

    tokenizer = build_tokenizer(TASK.vocabulary_corpus(), Architecture(vocab_size=512, merges=200))
    frame = TEMPLATE.format(question="", criteria="", mark="", response="")
    assert len(tokenizer(frame)["input_ids"]) < len(frame) / 3
