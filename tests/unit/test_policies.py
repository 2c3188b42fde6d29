"""Policies of labelled rollouts: every objective against a slow loop, and what its data are."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ziprc.config.icl_v import Student
from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.tilt import LEAST, Tilt, log_weight
from ziprc.tables.qvalues import QVALUES
from ziprc.training.labelled import LabelledData, labelled_data
from ziprc.training.objectives.policy import METHODS, PolicyBundle
from ziprc.training.packs import Graded
from ziprc.training.trainees import text_log_probs

GRID = BinGrid((0.0, 0.5, 1.0), (0, 8, 16))
F64 = torch.float64


def bundle(seed: int = 0) -> PolicyBundle:
    """Six states of two rollouts with 2, 1, 3, 2, 2, 1 candidates; no distribution is complete."""
    rng = torch.Generator().manual_seed(seed)
    state = torch.tensor([0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 5])
    share = torch.rand(len(state), generator=rng, dtype=F64) + 0.1
    whole = torch.zeros(6, dtype=F64).index_add(0, state, share) + 0.2
    other = torch.rand(len(state), generator=rng, dtype=F64) + 0.1
    tail = torch.rand(6, generator=rng, dtype=F64) * 0.3 + 0.05
    target = (other / torch.zeros(6, dtype=F64).index_add(0, state, other)[state]).log() + torch.log1p(-tail)[state]
    return PolicyBundle(
        (share / whole[state]).log(),
        state=state,
        target=target,
        tail=tail.log(),
        row=torch.tensor([0, 0, 0, 1, 1, 1]),
        rows=2,
    )


def taken(seed: int = 0) -> PolicyBundle:
    """Six tokens of two rollouts; some ratios are beyond the clip on either side, with advantages of both signs."""
    rng = torch.Generator().manual_seed(seed)
    log_prob = -torch.rand(6, generator=rng, dtype=F64) - 0.1
    gap = torch.tensor([0.5, -0.5, 0.05, 0.6, -0.7, -0.02], dtype=F64)
    advantage = torch.tensor([1.0, 2.0, -0.5, -1.0, -1.5, 0.7], dtype=F64)
    return PolicyBundle(log_prob, log_prob - gap, advantage, torch.tensor([0, 0, 0, 1, 1, 1]), 2)


def slow(method: str, b: PolicyBundle, own: Student) -> float:
    """The same by a loop over states and tokens."""
    total, p = 0.0, b.log_prob.tolist()
    if method == "kl":
        for s in range(len(b.tail)):
            mine = [i for i, of in enumerate(b.state.tolist()) if of == s]
            student, target = [math.exp(p[i]) for i in mine], [math.exp(b.target[i]) for i in mine]
            if own.tail:
                student, target = [*student, 1 - sum(student)], [*target, math.exp(b.tail[s])]
            student, target = ([x / sum(of) for x in of] for of in (student, target))
            pairs = (
                zip(student, target, strict=True) if own.direction == "reverse" else zip(target, student, strict=True)
            )
            total += sum(x * math.log(x / y) for x, y in pairs)
        return total
    sums = [0.0, 0.0]
    for i, row in enumerate(b.row.tolist()):
        if method == "rft":
            total -= p[i]
            continue
        gap = p[i] - b.reference[i].item()
        sums[row] += gap
        a = b.advantage[i].item()
        if method == "awr":
            total -= min(math.exp(a / own.temperature), own.weight_clip) * p[i]
        if method in ("grpo", "ppo"):
            ratio = math.exp(gap)
            total -= min(ratio * a, min(max(ratio, 1 - own.clip_eps), 1 + own.clip_eps) * a)
        if method == "grpo":
            total += own.kl_coef * (math.exp(-gap) + gap - 1)
    return math.log(1 + math.exp(-own.beta * (sums[0] - sums[1]))) if method == "dpo" else total


CASES = [
    {"method": "kl"}, {"method": "kl", "direction": "forward"}, {"method": "kl", "tail": False},
    {"method": "kl", "tail": False, "direction": "forward"}, {"method": "rft"}, {"method": "awr", "temperature": 0.4},
    {"method": "awr", "weight_clip": 1.5}, {"method": "dpo", "beta": 0.7}, {"method": "grpo", "kl_coef": 0.3},
    {"method": "grpo"}, {"method": "ppo"},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_an_objective_equals_the_loop_and_has_the_gradient_of_finite_differences(case: dict[str, object]) -> None:
    own = Student(**case)
    b = bundle() if own.method == "kl" else taken()

    def loss(log_prob: torch.Tensor) -> torch.Tensor:
        return METHODS[own.method](PolicyBundle(**{**vars(b), "log_prob": log_prob}), own).total

    assert loss(b.log_prob).item() == pytest.approx(slow(own.method, b, own), rel=1e-9)
    assert torch.autograd.gradcheck(loss, b.log_prob.clone().requires_grad_(), atol=1e-6)
    gradient = torch.autograd.grad(loss(at := b.log_prob.clone().requires_grad_()), at)[0]
    assert gradient.abs().max() > 1e-3, "something is learned"


def test_the_surrogate_is_clipped_only_where_it_would_gain() -> None:
    """Published code takes the larger product where the advantage is negative: then wrong tokens are pushed on for ever."""
    signs = {}
    for advantage in (1.0, -1.0):
        for gap in (0.5, -0.5):
            at = torch.tensor([-1.0], dtype=F64, requires_grad=True)
            b = PolicyBundle(at, at.detach() - gap, torch.tensor([advantage], dtype=F64), torch.tensor([0]), 1)
            signs[advantage, gap] = torch.autograd.grad(METHODS["ppo"](b, Student(method="ppo")).total, at)[0].item()
    assert signs[1.0, 0.5] == 0 and signs[-1.0, -0.5] == 0, "far enough already"
    assert signs[1.0, -0.5] < 0 < signs[-1.0, 0.5], "gone astray: pulled back"


def test_log_probs_are_those_of_whole_logits_however_they_are_cut() -> None:
    rng = torch.Generator().manual_seed(0)
    states, weight = (torch.randn(n, 5, generator=rng, dtype=F64).requires_grad_() for n in (7, 11))
    ids, state = torch.tensor([3, 0, 10, 4]), torch.tensor([6, 0, 0, 2])
    whole = (states @ weight.T).log_softmax(-1)
    for chunk in (2, 100):
        found = text_log_probs(states, weight, ids, state, chunk)
        torch.testing.assert_close(found, whole[state, ids])
        scale = torch.arange(1.0, 5, dtype=F64)
        mine, theirs = (
            torch.autograd.grad((of * scale).sum(), (states, weight), retain_graph=True)
            for of in (found, whole[state, ids])
        )
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other)
        torch.testing.assert_close(
            text_log_probs(states, weight, ids, None, chunk) if len(ids) == len(states) else found, whole[state, ids]
        )


def test_how_values_weigh() -> None:
    q = np.array([0.0, 0.1, 0.9, 1.0])
    exp, soft, posterior = (np.exp(log_weight(Tilt(name), q, 0.1)) for name in ("exp", "soft", "posterior"))
    assert exp[2] / exp[1] == pytest.approx(math.exp(8)), "2,981"
    assert soft[2] / soft[1] == pytest.approx(9, rel=2e-3)
    np.testing.assert_allclose(posterior, [LEAST, 0.1, 0.9, 1.0])
    limit = log_weight(Tilt.SOFT, q[1:], 0.02)
    np.testing.assert_allclose(
        np.exp(limit - limit[-1]), q[1:], rtol=1e-5, err_msg="soft becomes posterior as eta falls"
    )
    far = log_weight(Tilt.SOFT, q, 1e4)
    np.testing.assert_allclose(far, q / 1e4, atol=1e-7, err_msg="and exp as it grows")
    rng = np.random.default_rng(0)
    cells = rng.dirichlet(np.ones(GRID.size), 5)
    free = log_weight(Tilt.SOFT_COST, np.zeros(5), 0.3, 0.0, cells, GRID)
    by_reward = cells.reshape(5, 3, 2).sum(-1)
    np.testing.assert_allclose(free, np.log(by_reward @ np.exp(np.array(GRID.reward_centres) / 0.3)), rtol=1e-9)
    dear = log_weight(Tilt.SOFT_COST, np.zeros(2), 0.3, 0.01, np.array([[0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]]), GRID)
    assert dear[0] - dear[1] == pytest.approx(0.01 * 8 / 0.3), "eight tokens more"


def graded(name: str, prompt: str, response: list[int], score: float) -> Graded:
    return Graded(name, prompt, np.array([7, 8], np.int32), np.array(response, np.int32), score, "", False, True)


ROLLOUTS = [
    graded("a", "p", [1, 2, 3], 1.0), graded("b", "p", [1, 4], 0.0), graded("c", "p", [5], 0.0),
    graded("d", "q", [2, 2], 1.0), graded("e", "q", [3], 1.0),
]  # fmt: skip


def labels(change: dict[str, object] | None = None, kind: str = "candidates", cells: bool = True) -> pa.Table:
    """Labels of the five rollouts: two candidates at every first token, one elsewhere."""
    rng, rows = np.random.default_rng(0), []
    for r in ROLLOUTS:
        m = len(r.response)
        ids = [sorted([int(r.response[0]), 9]), *([int(t)] for t in r.response[1:])]
        n = m + 1
        rows.append(
            {"rollout_id": r.rollout_id, "source": "critic", "siblings": 1, "offsets": [0, *range(2, m + 2)],
             "ids": [i for of in ids for i in of], "log_prob": np.log([0.6, 0.3, *rng.uniform(0.7, 0.9, m - 1)]),
             "q": rng.random(n), "cells": rng.dirichlet(np.ones(GRID.size), n).ravel().astype(np.float16) if cells else [],
             "values": rng.random(n)}
        )  # fmt: skip
    rows[0] |= change or {}
    return QVALUES.make(rows).replace_schema_metadata({b"kind": f'"{kind}"'.encode()})


def data_of(table: pa.Table | None = None, **student: object) -> LabelledData:
    return labelled_data(ROLLOUTS, labels() if table is None else table, Student(**student), GRID, "labels")


def test_which_rollouts_a_method_sees() -> None:
    assert data_of(method="kl").units.ravel().tolist() == [0, 1, 2, 3, 4]
    assert data_of(method="rft").units.ravel().tolist() == [0, 3, 4]
    assert data_of(method="grpo").units.ravel().tolist() == [0, 1, 2], "prompt q has nothing to compare"
    assert data_of(method="dpo").units.tolist() == [[0, 2]]
    assert data_of(method="awr").units.ravel().tolist() == [0, 1, 2, 3, 4]
    alone = labelled_data(ROLLOUTS, None, Student(method="rft", labels="none"), None, "grades")
    assert alone.units.ravel().tolist() == [0, 3, 4]


def test_advantages_chain_the_values_and_end_in_the_score() -> None:
    table = labels()
    for method, lam in (("awr", 0.0), ("awr", 0.9), ("awr", 1.0)):
        found = data_of(method=method, gae_lambda=lam, normalize_advantages=False).advantage
        expected = []
        for row, rollout in zip(table.to_pylist(), ROLLOUTS, strict=True):
            v, m = row["values"], len(rollout.response)
            delta = [v[t + 1] - v[t] + (rollout.score - v[m] if t == m - 1 else 0) for t in range(m)]
            expected += [sum(lam ** (j - t) * delta[j] for j in range(t, m)) for t in range(m)]
        np.testing.assert_allclose(found, expected, atol=1e-6)
    first = table.to_pylist()[0]["values"][0]
    assert data_of(method="awr", gae_lambda=1.0).advantage[0] == pytest.approx(1.0 - first), "what came of it, at λ = 1"
    normal = data_of(method="ppo").advantage
    assert normal.mean() == pytest.approx(0, abs=1e-6) and normal.std() == pytest.approx(1, abs=1e-5)
    grpo = data_of(method="grpo").advantage
    np.testing.assert_allclose(
        grpo, np.repeat([math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5), 0, 0], [3, 2, 1, 2, 1]), atol=1e-6
    )


def test_the_target_tilts_the_candidates_and_leaves_the_rest_as_it_is() -> None:
    table = labels()
    data = data_of(table, method="kl", eta=0.5)
    batch = {name: value.numpy() for name, value in data.batch(np.array([1, 0])).items()}
    rows = [table.to_pylist()[i] for i in (1, 0)]
    assert batch["count"] == 5 and batch["ids"].tolist() == rows[0]["ids"] + rows[1]["ids"]
    assert batch["state"].tolist() == [0, 0, 1, 2, 2, 3, 4]
    start = 0
    for state in range(5):
        mine = batch["state"] == state
        row, at = (rows[0], start) if state < 2 else (rows[1], start - 3)
        start += mine.sum()
        own = slice(at, at + mine.sum())
        reference = np.exp(row["log_prob"][own])
        weighed = reference * np.exp(np.array(row["q"][own]) / 0.5)
        tail = 1 - reference.sum()
        np.testing.assert_allclose(np.exp(batch["target"][mine]), (1 - tail) * weighed / weighed.sum(), rtol=1e-5)
        assert np.exp(batch["tail"][state]) == pytest.approx(tail, rel=1e-5)
    width = batch["input_ids"].shape[1]
    assert batch["positions"].tolist() == [1, 2, width + 1, width + 2, width + 3]
    choices = data_of(table, method="kl", tail=False).batch(np.array([1, 0]))
    assert choices["count"] == 2 and choices["positions"].tolist() == [1, width + 1] and len(choices["ids"]) == 4
    calm = data_of(table, method="kl", eta=1e9)
    np.testing.assert_allclose(
        np.exp(calm.targets.target), np.exp(pa.compute.list_flatten(table["log_prob"]).to_numpy()), rtol=1e-5
    )


def test_tokens_and_pairs_of_a_batch() -> None:
    pair = data_of(method="dpo").batch(np.array([0]))
    assert pair["count"] == 1 and pair["row"].tolist() == [0, 0, 0, 1] and pair["ids"].tolist() == [1, 2, 3, 5]
    reference = {row["rollout_id"]: row for row in labels().to_pylist()}
    want = [
        dict(zip(reference[r]["ids"], reference[r]["log_prob"], strict=True))[i]
        for r, i in zip("aaac", (1, 2, 3, 5), strict=True)
    ]
    np.testing.assert_allclose(pair["reference"], want, rtol=1e-6)
    cut = data_of(method="awr", max_length=3).batch(np.array([0]))
    assert cut["ids"].tolist() == [1, 2] and cut["input_ids"].shape[1] == 3, "no target beyond the cut"


SHORT = {"offsets": [0, 1], "ids": [1], "log_prob": [-1.0], "q": [0.5], "values": [0.5, 0.5]}


@pytest.mark.parametrize(
    ("table", "student", "said"),
    [
        (lambda: labels(kind="taken"), {"method": "kl"}, "taken alone, .* it needs every candidate"),
        (lambda: labels({"rollout_id": "x"}), {"method": "awr"}, "1 rollouts are none of those given, for example x"),
        (lambda: labels(SHORT), {"method": "awr"}, "has labels for 1 tokens, but 3 tokens"),
        (lambda: labels({"ids": [6, 9, 2, 3]}), {"method": "awr"}, "taken are not among the candidates.*another tokenizer"),
        (lambda: labels().slice(3), {"method": "dpo"}, "nothing is left that dpo .* no two of a prompt differ"),
        (lambda: labels().slice(3), {"method": "grpo"}, "nothing is left that grpo .* no two of a prompt differ"),
        (lambda: labels().slice(1, 2), {"method": "rft"}, "nothing is left that rft .* none has a score above 0.5"),
        (lambda: labels(cells=False), {"method": "kl", "tilt": "soft_cost"}, "hold no joint"),
    ],
)  # fmt: skip
def test_labels_that_do_not_suffice_are_refused(table: object, student: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        data_of(table(), **student)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        ({"method": "kl", "labels": "none"}, "kl learns from labels, so labels cannot be none"),
        ({"method": "kl", "labels": "trie", "tilt": "soft_cost"}, "the trie has none"),
    ],
)
def test_a_student_that_could_learn_nothing_is_refused_by_the_configuration(
    student: dict[str, object], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        Config.model_validate({"train_policy": {"students": {"one": student}}})


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("q", [0.5, 1.5, 0.5, 0.5], "numbers have to lie between 0 and 1"),
        ("q", [0.5, float("nan"), 0.5, 0.5], "numbers have to lie between 0 and 1"),
        ("log_prob", [0.1, -1, -1, -1], "between -inf and 0"),
        ("ids", [1, 9, 2], "as many numbers as the last offset says"),
        ("values", [0.5] * 3, "one value for every state"),
    ],
)
def test_a_table_of_labels_is_checked(tmp_path: Path, column: str, value: list[float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        QVALUES.write(tmp_path / "q.parquet", labels({column: value}))
    QVALUES.write(tmp_path / "q.parquet", labels())
    assert QVALUES.read(tmp_path / "q.parquet").num_rows == 5
