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
from ziprc.evaluation.bootstrap import Resampling, rounded
from ziprc.evaluation.calibration import calibration_metrics, reliability_curve
from ziprc.evaluation.samplers.frontier import (
    Costs,
    Family,
    Mixture,
    Outcome,
    Player,
    choose_and_play,
    compare,
    difference_records,
    family_record,
)
from ziprc.evaluation.samplers.pools import RecordedPool
from ziprc.progress import progress
from ziprc.sampling.families import PLUS, PUBLISHED, Families, Setting, Sweep, ablations, competitors, ours, single
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
    prices = np.geomspace(own.highest_price, own.lowest_price, own.prices)
    return Sweep(
        prices=tuple(float(p) for p in prices),
        intervals=own.intervals,
        alphas=own.alphas,
        betas=own.betas,
        samples=own.published_samples,
        window=own.window,
        calibrated=own.calibrated,
    )


@dataclass(frozen=True)
class Arena:
    """Both pools, ready to play, and how results are summarised."""

    validation: Player
    test: Player
    boot: Resampling
    budgets: Mapping[str, float]
    costs: Costs
    confidence: float
    one_sample: float

    def family(self, name: str, settings: Any) -> Family:
        return choose_and_play(name, settings, self.validation, self.test)


def arena(own: Frontier, fitted: Fitted, validation: RecordedPool, test: RecordedPool, seed: int) -> Arena:
    """Both pools in random orders, budgets in tokens from one plain sample, and the draws of the bootstrap."""
    players = []
    for number, recorded in enumerate((validation, test)):
        count = own.orders if number else max(1, own.orders // 2)
        orders = pool_orders(*recorded.pool.length.shape, count, seed + number)
        players.append(Player(recorded.pool, orders, own.branches))
    plain = players[1].play(single(fitted))
    one = float(plain.tokens.mean())
    return Arena(
        *players,
        boot=Resampling(np.arange(len(plain.tokens)), own.bootstrap, seed),
        budgets={f"{k:g}": k * one for k in own.budgets},
        costs=Costs(test.pool.length.mean(-1).astype(np.float64), own.cost_alpha),
        confidence=own.confidence,
        one_sample=one,
    )


def sampling_record(
    own: Frontier, fitted: Fitted, validation: RecordedPool, test: RecordedPool, seed: int
) -> dict[str, Any]:
    """The whole of frontier.json."""
    field = arena(own, fitted, validation, test, seed)
    sweep = sweep_of(own)
    shipped: Families = ours(fitted, sweep)
    rivals = competitors(fitted, len(test.styles), validation.pool.length.ravel())
    without = ablations(fitted, sweep, validation.pool, seed)
    plain = single(fitted)
    played: dict[str, Family] = {}
    todo = {**shipped, **rivals, **without}
    with progress(len(todo), "frontier", "families") as bar:
        for name, settings in todo.items():
            played[name] = field.family(name, [plain, *settings])
            bar.update(1)
    plus = played[PLUS]
    others = [played[name] for name in (PUBLISHED, *rivals)]
    difference = difference_records(field.boot, plus, others, field.budgets, field.confidence)
    found = {
        "budgets": {k: rounded(v) for k, v in field.budgets.items()},
        "one_sample": rounded(field.one_sample),
        "prompts": {
            "validation": len(validation.prompt_ids),
            "test": len(test.prompt_ids),
            "rollouts": test.pool.length.shape[1],
            "orders": len(field.test.orders),
        },
        "families": {f.name: _family(field, f) for f in (plus, *others)},
        "difference": difference,
        "ablations": {name: _ablation(field, played, name) for name in without},
        "oracle": {str(k): rounded(oracle(test.pool, field.test.orders, k).mean()) for k in _sizes(test)},
        "cells": _cells(field, [plus, played["majority"]], test.difficulty),
        "answer": {key: _answer(field, plus, tokens) for key, tokens in field.budgets.items()},
        "chosen": {name: _chosen(played[name]) or _cheapest(field, shipped[name]) for name in (PLUS, PUBLISHED)},
    }
    return found | {"headline": _headline(field, played, difference, found["answer"])}


def _sizes(recorded: RecordedPool) -> list[int]:
    return [k for k in ORACLE_SIZES if k <= recorded.pool.length.shape[1]]


def _family(field: Arena, family: Family) -> dict[str, Any]:
    return family_record(field.boot, family, field.budgets, field.costs, field.confidence)


def _ablation(field: Arena, played: Mapping[str, Family], name: str) -> dict[str, Any]:
    """One idea taken away: its points, and its accuracy minus that of the whole policy."""
    whole = played[name.partition(":")[0]]
    pairs = {key: (played[name].at(tokens), whole.at(tokens)) for key, tokens in field.budgets.items()}
    gaps = {k: compare(field.boot, a, b).interval(field.confidence) for k, (a, b) in pairs.items() if a and b}
    return _family(field, played[name]) | {"difference": gaps}


def _cells(field: Arena, families: Sequence[Family], difficulty: NDArray[np.str_]) -> dict[str, Any]:
    """By difficulty: accuracy, tokens and samples at some budgets."""

    def means(mixture: Mixture, inside: NDArray[np.bool_]) -> dict[str, float | None]:
        return {c: rounded(mixture.column(c)[inside].mean()) for c in ("accuracy", "tokens", "samples")}

    points = {(k, f.name): f.at(field.budgets[k]) for k in CELL_BUDGETS if k in field.budgets for f in families}
    out: dict[str, Any] = {}
    for cell in sorted(set(difficulty.tolist())):
        inside = difficulty == cell
        for (budget, name), mixture in points.items():
            if mixture:
                out.setdefault(cell, {"prompts": int(inside.sum())}).setdefault(budget, {})[name] = means(
                    mixture, inside
                )
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


def _chosen(family: Family) -> list[dict[str, Any]]:
    """The kept settings by rising test tokens, in numbers from which the policy can be made again."""
    pairs = sorted(zip(family.settings, family.outcomes, strict=True), key=lambda pair: float(pair[1].tokens.mean()))
    return [record for setting, outcome in pairs if (record := _setting_record(setting, outcome))]


def _cheapest(field: Arena, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Where validation prefers the plain sample to the whole family (a hopeless base), its first setting stands in."""
    return [_setting_record(settings[0], field.test.play(settings[0]))]


def _setting_record(setting: Setting, outcome: Outcome) -> dict[str, Any]:
    """Empty for the plain sample, which every family may fall back on."""
    policy = setting.policy
    record = {"name": setting.name, "interval": setting.interval, "window": setting.window}
    record["tokens"] = rounded(outcome.tokens.mean())
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

    def record(name: str, target: float, found: float | None, least: bool = True) -> dict[str, Any]:
        met = None if found is None else bool(found >= target if least else found <= target)
        direction = "at least" if least else "at most"
        return {"name": name, "target": target, "direction": direction, "result": found, "met": met}

    worst = {k: min(d.values(), key=lambda i: i["value"]) for k, d in difference.items() if d}
    above = sum(all((i["low"] or 0) > 0 for i in d.values()) for d in difference.values() if d)
    level = sum(d["value"] >= 0 for d in worst.values())
    rows = [
        record("budgets at which zip-rc-plus is on or above every other", len(field.budgets), level),
        record("budgets at which it is above all of them (paired interval)", 4, above),
    ]
    for k in ("2", "4", "8"):
        if "majority" in difference.get(k, {}):
            rows.append(record(f"gain over majority@{k}", 0.05, difference[k]["majority"]["value"]))
    rows.append(
        record("share of majority@16's tokens for its accuracy", 1 / 3, _token_share(field, played), least=False)
    )
    eces = [a["ece"]["value"] for a in answer.values() if a]
    rows.append(record("largest ECE of the probability of the answer", 0.05, max(eces) if eces else None, least=False))
    return rows


def _token_share(field: Arena, played: Mapping[str, Family]) -> float | None:
    """Tokens at which zip-rc-plus reaches the accuracy of majority@16, as a share of majority@16's."""
    budget = field.budgets.get("16")
    majority = played["majority"].at(budget) if budget else None
    if majority is None or budget is None:
        return None
    wanted = float(majority.column("accuracy").mean())
    grid = np.linspace(field.budgets[min(field.budgets, key=float)] / 2, budget, 400)
    for tokens in grid.tolist():
        mixture = played[PLUS].at(tokens)
        if mixture and float(mixture.column("accuracy").mean()) >= wanted:
            return rounded(tokens / float(majority.column("tokens").mean()))
    return None
