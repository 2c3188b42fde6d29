"""On-policy training with copies of the vocabulary: the law that is learned, the rate of their rows, and what is said of them.

Prompts end in an open thinking block, so that the small random model thinks at all.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.doubles import thinking_tokenizer, tiny_model, tiny_tokenizer
from tests.unit.test_online import EASY, Run, one_thread  # noqa: F401, a fixture that every test here uses
from ziprc.config.base import Runtime
from ziprc.config.online import Arm
from ziprc.config.vocabulary import Expansion
from ziprc.joint.checkpoint import load_model, save_checkpoint
from ziprc.joint.reasoning import NEVER, ReasoningVocabulary
from ziprc.rewards.base import Grade, Item, graded
from ziprc.training.expansion import add_copies
from ziprc.training.law import add_region_head
from ziprc.training.vocabulary import QUARTERS, CopiesRate, Use, drift, put_back


def thinking_base(folder: Path, own: Expansion | None = None) -> Path:
    """A checkpoint with copies, whose template opens the block."""
    tokenizer, model = thinking_tokenizer(), tiny_model(tiny_tokenizer())
    _, marked = add_copies(model, tokenizer, own or Expansion(), [], 0)
    save_checkpoint(folder / "base", model, marked, {"params": {}, "parents": {}})
    return folder


def run(folder: Path, arm: Arm = EASY, own: Expansion | None = None, **more: Any) -> Run:
    return Run(thinking_base(folder, own), arm, grader=soon, **more)


def soon(items: Sequence[Item]) -> list[Grade]:
    """Right is to say little before the end: half of what would end a response is a copy, which does not."""
    return [graded(len(item.response) <= 3) for item in items]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    one = run(
        tmp_path_factory.mktemp("copies"), EASY.model_copy(update={"rollouts": 16, "beta": 0.01, "learning_rate": 2e-2})
    )
    one.train()
    return one


def test_it_learns_by_the_law_that_sampled(learned: Run) -> None:
    rows = learned.trainer.rows
    assert np.mean([row["success"] for row in rows[-2:]]) > 0.8 > 0.4 > rows[0]["success"]
    assert all(row["mismatch_kl"] < 1e-9 and row["mismatch_max"] < 1e-3 for row in rows)
    assert abs(rows[0]["kl"]) < 1e-9 and rows[-1]["kl"] > 1e-4  # the reference has copies and the same law


def test_the_table_says_what_became_of_the_copies(learned: Run) -> None:
    rows = learned.trainer.rows
    assert all(row["violations"] == 0 for row in rows)
    assert 0.4 < rows[0]["copies_share"] < 0.6 and rows[0]["copies_used"] > 30  # at first either is as likely
    assert rows[0]["logit_gap"] == pytest.approx(0, abs=1e-6) and rows[0]["entropy_inside"] > rows[0]["entropy"] - 0.1
    drifts = [row["drift_mean"] for row in rows]
    assert drifts == sorted(drifts) and drifts[0] > 0 and rows[-1]["drift_max"] >= drifts[-1]
    assert max(row["copy_kl"] or 0 for row in rows) > 1e-4
    for row in rows:
        assert len(json.loads(row["copies_by_quarter"])) == QUARTERS
        most = json.loads(row["most_moved"])
        assert most[0][1] == pytest.approx(row["drift_max"], abs=1e-6)
        assert learned.reasoning is not None and learned.reasoning.is_copy([i for i, _ in most]).all()


def test_frozen_copies_stay_and_half_a_rate_moves_them_by_half(tmp_path: Path) -> None:
    moved = {}
    for rate in (0.0, 0.5, 1.0):
        one = run(tmp_path / str(rate), EASY.model_copy(update={"rollouts": 1, "copies_rate": rate}))
        before = one.weights()["model.embed_tokens.weight"]
        one.train()
        assert one.reasoning is not None
        moved[rate] = one.weights()["model.embed_tokens.weight"] - before
        rows = one.reasoning.rows
    assert not moved[0.0][rows].any() and moved[0.0][: rows.start].any()
    torch.testing.assert_close(moved[0.5][rows], 0.5 * moved[1.0][rows], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(moved[0.5][: rows.start], moved[1.0][: rows.start])


def test_frozen_rows_weigh_nothing_in_the_norm_of_the_gradient() -> None:
    model = tiny_model(tiny_tokenizer())
    reasoning, _ = add_copies(model, tiny_tokenizer(), Expansion(), [], 0)
    CopiesRate(model, reasoning, 0.0)
    ids = torch.arange(reasoning.start, reasoning.start + 20)[None]
    model(ids, labels=ids).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None and not gradient[reasoning.rows].any() and gradient[: reasoning.start].any()


def test_a_stopped_run_with_copies_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    arm = EASY.model_copy(update={"rollouts": 4, "copies_rate": 0.5})
    kept = Runtime(rollouts_per_device=32, save_steps=2)
    straight = run(tmp_path / "straight", arm, runtime=kept)
    straight.train()
    one = run(tmp_path / "cut", arm, runtime=kept)
    plain, calls = one.trainer.grader, itertools.count()

    def dying(items: Any) -> Any:
        if next(calls) == 2:
            raise InterruptedError
        return plain(items)

    one.trainer.grader = dying
    with pytest.raises(InterruptedError):
        one.train()
    again = run(tmp_path / "cut", arm, runtime=kept)
    again.train()
    for name, tensor in straight.weights().items():
        assert torch.equal(again.weights()[name], tensor), name
    timeless = [
        [{k: v for k, v in row.items() if "seconds" not in k} for row in of.trainer.rows] for of in (straight, again)
    ]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("only", [False, True])
def test_the_two_calls_of_the_head_are_the_dense_law_and_its_gradient(only: bool) -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model(tiny_tokenizer())
    own = Expansion(copies=2, init_noise=0.3, inside="reasoning_only" if only else "both")
    reasoning, _ = add_copies(model, tokenizer, own, [], 0)
    rng, keep = np.random.default_rng(0), 12
    ids = torch.from_numpy(rng.integers(1, 250, size=(3, 20)))
    inside = torch.from_numpy(rng.random((3, keep)) < 0.5)
    copies = torch.from_numpy(rng.integers(reasoning.rows.start, reasoning.rows.stop, size=(3, keep)))
    ids[:, -keep:] = torch.where(inside, copies, ids[:, -keep:])  # what both laws allow
    weights, found = rng.normal(size=(3, keep)), {}
    for kind in ("dense", "ours"):
        model.zero_grad()
        if kind == "ours":
            add_region_head(model, reasoning, 0.7)
            log_probs, entropies, _ = model(input_ids=ids, attention_mask=torch.ones_like(ids), inside=inside)
        else:
            logits = model(ids).logits[:, -keep - 1 : -1] / 0.7
            law = torch.from_numpy(reasoning.bias(logits.shape[-1])).clamp(min=NEVER)
            outside = torch.zeros_like(law)
            outside[reasoning.rows] = NEVER
            whole = (logits + torch.where(inside[..., None], law, outside)).log_softmax(-1)
            log_probs = whole.gather(-1, ids[:, -keep:, None])[..., 0]
            entropies = -(whole.exp() * whole).sum(-1)
        (log_probs * torch.from_numpy(weights)).sum().backward()
        found[kind] = log_probs.detach(), entropies.detach(), model.get_input_embeddings().weight.grad.clone()
    for one, other in zip(found["dense"], found["ours"], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_a_rollout_is_scored_in_batches_as_in_one(tmp_path: Path) -> None:
    one = run(tmp_path)
    assert one.reasoning is not None
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 250, size=(5, 20)))
    ids[:, 2], ids[:3, 3], ids[1, 14] = one.reasoning.turn, one.reasoning.opens, one.reasoning.closes
    with torch.no_grad():
        whole, parts = (
            one.trainer._get_per_token_logps_and_entropies(one.model, ids, torch.ones_like(ids), 12, batch_size=size)
            for size in (None, 2)
        )
    for a, b in zip(whole[:2], parts[:2], strict=True):
        assert a.shape == (5, 12)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    one.engine.close()


def test_what_is_counted_is_what_a_slow_count_finds() -> None:
    own = ReasoningVocabulary(300, ((10, 20),), 1, turn=1, opens=2, closes=3)
    use = Use(own)
    use.see([[1], [1, 2]], [[12, 2, 300, 13, 301, 14, 3, 302, 12], [300, 300, 3]])
    row = use.row()
    assert (row["copies_share"], row["copies_used"], row["violations"]) == (4 / 8, 3, 1)  # thoughts: 5 and 3 tokens
    assert json.loads(row["copies_by_quarter"]) == [round(2 / 3, 6), 1, 0, 0]
    assert use.with_others([use, use]).row()["violations"] == 2
    assert Use(own).row()["copies_share"] is None  # nothing was thought: no share, not 0


def test_putting_a_copy_back_matters_once_it_has_moved(tmp_path: Path) -> None:
    folder = thinking_base(tmp_path)
    model = load_model(folder / "base")
    reasoning = ReasoningVocabulary.from_dict(model.config.ziprc["reasoning"])
    prompts = [[reasoning.turn, reasoning.opens]] * 6
    said = [[reasoning.start + 40 + i, 41, reasoning.start + 42] for i in range(6)]
    rng = np.random.default_rng(0)
    assert put_back(model, reasoning, prompts, said, (), rng) == pytest.approx([0.0] * 6, abs=1e-6)
    assert put_back(model, reasoning, prompts, [[41, 42]] * 6, (), rng) == []
    with torch.no_grad():
        model.get_input_embeddings().weight[reasoning.rows] += 0.5
    gaps = put_back(model, reasoning, prompts, said, (), rng)
    assert len(gaps) == 6 and min(gaps) > 1e-4
    into, out = drift(model, reasoning)
    assert into.min() > 0 and np.array_equal(into, out)  # tied


def test_a_sampler_that_does_not_know_of_the_block_is_found_out(tmp_path: Path) -> None:
    """It would draw copies after the thought, which the trained law gives no probability."""
    from ziprc.errors import UserError

    one = run(tmp_path, EASY.model_copy(update={"rollouts": 2}))
    assert one.reasoning is not None
    generate = one.engine.generate

    def outside(requests: Any) -> Any:
        copy = (one.reasoning.closes, one.reasoning.start + 5, 0)
        return [replace(r, token_ids=copy, log_probs=np.zeros(3, np.float32)) for r in generate(requests)]

    one.engine.generate = outside
    with pytest.raises(UserError, match="drew a token without probability"):
        one.train()
