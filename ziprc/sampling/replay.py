"""Executing a policy on recorded rollouts: no model runs, so a sweep over settings takes seconds.

A pool holds K independent rollouts of each prompt with what the model said at every token. The n-th sample that a
policy starts is the n-th rollout of an order of the pool; advancing it reveals the next tokens, and only what is revealed
is paid for. Several orders of one pool are separate episodes of the same prompt. What cannot be replayed is branching:
nobody recorded another continuation. The decisions are the very ones of the live executor. Shapes: N prompts, K rollouts,
E episodes, S slots, C cells, F features, T readings of all rollouts together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ziprc.sampling import features
from ziprc.sampling.controller import Controller, Decision, apply
from ziprc.sampling.tree import NO_ANSWER, ROOT, Floats, Ints, Status, Trees

ROLLOUTS_AT_ONCE = 1024  # bounds the memory of running sums
Observer = Callable[[Ints, Trees, Decision], None]  # episodes that are due, their trees, what was decided


@dataclass(frozen=True)
class Pool:
    """Recorded rollouts. Readings of rollout (n, k) are rows `first[n, k]` to `first[n, k] + length[n, k] - 1`."""

    length: NDArray[np.int32]  # [N, K] tokens, stop token included
    finished: NDArray[np.bool_]  # [N, K] ended by itself
    answer: NDArray[np.int32]  # [N, K] numbers of canonical answers within a prompt
    score: NDArray[np.float32]  # [N, K]
    prompt_tokens: NDArray[np.int32]  # [N]
    joint: NDArray[np.floating]  # [T, C]
    features: NDArray[np.float32]  # [T, F]

    @property
    def first(self) -> Ints:
        flat = self.length.ravel().astype(np.int64)
        return (np.cumsum(flat) - flat).reshape(self.length.shape)

    def smoothed(self, window: int) -> NDArray[np.float32]:
        """[T, C] causal running mean of the joint over the last `window` readings of the same rollout."""
        if window == 1:
            return np.asarray(self.joint, np.float32)
        out = np.empty(self.joint.shape, np.float32)
        length, first = self.length.ravel().astype(np.int64), self.first.ravel()
        for begin in range(0, len(length), ROLLOUTS_AT_ONCE):
            part = slice(begin, begin + ROLLOUTS_AT_ONCE)
            start, stop = first[part][0], first[part][-1] + length[part][-1]
            position = np.arange(stop - start) - np.repeat(first[part] - start, length[part])
            span, end = np.minimum(position + 1, window), np.arange(1, stop - start + 1)
            sums = np.zeros((stop - start + 1, self.joint.shape[1]))
            np.cumsum(self.joint[start:stop], 0, dtype=np.float64, out=sums[1:])
            out[start:stop] = (sums[end] - sums[end - span]) / span[:, None]
        return out


def track(length: Ints, log_prob: Floats, entropy: Floats) -> NDArray[np.float32]:
    """[T, F] features of all readings of rollouts with `length` [n]; `log_prob` [T] is of the token before each reading."""
    first = np.cumsum(length, dtype=np.int64) - length
    out = np.empty((int(length.sum()), len(features.FEATURES)), np.float32)
    seen = features.fresh(len(length))
    for position in range(int(length.max(initial=0))):
        live = np.flatnonzero(length > position)
        rows = first[live] + position
        seen[live] = out[rows] = features.update(seen[live], log_prob[rows], entropy[rows])
    return out


@dataclass(frozen=True)
class Played:
    """What came of E episodes. `prompt` says which prompt each belongs to."""

    prompt: Ints
    score: Floats  # of the chosen answer
    probability: Floats  # that the policy gave to it
    tokens: Ints  # generated, abandoned ones included
    latency: Ints  # serial decoding steps
    samples: Ints  # branches started
    trees: Trees
    rollout: Ints  # [E, S] which rollout of the pool each slot replays


def replay(
    controller: Controller, pool: Pool, signals: Floats, orders: Ints, observe: Observer | None = None
) -> Played:
    """Play every prompt once per order. `signals` [T, K] are `policy.read` of all readings, `orders` [E / N, N, K]."""
    prompts, rollouts = pool.length.shape
    prompt = np.tile(np.arange(prompts), len(orders))
    slots = min(controller.budget.branches, rollouts)
    trees = Trees.empty(len(prompt), slots, signals.shape[1])
    rollout = orders.reshape(-1, rollouts)[:, :slots]
    answers = np.where(pool.finished, pool.answer, NO_ANSWER)
    length, first, answer = (of[prompt[:, None], rollout] for of in (pool.length, pool.first, answers))
    trees.status[:, 0] = Status.RUNNING
    _advance(trees, 1, length, first, answer, signals)
    trees.root[:] = trees.signals[:, 0]
    alive = np.arange(len(prompt))
    while len(alive):
        part = trees.take(alive)
        decision = controller.decide(part)
        if observe is not None:
            observe(alive, part, decision)
        apply(decision, part)
        assert (part.parent == ROOT).all(), "a replay cannot branch"
        going = part.running.any(-1)
        _advance(part, controller.budget.interval, length[alive], first[alive], answer[alive], signals)
        trees.put(alive, part)
        alive = alive[going]
    choice = controller.choose(trees)
    chosen = choice.slot[:, None]
    picked = np.take_along_axis(rollout, chosen, 1)[:, 0]
    done = np.take_along_axis(trees.finished, chosen, 1)[:, 0]
    return Played(
        prompt=prompt,
        score=np.where(done, pool.score[prompt, picked], 0.0).astype(np.float64),
        probability=choice.probability,
        tokens=trees.spent,
        latency=trees.latency.astype(np.int64),
        samples=trees.used.sum(-1),
        trees=trees,
        rollout=rollout,
    )


def _advance(trees: Trees, tokens: int, length: Ints, first: Ints, answer: Ints, signals: Floats) -> None:
    """Every running branch gains up to `tokens` tokens, its newest signals and, at its end, its answer."""
    running = trees.running
    gained = np.where(running, np.minimum(tokens, length - trees.length), 0)
    trees.length += gained.astype(np.int32)
    trees.latency += gained.max(-1).astype(np.int32)
    trees.signals[running] = signals[(first + trees.length - 1)[running]]
    ended = running & (trees.length == length)
    trees.status[ended] = Status.FINISHED
    trees.answer[ended] = answer[ended]


def pool_orders(prompts: int, rollouts: int, count: int, seed: int) -> Ints:
    """[count, N, K] random orders of every prompt's rollouts."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(rollouts), (count, prompts, 1)), axis=-1)
