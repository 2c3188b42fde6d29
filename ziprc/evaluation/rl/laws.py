"""Window rules on synthetic lengths: no network, nothing is learned, so what a rule does can be seen in seconds.

A law says how long a response would be if nothing cut it (log-normal), and how likely it is right if it ends. Lengths
are given as shares of the largest window, so that one table fits every experiment. What the table cannot show is what a
window does to the policy: `make all EXPERIMENT=toy-countdown` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from ziprc.config.online import Window
from ziprc.store.digests import derived_seed
from ziprc.training.window import Controller, Seen

SPREAD = 0.5  # deviation of the logarithm of a length


@dataclass(frozen=True)
class Law:
    """Median length as a share of the largest window, at the start and at the end of the run; how often right; whether
    wrong responses ramble on to whatever cuts them."""

    median: float
    last: float
    right: float
    rambles: bool = False

    def draw(
        self, rng: np.random.Generator, progress: float, largest: int, count: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Uncut lengths and whether the answers would be right, [count] each."""
        median = largest * self.median * (self.last / self.median) ** progress
        length = np.maximum(1, np.round(median * np.exp(SPREAD * rng.standard_normal(count)))).astype(np.int64)
        right = rng.random(count) < self.right
        return (np.where(right, length, 1 << 40) if self.rambles else length), right


LAWS: Mapping[str, Law] = {
    "long answers": Law(0.37, 0.37, 0.85),
    "short answers": Law(0.07, 0.07, 0.9),
    "hard, short": Law(0.1, 0.1, 0.2),
    "answers shrink": Law(0.37, 0.06, 0.85),
    "failures ramble": Law(0.07, 0.07, 0.5, True),
    "few failures ramble": Law(0.07, 0.07, 0.85, True),
}


@dataclass(frozen=True)
class Simulated:
    """One rule under one law: windows by rollout, success over the last fifth, tokens, and both of the largest window."""

    windows: list[int]
    success: float
    tokens: int
    success_at_largest: float
    tokens_at_largest: int


def simulate(own: Window, law: Law, largest: int, rollouts: int, responses: int, seed: int) -> Simulated:
    """`responses` a rollout; the lengths depend on seed and law alone, so that rules are compared on the same ones."""
    control, rng = Controller(own, largest, seed), np.random.default_rng(derived_seed("law", seed))
    windows, rates, uncut, tokens, most = [], [], [], 0, 0
    for number in range(rollouts):
        length, right = law.draw(rng, number / max(1, rollouts - 1), largest, responses)
        window, probe = control.plan()
        finished = length <= window
        windows.append(window)
        rates.append(float((right & finished).mean()))
        uncut.append(float((right & (length <= largest)).mean()))
        tokens, most = tokens + int(np.minimum(length, window).sum()), most + int(np.minimum(length, largest).sum())
        control.observe(Seen(window, probe, np.minimum(length, window), finished, right & finished))
    last = max(1, rollouts // 5)
    return Simulated(windows, float(np.mean(rates[-last:])), tokens, float(np.mean(uncut[-last:])), most)


def table(windows: Mapping[str, Window], largest: int, rollouts: int, responses: int, seed: int) -> Iterator[str]:
    """Lines for a terminal: every law and rule, with success and tokens as shares of those of the largest window."""
    yield f"{rollouts} rollouts of {responses} responses of at most {largest} tokens, seed {seed}; success: the last fifth"
    shown = [max(1, round(rollouts * share)) for share in (1 / 6, 1 / 2, 1)]
    at = f"window at {', '.join(map(str, shown))}"
    yield f"{'law':<22}{'arm':<16}{at:<28}{'success':>8}{'of full':>9}{'tokens of full':>16}"
    for law_name, law in LAWS.items():
        for name, own in windows.items():
            found = simulate(own, law, largest, rollouts, responses, seed)
            path = ", ".join(str(found.windows[t - 1]) for t in shown)
            share = found.tokens / found.tokens_at_largest
            yield (
                f"{law_name:<22}{name:<16}{path:<28}{found.success:>8.3f}"
                f"{found.success - found.success_at_largest:>+9.3f}{share:>15.0%}"
            )
