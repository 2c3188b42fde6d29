"""The response window of on-policy training: how many tokens a response may have, and why it changes.

A window saves the tokens that it cuts, so it pays where responses that will fail ramble on, and costs where right ones are
cut. Six rules, all of which see the unshaped grade and never the shaped reward:

* `fixed`: one window. `phased`: a schedule of windows within one run. `predicted`: the largest for all, and each response is
  stopped when a joint head gives it no chance any more (predicted.py).
* `adaptive`, ours: successes alone decide. It shrinks to a multiple of a high quantile of the lengths of right responses, and
  grows when many of them press against it. No success rate is aimed at, so it never grows for failure: a response that
  rambles says nothing about the length that answers need.
* `legacy`: the published rule. It moves towards the mean length of all successes so far, and grows while the success rate
  is below a target, so it cuts a good policy until the target is missed and runs to the largest window on a hard task.
  Where the published code reads a success rate before there is one (a decision after the first rollout), it holds.
* `proposed`: the mend of it that keeps the target: growth needs truncation as well as failure, lengths are forgotten.

Pure: no torch, no clock; what is random follows from the seed and the number of the rollout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziprc.config.online import Window
from ziprc.store.digests import derived_seed

PROBE_ERRORS = 2.0  # standard errors by which a probe must do better before the window is given up
LENGTH_EMA = 0.98  # of the published `ema` mode


@dataclass(frozen=True)
class Seen:
    """What came of one rollout of n responses, over all processes."""

    window: int  # tokens that they could have
    probe: bool  # sampled at the largest window, which the rule does not go on from
    length: NDArray[np.int64]  # [n] tokens
    finished: NDArray[np.bool_]  # [n] ended by themselves
    correct: NDArray[np.bool_]  # [n] right by the grader


@dataclass
class Memory:
    """All that a rule remembers, JSON-like: what a training state keeps of it."""

    window: int
    rollouts: int = 0  # seen so far
    moved: int = 0  # after how many of them the window changed last
    reason: str = "start"
    lengths: list[list[int]] = field(
        default_factory=list
    )  # of right responses, by rollout, as far as the rule looks back
    success: float | None = None  # mean over rollouts
    truncated: float | None = None
    count: int = 0  # legacy: of all right responses so far, their number and mean length
    mean: float = 0.0


Decision = tuple[float, str]  # the window that is wanted, and why
Rule = Callable[["Controller", Seen], Decision]


class Controller:
    """One rule with its memory. `plan` says how the next rollout is sampled, `observe` is told what came of it."""

    def __init__(self, own: Window, largest: int, seed: int) -> None:
        """`largest` is the cap of a response in tokens. UserError for a window that does not fit under it."""
        self.own, self.largest, self.seed = own, largest, seed
        own.check_fits(largest, "window")
        self.memory = Memory(own.start or largest)

    def plan(self) -> tuple[int, bool]:
        """Window of the next rollout in tokens, and whether it is a probe."""
        own, number = self.own, self.memory.rollouts
        if own.rule == "phased":
            begun = [start for start in own.schedule if start <= number]
            return (own.schedule[max(begun)] if begun else own.start or self.largest), False
        if own.rule in ("adaptive", "proposed"):
            if number < own.warmup:
                return self.largest, False
            if self._chance("probe") < own.probes:
                return self.largest, True
        return self.memory.window, False

    def observe(self, seen: Seen) -> None:
        """Take in a rollout, and decide about the window after it."""
        memory = self.memory
        memory.rollouts += 1
        before = memory.window
        wanted, reason = RULES[self.own.rule](self, seen)
        memory.window = self._whole(wanted) if wanted > before else min(before, self._whole(wanted))
        memory.reason = "fits" if memory.window == before != wanted else reason
        if memory.window != before:
            memory.moved = memory.rollouts

    def state(self) -> dict[str, Any]:
        """The memory, for a training state."""
        return asdict(self.memory)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`."""
        self.memory = Memory(**state)

    def _chance(self, what: str) -> float:
        return derived_seed(self.seed, what, self.memory.rollouts) / 2**63

    def _whole(self, window: float) -> int:
        """In bounds and, where the rule has a quantum, a multiple of it or a bound."""
        step = self.own.quantum if self.own.rule in ("adaptive", "proposed") else 1
        return min(self.largest, max(self.own.smallest, step * math.ceil(window / step - 1e-9)))

    def remember(self, seen: Seen) -> NDArray[np.int64]:
        """The lengths of right responses of the last rollouts, this one included."""
        self.memory.lengths = [*self.memory.lengths, seen.length[seen.correct & seen.finished].tolist()][
            -self.own.memory :
        ]
        return np.array([length for of in self.memory.lengths for length in of], dtype=np.int64)

    def due(self, known: int) -> str:
        """Why nothing is decided now, "" where something is; `known` right responses are remembered."""
        after = self.memory.rollouts - self.own.warmup
        if after < 0 or after % self.own.every:
            return "warm-up" if after < 0 else "not due"
        return "" if known >= self.own.least else "too few right responses"


def fixed(control: Controller, seen: Seen) -> Decision:
    """The window as it is; for `phased` too, whose schedule `plan` reads."""
    return control.memory.window, control.own.rule


def adaptive(control: Controller, seen: Seen) -> Decision:
    """Ours: by how near right responses come to the window, and by nothing else."""
    own, window, lengths = control.own, control.memory.window, control.remember(seen)
    if seen.probe and _better(seen, control.memory.success):
        return control.largest, "a probe did better"
    if not seen.probe:
        control.memory.success = _ema(control.memory.success, float(seen.correct.mean()), own.ema)
    if wait := control.due(len(lengths)):
        return window, wait
    if window < control.largest and (lengths > own.edge * window).mean() > own.crowd:
        return window + max(own.quantum, own.growth * window), "right responses press against it"
    if (enough := own.room * float(np.quantile(lengths, own.quantile))) < window:
        return max(enough, window - max(own.quantum, own.drop * window)), "right responses are shorter"
    return window, "fits"


def _better(probe: Seen, success: float | None) -> bool:
    """Whether a probe's success rate is above the usual one by more than chance."""
    rate, n = float(probe.correct.mean()), len(probe.correct)
    return success is not None and rate - success > PROBE_ERRORS * math.sqrt(max(success * (1 - success), 1 / n) / n)


def legacy(control: Controller, seen: Seen) -> Decision:
    """The published rule: towards the mean length of successes, and up while the success rate is below the target."""
    own, memory, right = control.own, control.memory, seen.length[seen.correct]
    window, t, success = memory.window, memory.rollouts, memory.success
    memory.success = _ema(success, float(seen.correct.mean()), own.ema)  # decisions read the mean before this rollout
    memory.lengths = [[*(memory.lengths[0] if memory.lengths else []), *right.tolist()][-100:]]  # the rolling mode's
    if own.lengths == "ema" and len(right):
        memory.mean = (
            float(right.mean())
            if not memory.count
            else LENGTH_EMA * memory.mean + (1 - LENGTH_EMA) * float(right.mean())
        )
    elif len(right):
        memory.mean += (float(right.sum()) - len(right) * memory.mean) / (memory.count + len(right))
    memory.count += len(right)
    known = memory.count if own.lengths != "rolling" else len(memory.lengths[0])
    mean = float(np.mean(memory.lengths[0] or [0])) if own.lengths == "rolling" else memory.mean
    if own.lengths == "ema" and memory.count:
        mean /= 1 - LENGTH_EMA**memory.count  # by the number of successes, as published
    if own.warmup and t == own.warmup and known:
        memory.moved = t
        return round(min(max(mean, own.smallest), control.largest)), "end of the warm-up"
    if t <= own.warmup or known < own.least or t % own.every or success is None:
        return window, "not due"
    wanted, reason, gap = window, "holds", window - mean
    if success >= own.target + own.margin and gap > own.tolerance:
        wanted, reason = max(own.smallest, window - own.step), "success above the target"
    elif success <= own.target - own.margin and window < control.largest:
        wanted, reason = min(control.largest, window + own.step), "success below the target"
    elif (
        success >= own.target
        and abs(gap) <= own.tolerance
        and window < control.largest
        and t - memory.moved >= own.hold
    ):
        wanted, reason = min(control.largest, window + own.step), "success at the target for long"
    if control._chance("explore") < own.explore and window < control.largest:
        wanted, reason = control.largest, "exploration"
    return (wanted, reason) if abs(wanted - window) >= own.least_move else (window, "holds")


def proposed(control: Controller, seen: Seen) -> Decision:
    """The published rule, mended: growth needs truncation too, and only the last rollouts are remembered."""
    own, memory, lengths = control.own, control.memory, control.remember(seen)
    window = memory.window
    if not seen.probe:
        memory.success = _ema(memory.success, float(seen.correct.mean()), own.ema)
        memory.truncated = _ema(memory.truncated, float((~seen.finished).mean()), own.ema)
    if (wait := control.due(len(lengths))) or memory.success is None or memory.truncated is None:
        return window, wait or "nothing but probes so far"
    enough = own.room * float(np.quantile(lengths, own.quantile))
    if memory.rollouts == own.warmup:
        return enough, "end of the warm-up"
    cut = memory.truncated >= own.truncated
    if cut and memory.success <= own.target - own.margin:
        return window + max(own.step, window / 4), "cut, and success below the target"
    if memory.success >= own.target + own.margin and enough + own.tolerance < window:
        return max(enough, window - max(own.step, window / 10)), "success above the target"
    if cut and memory.success >= own.target and memory.rollouts - memory.moved >= own.hold:
        return window + own.step, "cut, with success at the target for long"
    return window, "holds"


def _ema(before: float | None, now: float, kept: float) -> float:
    return now if before is None else kept * before + (1 - kept) * now


RULES: dict[str, Rule] = {
    "fixed": fixed, "predicted": fixed, "phased": fixed, "adaptive": adaptive, "legacy": legacy, "proposed": proposed,
}  # fmt: skip
