"""The on-policy trainer on a random model of bytes: it learns, and says of itself what is true.

How it resumes is in test_online_resume.
The task is so easy that only a broken trainer fails it: an eighth of all ids end a response, and right is a response that
ends at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.doubles import ROWS, tiny_checkpoint
from ziprc.chat import prompt_token_ids
from ziprc.config.base import Runtime, Sampling
from ziprc.config.online import Arm, Reward, TrainOnline, Window
from ziprc.engines import start
from ziprc.engines.base import EngineSettings, Request, Response, unknown_rows
from ziprc.errors import UserError
from ziprc.joint.checkpoint import load_model, save_checkpoint
from ziprc.joint.reasoning import read_reasoning
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.base import Grade, Item, graded, ungraded
from ziprc.tables.grades import GradeStatus
from ziprc.tables.progress import PROGRESS
from ziprc.training.arguments import HeldOut, Sampler
from ziprc.training.durable import train_to_the_end
from ziprc.training.law import ban, unban
from ziprc.training.online import OnlineTrainer
from ziprc.training.window import Controller

CAP, STOPS = 16, tuple(range(0, 260, 8))
EASY = Arm(learning_rate=1e-2, rollouts=10, prompts=4, samples=8, warmup=0, betas=(0.9, 0.99))
NOTHING = HeldOut([], [], 0, 1)
PROMPTS = [
    {"prompt_id": f"p{i}", "messages": [{"role": "user", "content": f"say {i}"}], "answer": None, "extra": "{}",
     "difficulty": ("odd", "even")[i % 2]}
    for i in range(48)
]  # fmt: skip


def at_once(items: Sequence[Item]) -> list[Grade]:
    """Right is to say nothing before the end."""
    return [graded(not item.response, rationale=f"late: {len(item.response)} letters") for item in items]


class Run:
    """A trainer with what it needs, in a folder of its own."""

    def __init__(
        self, folder: Path, arm: Arm = EASY, own: TrainOnline | None = None, grader: Callable[..., list[Grade]] = at_once,
        held_out: HeldOut = NOTHING, runtime: Runtime | None = None, seed: int = 0, prompts: Sequence[Any] = PROMPTS,
    ) -> None:  # fmt: skip
        self.base = folder / "base"
        if not self.base.exists():
            tiny_checkpoint(self.base, joint=False)
        self.tokenizer, self.model = load_tokenizer(self.base), load_model(self.base)
        banned = unknown_rows(self.base, self.tokenizer)
        self.reasoning = read_reasoning(self.base)
        settings = EngineSettings(
            self.base, Sampling(min_p=0.0), STOPS, banned, max_model_len=64, reasoning=self.reasoning, log_probs=True
        )
        self.engine = start("hf", settings)
        self.control = Controller(arm.window, CAP, seed)
        self.states = folder / ".online-easy.training" / "run"
        self.trainer = OnlineTrainer(
            self.model, self.tokenizer, prompts, arm, own or TrainOnline(), runtime or Runtime(rollouts_per_device=32),
            Sampler(self.engine, STOPS, banned, CAP, 64, self.reasoning), self.control, grader, held_out, self.states, seed,
        )  # fmt: skip

    def train(self) -> list[dict[str, Any]]:
        plain, self.sampled = self.engine.generate, list[Response]()

        def generate(requests: Sequence[Request]) -> list[Response]:
            self.sampled = plain(requests)
            return self.sampled

        self.engine.generate = generate  # type: ignore[method-assign]
        with contextlib.closing(self.engine):
            train_to_the_end(self.trainer, self.states)
        return self.trainer.rows

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twenty rollouts, judged every tenth."""
    folder = tmp_path_factory.mktemp("learned")
    judged = PROMPTS[-4:]
    ids = [prompt_token_ids(_tokenizer(folder), row["messages"], True) for row in judged]
    arm = EASY.model_copy(update={"learning_rate": 2e-2, "rollouts": 20})
    run = Run(folder, arm, held_out=HeldOut(judged, ids, 10, 4), prompts=PROMPTS[:-4])
    run.train()
    return run


def _tokenizer(folder: Path) -> Any:
    tiny_checkpoint(folder / "base", joint=False)
    return load_tokenizer(folder / "base")


def test_it_learns(learned: Run) -> None:
    success = [row["success"] for row in learned.trainer.rows[1:]]
    assert success[0] < 0.3 and np.mean(success[-2:]) > 0.85, success
    held_out = [row["held_out"] for row in learned.trainer.rows if row.get("held_out") is not None]
    assert len(held_out) == 3 and held_out[0] < 0.4 < 0.8 < held_out[-1]


def test_the_table_says_what_happened(learned: Run, tmp_path: Path) -> None:
    rows = learned.trainer.rows
    table = PROGRESS.make({name: [row.get(name) for row in rows] for name in PROGRESS.columns.names})
    PROGRESS.write(tmp_path / "progress.parquet", table)
    assert [row["rollout"] for row in PROGRESS.read(tmp_path / "progress.parquet").to_pylist()] == list(range(21))
    for before, row in itertools.pairwise(rows):
        assert row["responses"] == 32 and row["prompts"] == 4 and row["window"] == CAP
        assert row["tokens_total"] == before["tokens_total"] + row["tokens_response"]
        assert (
            sum(json.loads(row["by_reason"]).values()) == 32
            and json.loads(row["by_reason"])["right"] == 32 * row["success"]
        )
        cells = json.loads(row["by_difficulty"])
        assert sum(right for _, right in cells.values()) == 32 * row["success"]
        assert abs(row["reward"] - row["success"]) < 1e-6 and (row["grad_norm"] > 0) == (row["zero_variance"] < 1)
        assert row["seconds"] >= row["seconds_generate"] + row["seconds_grade"] + row["seconds_judge"] > 0
    assert {name for name in set().union(*rows) if "seconds" not in name} <= {*PROGRESS.columns.names}


def test_sampler_and_trainer_agree_and_the_first_update_is_on_policy(learned: Run) -> None:
    for row in learned.trainer.rows[1:]:
        assert row["mismatch_kl"] < 1e-9 and row["mismatch_max"] < 1e-3
        assert (row["ratio_mean"], row["ratio_std"], row["ratio_outside"], row["log_ratio_mean"]) == (1, 0, 0, 0)


def test_later_updates_on_a_rollout_are_off_policy_and_measured(tmp_path: Path) -> None:
    rows = Run(tmp_path, EASY.model_copy(update={"updates": 2, "passes": 2, "rollouts": 3})).train()
    assert [row["step"] for row in rows] == [4, 8, 12]
    for row in rows:
        assert row["mismatch_kl"] < 1e-9  # before any update, whatever came after
        assert row["ratio_std"] > 1e-3 and row["ratio_p95"] > row["ratio_mean"] and 0 < row["ratio_outside"] < 1
        assert row["seconds_score"] > 0


def test_an_alarm_says_when_another_policy_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run(tmp_path, EASY.model_copy(update={"rollouts": 2}))
    run.engine.load_weights = lambda weights: None  # type: ignore[method-assign]
    rows = run.train()
    assert rows[0]["mismatch_kl"] < 1e-9 and rows[1]["mismatch_kl"] > 1e-3
    warned = [line for line in capsys.readouterr().err.splitlines() if "sampler and trainer differ by" in line]
    assert len(warned) == 1 and warned[0].startswith("rollout 2: ")


# --- what is learned from ---


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    arm = EASY.model_copy(update={"rollouts": 3})
    whole, parts = (
        Run(tmp_path / str(size), arm, runtime=Runtime(rollouts_per_device=size)) for size in (32, 4)
    )  # 1 × 32 and 8 × 4
    assert (whole.trainer.sizes.accumulation, parts.trainer.sizes.accumulation) == (1, 8)
    (tmp_path / "4").mkdir(exist_ok=True)
    a, b = whole.train(), parts.train()
    for one, other in zip(a, b, strict=True):
        assert one["tokens_total"] == other["tokens_total"] and abs(one["grad_norm"] - other["grad_norm"]) < 1e-4
    for name, tensor in whole.weights().items():
        torch.testing.assert_close(parts.weights()[name], tensor, atol=2e-4, rtol=0)


@pytest.mark.parametrize("loss", ["dapo", "bnpo"])
def test_micro_batches_hold_responses_of_like_lengths_and_no_padding_beyond(tmp_path: Path, loss: str) -> None:
    run = Run(
        tmp_path,
        EASY.model_copy(update={"rollouts": 1, "updates": 2, "loss": loss}),
        runtime=Runtime(rollouts_per_device=4),
    )
    caught: list[dict[str, torch.Tensor]] = []
    plain = run.trainer._compute_loss
    run.trainer._compute_loss = lambda model, inputs: (caught.append(dict(inputs)), plain(model, inputs))[1]  # type: ignore[method-assign]
    run.train()
    lengths = [inputs["completion_mask"].sum(1).tolist() for inputs in caught]
    assert len(caught) == 8 and all(len(of) == 4 for of in lengths)
    assert [inputs["completion_ids"].shape[1] for inputs in caught] == [max(of) for of in lengths]
    for step in (lengths[:4], lengths[4:]):
        flat = [length for of in step for length in of]
        assert (flat == sorted(flat, reverse=True)) == (loss != "bnpo") and len(set(flat)) > 3
    sampled = sorted(tuple(response.token_ids) for response in run.sampled)
    learned = sorted(
        tuple(ids[mask.bool()].tolist())
        for inputs in caught
        for ids, mask in zip(inputs["completion_ids"], inputs["completion_mask"], strict=True)
    )
    assert learned == sampled  # every response once, with its own tokens


@pytest.mark.parametrize("loss", ["dapo", "grpo"])
def test_advantage_and_loss_are_those_of_a_slow_loop(tmp_path: Path, loss: str) -> None:
    arm = EASY.model_copy(update={"rollouts": 1, "updates": 2, "loss": loss, "beta": 0.1})
    run = Run(tmp_path, arm)
    caught: list[tuple[dict[str, torch.Tensor], float]] = []
    plain = run.trainer._compute_loss

    def kept(model: Any, inputs: Any) -> torch.Tensor:
        found = plain(model, inputs)
        caught.append(({**inputs, "new": run.trainer.scored}, float(found.detach())))
        return found

    run.trainer._compute_loss = kept  # type: ignore[method-assign]
    rewards: dict[tuple[int, ...], float] = {}
    score = run.trainer._calculate_rewards

    def noted(inputs: Any, *more: Any) -> torch.Tensor:
        found = score(inputs, *more)
        for row, response, value in zip(inputs, run.trainer.now.responses, found[:, 0].tolist(), strict=True):
            rewards[row["prompt_id"], len(rewards), *response.token_ids] = value
        return found

    run.trainer._calculate_rewards = noted  # type: ignore[method-assign]
    run.train()
    groups: dict[str, list[float]] = {}
    for key, value in rewards.items():
        groups.setdefault(key[0], []).append(value)
    by_tokens = {
        key[2:]: (value - np.mean(groups[key[0]])) / (np.std(groups[key[0]], ddof=1) + 1e-4)
        for key, value in rewards.items()
    }
    tokens_of_rollout = sum(int(inputs["completion_mask"].sum()) for inputs, _ in caught)
    for inputs, found in caught:
        total, rows = 0.0, inputs["completion_mask"].bool()
        for i, mask in enumerate(rows):
            ids = tuple(inputs["completion_ids"][i][mask].tolist())
            advantage = float(inputs["advantages"][i])
            assert advantage == pytest.approx(by_tokens[ids], abs=1e-5) or list(k[2:] for k in rewards).count(ids) > 1
            own = 0.0
            for t in mask.nonzero()[:, 0].tolist():
                new, old, ref = (float(inputs[k][i, t]) for k in ("new", "old_per_token_logps", "ref_per_token_logps"))
                ratio = np.exp(new - old)
                kl = (np.exp(ref - new) - (ref - new) - 1) * ratio
                own += -min(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage) + 0.1 * kl
            total += own / (int(mask.sum()) if loss == "grpo" else 1)
        # of a step's tokens: TRL takes half of the rollout's, as there are two updates
        expected = total / len(rows) if loss == "grpo" else total / (tokens_of_rollout / 2)
        assert found == pytest.approx(expected, abs=2e-6)


def test_a_rollout_of_which_every_response_was_cut_and_left_out_teaches_nothing(tmp_path: Path) -> None:
    arm = EASY.model_copy(
        update={
            "prompts": 1,
            "samples": 2,
            "rollouts": 6,
            "mask_truncated": True,
            "window": Window(start=1, smallest=1),
        }
    )
    rows = Run(tmp_path, arm).train()
    cut = [row for row in rows if row["truncated"] == 1]
    assert cut and all("ratio_mean" not in row and row["grad_norm"] == 0 for row in cut)
    assert len(rows) == 6


def test_more_beta_keeps_the_policy_nearer_to_where_it_started(tmp_path: Path) -> None:
    ends = []
    for beta in (0.01, 3.0):
        rows = Run(tmp_path / str(beta), EASY.model_copy(update={"beta": beta, "rollouts": 8})).train()
        assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)  # at the first update the policy is the reference
        ends.append(rows[-1]["kl"])
    assert ends[1] < 0.5 * ends[0], ends


def test_banned_rows_have_no_probability_in_training_either(tmp_path: Path) -> None:
    run = Run(tmp_path)
    plain = load_model(run.base)
    ids = torch.tensor([[70, 71, 72, 73, 74]])
    found, _, _ = run.trainer._get_per_token_logps_and_entropies(run.model, ids, torch.ones_like(ids), 3)
    (banned,) = unknown_rows(run.base, run.tokenizer)
    logits = plain(ids).logits[0]
    logits[:, slice(*banned)] = -torch.inf
    expected = logits.log_softmax(-1)[1:-1].gather(-1, ids[0, 2:, None])[:, 0]
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
    assert run.model(ids).logits[0, :, banned[0]].max() < -1000
    run.engine.close()


def test_a_ban_is_no_part_of_what_is_saved(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert not [name for name in run.model.state_dict() if "bias" in name]
    unban(run.model)
    save_checkpoint(tmp_path / "saved", run.model, run.tokenizer, {})
    again = load_model(tmp_path / "saved")
    assert again.get_output_embeddings().bias is None
    ban(again, ())
    assert again.get_output_embeddings().bias is None
    run.engine.close()


def test_what_could_not_be_graded_is_no_wrong_answer(tmp_path: Path) -> None:
    """A grader that always fails for right answers would, scored 0, teach the opposite: the rest would be punished less."""

    def failing(items: Sequence[Item]) -> list[Grade]:
        return [ungraded(GradeStatus.TIMEOUT) if i % 3 == 0 else one for i, one in enumerate(at_once(items))]

    run = Run(tmp_path, EASY.model_copy(update={"rollouts": 1}), grader=failing)
    rewarded: list[torch.Tensor] = []
    learned: list[dict[str, torch.Tensor]] = []
    reward, loss = run.trainer._calculate_rewards, run.trainer._compute_loss
    run.trainer._calculate_rewards = lambda *given: (rewarded.append(reward(*given)), rewarded[0])[1]  # type: ignore[method-assign]
    run.trainer._compute_loss = lambda model, inputs: (learned.append(dict(inputs)), loss(model, inputs))[1]  # type: ignore[method-assign]
    (row,) = run.train()
    left_out = torch.isnan(rewarded[0]).all(-1)
    assert int(left_out.sum()) == row["ungraded"]
    groups = [group[~torch.isnan(group)] for group in rewarded[0][:, 0].view(-1, EASY.samples)]
    mixed = sum(len(group) for group in groups if len(set(group.tolist())) > 1)
    assert (
        sum(int((of["advantages"] != 0).sum()) for of in learned) == mixed > 0
    )  # the graded ones of groups that differ
    assert row["ungraded"] > 0 and json.loads(row["by_reason"])["timeout"] == row["ungraded"]
    ended = 32 - json.loads(row["by_reason"]).get("cut", 0)
    assert row["ungraded"] == -(-ended // 3)
    scored = 32 - row["ungraded"]
    assert row["score"] == pytest.approx(json.loads(row["by_reason"]).get("right", 0) / scored)


def test_a_judgement_whose_grader_failed_is_no_number(tmp_path: Path) -> None:
    judged = PROMPTS[-2:]
    ids = [prompt_token_ids(_tokenizer(tmp_path), row["messages"], True) for row in judged]

    def failing(items: Sequence[Item]) -> list[Grade]:
        return [ungraded(GradeStatus.ERROR) for _ in items]

    run = Run(tmp_path, EASY.model_copy(update={"rollouts": 1}), grader=failing, held_out=HeldOut(judged, ids, 1, 2))
    rows = run.train()
    assert rows[0]["held_out"] is None and rows[0]["held_out_tokens"] > 0
    cut = json.loads(rows[1]["by_reason"]).get("cut", 0)  # the others' scores are unknown: nothing is learned from any
    assert (rows[1]["ungraded"], rows[1]["success"], rows[1]["grad_norm"]) == (32 - cut, 0, 0)


def nothing(completions: Sequence[Any], **known: Any) -> list[float | None]:
    """A reward that says nothing, as a user's might."""
    return [None] * len(completions)


def upper(
    completion_ids: Sequence[Sequence[int]], score: Sequence[float], finished: Sequence[bool], **known: Any
) -> list[float]:
    """A user's reward, which is given all that ours are."""
    assert len(score) == len(finished) == len(completion_ids) == len(known["prompt_id"]) == len(known["window"])
    return [float(len(ids)) for ids in completion_ids]


def test_rewards_add_up_and_the_score_stays_apart(tmp_path: Path) -> None:
    rewards = {"score": Reward(), "tests.unit.test_online:upper": Reward(weight=0.5)}
    (row,) = Run(tmp_path, EASY.model_copy(update={"rollouts": 1, "rewards": rewards})).train()
    assert row["reward"] == pytest.approx(row["success"] + 0.5 * row["length_mean"], abs=1e-5)


def test_a_reward_that_is_no_number_ends_the_run_before_the_step(tmp_path: Path) -> None:
    rewards = {"score": Reward(), "tests.unit.test_online:nothing": Reward()}
    run = Run(tmp_path, EASY.model_copy(update={"rollouts": 2, "rewards": rewards}))
    before = run.weights()
    with pytest.raises(UserError, match="A reward is not a number for 32 responses of rollout 1, to prompts p"):
        run.train()
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompts": 49}, "asks 49 different prompts, but the split has 48"),
        ({"updates": 5}, "cannot share in 5 updates"),
        ({"rewards": {"no.such:thing": Reward()}}, "cannot be made: No module named 'no'"),
        (
            {"rewards": {"cosine": Reward(settings={"short": 1})}},
            "cannot be made: .*unexpected keyword argument 'short'",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Run(tmp_path, EASY.model_copy(update=change))


def test_a_token_without_probability_stops_the_run_before_the_step(tmp_path: Path) -> None:
    run = Run(tmp_path, EASY.model_copy(update={"rollouts": 1}))
    plain = run.trainer.sampler.engine.generate  # type: ignore[union-attr]

    def impossible(requests: Sequence[Request]) -> list[Response]:
        first, *rest = plain(requests)
        return [replace(first, token_ids=(ROWS - 1, *first.token_ids[1:])), *rest]

    run.engine.generate = impossible  # type: ignore[method-assign]
    before = run.weights()
    rows: list[Any] = []
    with pytest.raises(UserError, match="token without probability, at step 1 of 1") as caught:
        rows = run.train()
    assert "rollout 1" in str(caught.value) and not rows
    assert all(torch.equal(tensor, before[name]) for name, tensor in run.weights().items())


# --- what it rests on ---


def test_prompts_are_templated_as_they_are_for_rollouts(tmp_path: Path) -> None:
    for thinking in (True, False):
        run = Run(tmp_path, own=TrainOnline(thinking=thinking))
        ids, _, _ = run.trainer._tokenize_prompts([row["messages"] for row in PROMPTS[:3]])
        assert ids == [prompt_token_ids(run.tokenizer, row["messages"], thinking) for row in PROMPTS[:3]]
        run.engine.close()
