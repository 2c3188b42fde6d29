"""Window rules on any stream of rollouts: bounds, memory, reasons to move; the published rule against a loop of our own."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ziprc.config.online import RULES, Window
from ziprc.training.window import Controller, Seen

LARGEST = 256
rounds = st.lists(
    st.lists(st.tuples(st.integers(1, 400), st.booleans()), min_size=1, max_size=12), min_size=1, max_size=25
)  # of a rollout: the length a response would have, and whether it would be right


def seen(control: Controller, responses: list[tuple[int, bool]]) -> Seen:
    window, probe = control.plan()
    length = np.array([min(n, window) for n, _ in responses])
    finished = np.array([n <= window for n, _ in responses])
    return Seen(window, probe, length, finished, finished & np.array([right for _, right in responses]))


@st.composite
def windows(draw: Any, rules: tuple[str, ...] = RULES) -> Window:
    rule = draw(st.sampled_from(rules))
    smallest = draw(st.integers(1, 40))
    own: dict[str, Any] = {
        "rule": rule, "smallest": smallest, "start": draw(st.none() | st.integers(smallest, LARGEST)),
        "warmup": draw(st.integers(0, 3)), "every": draw(st.integers(1, 3)), "least": draw(st.integers(1, 6)),
        "quantum": draw(st.sampled_from([1, 8, 16])), "memory": draw(st.integers(1, 5)),
        "probes": draw(st.sampled_from([0.0, 0.5])),
        "drop": draw(st.floats(0.1, 1)), "explore": draw(st.sampled_from([0.0, 0.3])), "step": draw(st.integers(1, 64)),
        "hold": draw(st.integers(0, 4)), "lengths": draw(st.sampled_from(["all", "rolling", "ema"])),
    }  # fmt: skip
    if rule == "phased":
        own["schedule"] = draw(st.dictionaries(st.integers(0, 20), st.integers(smallest, LARGEST), min_size=1))
    return Window.model_validate(own)


@given(windows(), rounds, st.integers(0, 9))
@settings(deadline=None)
def test_a_window_is_in_bounds_and_a_multiple_of_its_quantum_or_a_bound(
    own: Window, stream: list[list[tuple[int, bool]]], seed: int
) -> None:
    control = Controller(own, LARGEST, seed)
    for responses in stream:
        window, _ = control.plan()
        assert own.smallest <= window <= LARGEST
        if own.rule in ("adaptive", "proposed") and window not in (own.start, own.smallest, LARGEST):
            assert window % own.quantum == 0
        control.observe(seen(control, responses))
        assert control.memory.reason


@given(windows(), rounds, rounds, st.integers(0, 9))
@settings(deadline=None)
def test_a_memory_that_was_saved_goes_on_as_if_it_had_not_been(
    own: Window, before: list[list[tuple[int, bool]]], after: list[list[tuple[int, bool]]], seed: int
) -> None:
    first = Controller(own, LARGEST, seed)
    for responses in before:
        first.observe(seen(first, responses))
    second = Controller(own, LARGEST, seed)
    second.load(json.loads(json.dumps(first.state())))
    for responses in after:
        assert first.plan() == second.plan()
        for control in (first, second):
            control.observe(seen(control, responses))
    assert first.state() == second.state()


@given(windows(("adaptive",)), rounds, st.integers(0, 9))
@settings(deadline=None)
def test_ours_grows_only_where_right_responses_press_and_never_for_failure(
    own: Window, stream: list[list[tuple[int, bool]]], seed: int
) -> None:
    control = Controller(own, LARGEST, seed)
    for responses in stream:
        before = control.memory.window
        control.observe(seen(control, responses))
        if control.memory.window > before:
            lengths = [length for of in control.memory.lengths for length in of]
            pressing = np.mean([length > own.edge * before for length in lengths]) if lengths else 0
            assert pressing > own.crowd or control.memory.reason == "a probe did better"
    failing = Controller(own, LARGEST, seed)
    for responses in stream:
        before = failing.memory.window
        failing.observe(seen(failing, [(length, False) for length, _ in responses]))
        assert failing.memory.window == before


def published(own: Window, largest: int, stream: list[tuple[np.ndarray, np.ndarray]]) -> list[int]:
    """The published rule, mode `basic`, as A.4 of the specification has it: a whole history, and means of all of it."""
    w, lengths, s, last, out = own.start or largest, [], None, 0, []
    for t, (length, right) in enumerate(stream, 1):
        lengths += length[right].tolist()
        m = sum(lengths) / len(lengths) if lengths else 0.0
        if own.warmup and t == own.warmup:
            if lengths:
                w, last = round(min(max(m, own.smallest), largest)), t
        elif t > own.warmup and len(lengths) >= own.least and t % own.every == 0 and s is not None:
            candidate, gap = w, w - m
            steady = abs(gap) <= own.tolerance and t - last >= own.hold
            if s >= own.target + own.margin and gap > own.tolerance:
                candidate = max(own.smallest, w - own.step)
            elif w < largest and (s <= own.target - own.margin or (s >= own.target and steady)):
                candidate = min(largest, w + own.step)
            if abs(candidate - w) >= own.least_move and candidate != w:
                w, last = candidate, t
        rate = float(right.mean())
        s = rate if s is None else own.ema * s + (1 - own.ema) * rate
        out.append(w)
    return out


@given(windows(("legacy",)), st.integers(0, 99), st.floats(0.05, 0.95), st.floats(5, 200))
@settings(deadline=None)
def test_the_published_rule_is_the_published_rule(own: Window, seed: int, chance: float, mean: float) -> None:
    own = own.model_copy(update={"explore": 0.0, "lengths": "all"})
    rng, control, stream, got = np.random.default_rng(seed), Controller(own, LARGEST, seed), [], []
    for _ in range(60):
        responses = [(int(1 + rng.exponential(mean)), bool(rng.random() < chance)) for _ in range(8)]
        now = seen(control, responses)
        stream.append((now.length, now.correct))
        control.observe(now)
        got.append(control.memory.window)
    assert got == published(own, LARGEST, stream)
