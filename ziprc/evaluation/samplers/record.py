"""frontier.json: what adaptive sampling buys, measured by replay; every number with an interval over prompts.

budgets        {"2": tokens per prompt, …}       in multiples of one plain sample
prompts        {validation, test, rollouts, orders}
families       {family: {points: {budget: {accuracy, tokens, latency, samples, cost, setting}}, kept: [[name, tokens,
               accuracy]]}}                      ours, the published policy, the competitors
difference     {budget: {family: interval}}      zip-rc-plus minus the family, paired, at equal tokens
ablations      {name: {points, …, difference: {budget: interval}}}   without one idea minus with it
oracle         {k: accuracy}                     the best of k, if somebody told which
cells          {difficulty: {budget: {family: {accuracy, tokens, samples}}}}
answer         {budget: {ece, brier, reliability}}   of the probability that zip-rc-plus gives with its answer
headline       [{name, target, direction, result, met}]
chosen         {family: [{setting, tokens, policy settings}]}        what validation kept, for the live runs
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ziprc.config.zip_rc import Frontier
from ziprc.evaluation.bootstrap import Resampling, rounded, target_record
from ziprc.evaluation.calibration import calibration_metrics, reliability_curve
from ziprc.evaluation.samplers.frontier import Comparison, Family, Player, choose_and_play
from ziprc.evaluation.samplers.pools import RecordedPool
from ziprc.progress import progress
from ziprc.sampling.families import PLUS, PUBLISHED, Setting, Sweep, ablations, competitors, ours, single
from ziprc.sampling.fitting import Fitted
from ziprc.sampling.policies.fixed import oracle
from ziprc.sampling.policies.zip_rc import ZipRC
from ziprc.sampling.policies.zip_rc_plus import ZipRCPlus
from ziprc.sampling.replay import pool_orders

ORACLE_SIZES = (1, 2, 4, 8, 16)
CELL_BUDGETS = ("2", "4", "8")
ECE_BINS = 10


def sweep_of(own: Frontier) -> Sweep:
    """The settings that the configuration asks for."""
    prices = np.geomspace(own.highest_price, own.lowest_price, own.prices).tolist()
    return Sweep(
        prices=tuple(prices), intervals=own.intervals, alphas=own.alphas, betas=own.betas,
        samples=own.published_samples, window=own.window, calibrated=own.calibrated,
    )  # fmt: skip


@dataclass(frozen=True)
class Arena(Comparison):
    """Both pools, ready to play, and how the families are compared that play there."""

    validation: Player
    test: Player
    one_sample: float


def arena(own: Frontier, fitted: Fitted, validation: RecordedPool, test: RecordedPool, seed: int) -> Arena:
    """Both pools in random orders, budgets in tokens from one plain sample, and the draws of the bootstrap."""
    players = []
    for number, (recorded, count) in enumerate(((validation, max(1, own.orders // 2)), (test, own.orders))):
        orders = pool_orders(*recorded.pool.length.shape, count, seed + number)
        players.append(Player(recorded.pool, orders, own.branches))
    plain = players[1].play(single(fitted))
    one, boot = float(plain.tokens.mean()), Resampling(np.arange(len(plain.tokens)), own.bootstrap, seed)
    budgets, length = {f"{k:g}": k * one for k in own.budgets}, test.pool.length.mean(-1).astype(np.float64)
    return Arena(boot, budgets, length, own.cost_alpha, own.confidence, *players, one)


def sampling_record(
    own: Frontier, fitted: Fitted, validation: RecordedPool, test: RecordedPool, seed: int
) -> dict[str, Any]:
    """The whole of frontier.json."""
    field, sweep, plain = arena(own, fitted, validation, test, seed), sweep_of(own), single(fitted)
    shipped = ours(fitted, sweep)
    rivals = competitors(fitted, len(test.styles), validation.pool.length.ravel())
    without = ablations(fitted, sweep, validation.pool, seed)
    families, played = {**shipped, **rivals, **without}, {}
    with progress(len(families), "frontier", "families") as bar:
        for name, settings in families.items():
            played[name] = choose_and_play(name, [plain, *settings], field.validation, field.test)
            bar.update(1)
    plus, others = played[PLUS], [played[name] for name in (PUBLISHED, *rivals)]
    rollouts, difference = test.pool.length.shape[1], field.difference(plus, others)
    sizes = [k for k in ORACLE_SIZES if k <= rollouts]
    counts = {"validation": len(validation.prompt_ids), "test": len(test.prompt_ids)}
    found = {
        "budgets": {k: rounded(v) for k, v in field.budgets.items()},
        "one_sample": rounded(field.one_sample),
        "prompts": counts | {"rollouts": rollouts, "orders": len(field.test.orders)},
        "families": {f.name: field.record(f) for f in (plus, *others)},
        "difference": difference,
        "ablations": {name: _ablation(field, played[name], played[name.partition(":")[0]]) for name in without},
        "oracle": {str(k): rounded(oracle(test.pool, field.test.orders, k).mean()) for k in sizes},
        "cells": _cells(field, [plus, played["majority"]], test.difficulty),
        "answer": {key: _answer(field, plus, tokens) for key, tokens in field.budgets.items()},
        "chosen": {name: _chosen(field, played[name], shipped[name]) for name in (PLUS, PUBLISHED)},
    }
    return found | {"headline": _headline(field, played, difference, found["answer"])}


def _ablation(field: Arena, one: Family, whole: Family) -> dict[str, Any]:
    """One idea taken away: its points, and its accuracy minus that of the whole policy."""
    gaps = field.difference(one, [whole])
    return field.record(one) | {"difference": {key: gap[whole.name] for key, gap in gaps.items() if gap}}


def _cells(field: Arena, families: Sequence[Family], difficulty: NDArray[np.str_]) -> dict[str, Any]:
    """By difficulty: accuracy, tokens and samples at some budgets."""
    budgets = [k for k in CELL_BUDGETS if k in field.budgets]
    points = [(k, f.name, mixture) for k in budgets for f in families if (mixture := f.at(field.budgets[k]))]
    out: dict[str, Any] = {}
    for cell in np.unique(difficulty).tolist():
        inside = difficulty == cell
        for budget, name, mixture in points:
            means = {c: rounded(mixture.column(c)[inside].mean()) for c in ("accuracy", "tokens", "samples")}
            out.setdefault(cell, {"prompts": int(inside.sum())}).setdefault(budget, {})[name] = means
    return out


def _answer(field: Arena, plus: Family, tokens: float) -> dict[str, Any] | None:
    """Does the probability given with an answer mean what it says?"""
    mixture = plus.at(tokens)
    if mixture is None:
        return None
    outcome = mixture.likelier
    boot = Resampling(outcome.prompt, len(field.boot.counts) - 1, 0, prompts=field.boot.prompts)
    metrics = calibration_metrics(boot, outcome.probability, outcome.score, ECE_BINS)
    curve = reliability_curve(boot, outcome.probability, outcome.score, ECE_BINS, field.confidence)
    return {k: v.interval(field.confidence) for k, v in metrics.items()} | {"reliability": curve}


def _chosen(field: Arena, family: Family, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """The kept settings by rising test tokens, in numbers from which the policy can be made again.

    Where validation prefers the plain sample to the whole family (a hopeless base), its first setting stands in.
    """
    tokens = [float(outcome.tokens.mean()) for outcome in family.outcomes]
    pairs = sorted(zip(family.settings, tokens, strict=True), key=lambda pair: pair[1])
    found = [record for pair in pairs if (record := _setting_record(*pair))]
    return found or [_setting_record(settings[0], field.test.play(settings[0]).tokens.mean())]


def _setting_record(setting: Setting, tokens: float) -> dict[str, Any]:
    """Empty for the plain sample, which every family may fall back on."""
    policy = setting.policy
    record = {"name": setting.name, "interval": setting.interval, "window": setting.window, "tokens": rounded(tokens)}
    if isinstance(policy, ZipRCPlus):
        return record | {"price": policy.price, "width": policy.width}
    if isinstance(policy, ZipRC):
        calibrated = policy.calibration is not None
        return record | {"alpha": policy.alpha, "beta": policy.beta, "samples": policy.k_max, "calibrated": calibrated}
    return {}


def _headline(
    field: Arena, played: Mapping[str, Family], difference: Mapping[str, Mapping[str, Any]], answer: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The targets of the `toy` scale."""
    compared = [gaps.values() for gaps in difference.values() if gaps]
    level = sum(min(gap["value"] for gap in gaps) >= 0 for gaps in compared)
    above = sum(all((gap["low"] or 0) > 0 for gap in gaps) for gaps in compared)
    majority = {k: difference[k]["majority"]["value"] for k in ("2", "4", "8") if "majority" in difference.get(k, {})}
    share = _token_share(field, played[PLUS], played["majority"])
    worst = max((a["ece"]["value"] for a in answer.values() if a), default=None)
    return [
        target_record("budgets at which zip-rc-plus is on or above every other", len(field.budgets), level),
        target_record("budgets at which it is above all of them (paired interval)", 4, above),
        *(target_record(f"gain over majority@{k}", 0.05, gain) for k, gain in majority.items()),
        target_record("share of majority@16's tokens for its accuracy", 1 / 3, share, at_least=False),
        target_record("largest ECE of the probability of the answer", 0.05, worst, at_least=False),
    ]


def _token_share(field: Arena, plus: Family, majority: Family) -> float | None:
    """Tokens at which zip-rc-plus reaches the accuracy of majority@16, as a share of majority@16's."""
    budget = field.budgets.get("16")
    rival = majority.at(budget) if budget else None
    if rival is None or budget is None:
        return None
    wanted = float(rival.column("accuracy").mean())
    for tokens in np.linspace(field.budgets[min(field.budgets, key=float)] / 2, budget, 400).tolist():
        mixture = plus.at(tokens)
        if mixture and float(mixture.column("accuracy").mean()) >= wanted:
            return rounded(tokens / float(rival.column("tokens").mean()))
    return None
