"""Families: one policy at many settings, for validation prompts to choose from at every token budget.

`ours` are the shipped policy and the published one, `ablations` each of them with one idea taken away, `competitors` the
baselines; every family has the single sample among its settings, so that all can be compared from one sample on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ziprc.sampling.competitors import families
from ziprc.sampling.controller import Policy
from ziprc.sampling.fitting import Calibration, Fitted
from ziprc.sampling.policies.base import Reader
from ziprc.sampling.policies.fixed import Fixed
from ziprc.sampling.policies.utility import Horizons
from ziprc.sampling.policies.zip_rc import ZipRC
from ziprc.sampling.policies.zip_rc_plus import FusedThreshold, ZipRCPlus
from ziprc.sampling.replay import Pool
from ziprc.sampling.score import HEAD_INPUTS, TOKEN_INPUTS
from ziprc.sampling.tree import Ints

PLUS, PUBLISHED = "zip-rc-plus", "zip-rc"
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
MOST_SAMPLES = (2, 3, 4, 8, 16, 24)
WHOLE = 1 << 20  # tokens between decisions when only whole samples are decided on
WIDE = 4  # branches at a time


@dataclass(frozen=True)
class Setting:
    """A policy, how often it decides, and over how many readings the joint is smoothed."""

    policy: Policy
    interval: int = 8
    window: int = 1

    @property
    def name(self) -> str:
        """The policy's name, with what differs from the defaults."""
        every = {Setting.interval: "", WHOLE: "/whole"}.get(self.interval, f"/Δ{self.interval}")
        return self.policy.name + every + (f"/w{self.window}" if self.window > 1 else "")


@dataclass(frozen=True)
class Sweep:
    """Which settings are tried."""

    prices: tuple[float, ...]
    intervals: tuple[int, ...]
    alphas: tuple[float, ...]
    betas: tuple[float, ...]
    samples: int  # at most, of the published policy
    window: int  # of smoothing, where it is tried
    calibrated: bool  # whether the published policy reads the calibrated joint


Families = dict[str, Sequence[Setting]]


def plus(fitted: Fitted, sweep: Sweep, calibration: Calibration | None = None, **options: object) -> list[Setting]:
    """zip-rc-plus over its prices, at every interval."""
    own = calibration or fitted.fused
    policies = [ZipRCPlus(own, fitted.grid, price, **options) for price in sweep.prices]  # type: ignore[arg-type]
    return [Setting(policy, interval) for interval in sweep.intervals for policy in policies]


def published(
    fitted: Fitted, sweep: Sweep, window: int = 1, calibrated: bool | None = None, **options: object
) -> list[Setting]:
    """ZIP-RC over its prices, at the shortest interval."""
    joint = fitted.joint if (sweep.calibrated if calibrated is None else calibrated) else None
    pairs = [(alpha, beta) for alpha in sweep.alphas for beta in sweep.betas]
    policies = [ZipRC(fitted.grid, *pair, k_max=sweep.samples, calibration=joint, **options) for pair in pairs]  # type: ignore[arg-type]
    return [Setting(policy, sweep.intervals[0], window) for policy in policies]


def ours(fitted: Fitted, sweep: Sweep) -> Families:
    """The shipped policy and the published one."""
    return {PLUS: plus(fitted, sweep), PUBLISHED: published(fitted, sweep)}


def ablations(fitted: Fitted, sweep: Sweep, pool: Pool, seed: int) -> Families:
    """Each with one idea taken away; `pool` are the validation rollouts, on which partial scores are fitted."""

    def seeing(columns: tuple[int, ...]) -> Calibration:
        return Calibration.fit(pool, fitted.grid, seed, columns)

    sweep = replace(sweep, intervals=sweep.intervals[:1])  # one interval suffices to see what an idea is worth
    compute_only = replace(sweep, alphas=sweep.alphas[-1:])  # searching them takes ten times as long
    best_of = replace(fitted.fused, vote=replace(fitted.fused.vote, votes=0.0))  # agreement counts for nothing
    thresholds = [FusedThreshold(fitted.fused, fitted.grid, level, most) for level in LEVELS for most in MOST_SAMPLES]
    turned = "uncalibrated" if sweep.calibrated else "calibrated"
    return {
        f"{PLUS}: head alone": plus(fitted, sweep, seeing(HEAD_INPUTS)),
        f"{PLUS}: log-probs alone": plus(fitted, sweep, seeing(TOKEN_INPUTS)),
        f"{PLUS}: no latent difficulty": plus(fitted, sweep, latent=False),
        f"{PLUS}: whole samples": [Setting(s.policy, WHOLE) for s in plus(fitted, sweep)],
        f"{PLUS}: threshold instead of utility": [Setting(policy, WHOLE) for policy in thresholds],
        f"{PLUS}: no pause": plus(fitted, sweep, can_pause=False),
        f"{PLUS}: no vote": plus(fitted, sweep, best_of),
        f"{PLUS}: four at a time": plus(fitted, sweep, width=WIDE),
        f"{PUBLISHED}: marginals": published(fitted, sweep, independent=True),
        f"{PUBLISHED}: no horizon": published(fitted, sweep, horizons=Horizons.NONE),
        f"{PUBLISHED}: own horizons": published(fitted, compute_only, horizons=Horizons.PER_SAMPLE),
        f"{PUBLISHED}: no pause": published(fitted, sweep, can_pause=False),
        f"{PUBLISHED}: smoothed": published(fitted, sweep, window=sweep.window),
        f"{PUBLISHED}: {turned}": published(fitted, sweep, calibrated=not sweep.calibrated),
    }


def competitors(fitted: Fitted, styles: int, lengths: Ints) -> Families:
    """The baselines; `styles` is the number of style codes of the pool, `lengths` those of validation rollouts."""
    found = families(fitted.grid, fitted.logprob, styles, lengths)
    return {name: [Setting(policy) for policy in policies] for name, policies in found.items()}


def single(fitted: Fitted) -> Setting:
    """One sample, which every family may fall back on."""
    return Setting(Fixed(Reader(fitted.grid, fitted.logprob), k=1))


def live_setting(name: str, samples: float, frontier: Mapping[str, Any], fitted: Fitted) -> Setting:
    """The setting of one of LIVE_POLICIES for a budget of that many samples, as `frontier.json` records what validation
    chose: of the policy's settings that whose cost in the replay is nearest, on a logarithmic scale."""
    if name == "majority":
        return Setting(Fixed(Reader(fitted.grid), k=max(1, round(samples))))
    tokens = samples * frontier["one_sample"]
    settings = frontier["chosen"][PUBLISHED if name == PUBLISHED else PLUS]
    own = min(settings, key=lambda s: abs(math.log(s["tokens"] / tokens)))
    policy: Policy
    if name == PUBLISHED:
        joint = fitted.joint if own["calibrated"] else None
        policy = ZipRC(fitted.grid, own["alpha"], own["beta"], k_max=own["samples"], calibration=joint)
    else:
        width, branching = WIDE if name.endswith("wide") else own["width"], name.endswith("branching")
        policy = ZipRCPlus(fitted.fused, fitted.grid, own["price"], width=width, can_branch=branching, label=name)
    return Setting(policy, own["interval"], own["window"])
