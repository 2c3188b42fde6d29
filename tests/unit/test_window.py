"""Window rules in scenes that say what each is for, and on the synthetic laws of the command."""

from __future__ import annotations

import numpy as np
import pytest

from ziprc.config.online import Window
from ziprc.errors import UserError
from ziprc.evaluation.rl.laws import LAWS, Law, simulate, table
from ziprc.training.window import Controller, Seen

LARGEST = 4096
PUBLISHED = Window(rule="legacy", start=512, smallest=20, warmup=0, least=2, every=3)  # with the knobs as shipped
OURS = Window(rule="adaptive", quantum=64, smallest=64)


def rollout(control: Controller, lengths: list[int], right: bool = True) -> None:
    window, probe = control.plan()
    finished = np.array(lengths) <= window
    control.observe(Seen(window, probe, np.minimum(lengths, window), finished, finished & right))


def test_ours_shrinks_to_a_multiple_of_the_lengths_of_right_answers() -> None:
    control = Controller(Window(rule="adaptive", quantum=8, quantile=1, room=1.5), 256, 0)
    rollout(control, [20] * 16)
    assert control.plan() == (32, False) and control.memory.reason == "right responses are shorter"


def test_ours_waits_for_enough_right_answers() -> None:
    control = Controller(Window(rule="adaptive", least=10), 256, 0)
    rollout(control, [20] * 9)
    assert control.plan()[0] == 256 and control.memory.reason == "too few right responses"


def test_ours_grows_when_answers_press_against_it() -> None:
    control = Controller(Window(rule="adaptive", warmup=0, start=64), 256, 0)
    rollout(control, [60] * 16)
    assert control.plan()[0] == 80 and control.memory.reason == "right responses press against it"


def test_a_probe_runs_at_the_largest_window_and_does_not_stay() -> None:
    control = Controller(Window(rule="adaptive", probes=0.5, quantile=1), 256, 3)
    plans = []
    for _ in range(40):
        plans.append(control.plan())
        rollout(control, [20] * 16)
    assert {window for window, probe in plans if probe} == {256}
    assert {window for window, probe in plans[1:] if not probe} == {40}
    assert 10 <= sum(probe for _, probe in plans) <= 30


def test_a_probe_that_does_much_better_gives_the_window_up() -> None:
    control = Controller(Window(rule="adaptive", probes=0.3, warmup=0, start=32, least=99), 256, 3)
    while not control.plan()[1]:
        rollout(control, [20] * 2 + [100] * 14)
    rollout(control, [20] * 2 + [100] * 14)
    assert control.memory.window == 256 and control.memory.reason == "a probe did better"


def test_phases_are_of_one_run() -> None:
    control = Controller(Window(rule="phased", start=16, schedule={2: 32, 4: 64}), 256, 0)
    found = []
    for _ in range(6):
        found.append(control.plan()[0])
        rollout(control, [10] * 4)
    assert found == [16, 16, 32, 32, 64, 64]


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (Window(smallest=300), "window: smallest is 300 tokens, but a response has at most 256"),
        (Window(start=300), "start is 300"),
        (Window(rule="phased", schedule={3: 300}), "schedule 3 is 300"),
    ],
)
def test_a_window_that_does_not_fit_is_refused(own: Window, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Controller(own, 256, 0)


@pytest.mark.parametrize(
    "wrong", [{"start": 8, "smallest": 16}, {"rule": "phased"}, {"schedule": {0: 32}}, {"rule": "predictive"}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Window.model_validate(wrong)


def test_where_failures_ramble_ours_keeps_the_successes_and_the_published_rule_runs_to_the_cap() -> None:
    ours, theirs = (simulate(own, LAWS["failures ramble"], LARGEST, 300, 200, 0) for own in (OURS, PUBLISHED))
    assert ours.success > ours.success_at_largest - 0.02 and ours.tokens < 0.4 * ours.tokens_at_largest
    assert theirs.windows[-1] == LARGEST and theirs.tokens > 0.7 * theirs.tokens_at_largest


@pytest.mark.parametrize("law", ["long answers", "answers shrink", "short answers"])
def test_where_answers_end_by_themselves_ours_costs_next_to_nothing_and_the_published_rule_a_lot(law: str) -> None:
    ours, theirs = (simulate(own, LAWS[law], LARGEST, 300, 200, 0) for own in (OURS, PUBLISHED))
    assert ours.success > ours.success_at_largest - 0.02
    assert theirs.success < theirs.success_at_largest - 0.05


def test_a_hard_task_is_no_reason_for_ours_to_grow() -> None:
    ours, theirs = (simulate(own, LAWS["hard, short"], LARGEST, 300, 200, 0) for own in (OURS, PUBLISHED))
    assert max(ours.windows[20:]) < 1500 and theirs.windows[-1] == LARGEST


def test_rules_are_compared_on_the_same_lengths() -> None:
    a, b = (
        simulate(own, Law(0.1, 0.1, 0.5, True), 512, 20, 50, 7)
        for own in (OURS.model_copy(update={"quantum": 8}), Window())
    )
    assert (a.tokens_at_largest, a.success_at_largest) == (b.tokens_at_largest, b.success_at_largest)
    assert b.tokens == b.tokens_at_largest


def test_the_table_has_a_line_for_every_law_and_arm() -> None:
    lines = list(table({"fixed": Window(), "ours": Window(rule="adaptive")}, 256, 12, 20, 0))
    assert len(lines) == 2 + 2 * len(LAWS) and "+0.000" in lines[2]
