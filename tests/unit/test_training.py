"""Data, order, optimizer, trainer and the two training stages, on a random 2-layer model."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from tests.doubles import GRID, ROWS, World, tiny_checkpoint, tiny_model, tiny_tables, tiny_tokenizer
from ziprc.config.base import Optimisation, Runtime
from ziprc.config.load import Config, load
from ziprc.config.zip_rc import Head
from ziprc.errors import UserError
from ziprc.integrations.fetch import fetch_experiment
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import JointHead, read_joint_head, read_manifest
from ziprc.joint.hub import local_model
from ziprc.joint.readout import body_states
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.joint.vocabulary import VocabLayout
from ziprc.stages import base as base_stage
from ziprc.stages import train_joint
from ziprc.store.layout import Layout, manifest_of
from ziprc.store.manifest import write_sealed
from ziprc.tables.grades import GRADES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.values import VALUES
from ziprc.training import trainer
from ziprc.training.data import RolloutData, prompt_fold, rollout_data, sequences_from_table
from ziprc.training.objectives.base import Loss
from ziprc.training.objectives.joint import ANY_REWARD
from ziprc.training.optimizers import Muon, make_optimizer, orthogonalised, schedule_factor
from ziprc.training.order import BatchOrder, MicroBatches, order_by_count, order_by_tokens
from ziprc.training.resume import COMPLETE, OWNER, _digests, claim, forget_states, last_complete_state, state_folder
from ziprc.training.scratch import base_batches, build_tokenizer, repeated_segments, text_data
from ziprc.training.trainees import JointTrainee, SliceHead, Trainee, has_kl, joint_trainee, labelled
from ziprc.training.trainer import fit

HERE = Path(__file__)
SETTINGS = Optimisation(optimizer="muon", learning_rate=3e-3, adamw_learning_rate=1e-3, warmup=0.25)
HEAD_GRID = BinGrid((0.0, 1.0), (0, 256, 512, 1024, 2048, 4096, 8192))
ZIPRC_PRESET = {"label": "value", "kl": 10.0, "reward_centres": [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]}


# --- tables to labels ---


def rollouts_table(finish: list[str], responses: list[list[int]], prompt: list[int] | None = None) -> pa.Table:
    rows = [
        {"rollout_id": f"r{i}", "prompt_id": f"p{i}", "sample_index": 0, "seed": i,
         "prompt_token_ids": prompt or [1, 2, 3], "response_token_ids": r,
         "response_text": "", "finish_reason": f, "thinking": i % 2 == 0, "policy": "base"}
        for i, (f, r) in enumerate(zip(finish, responses, strict=True))
    ]  # fmt: skip
    return ROLLOUTS.make(rows)


def grades_table(scores: list[tuple[float | None, str]]) -> pa.Table:
    empty = {"grader": "g", "extracted_answer": None, "rationale": None}
    return GRADES.make(
        [{"rollout_id": f"r{i}", "score": s, "status": status, **empty} for i, (s, status) in enumerate(scores)]
    )


def one_rollout(m: int, finish: str = "stop", **head: Any) -> dict[str, torch.Tensor]:
    data = rollout_data(
        rollouts_table([finish], [list(range(m))]),
        grades_table([(1.0, "graded")] if finish == "stop" else [(None, "unfinished")]),
        Head(**{"max_length": 10**6, **head}), HEAD_GRID, "train_joint",
    )  # fmt: skip
    return data.batch(np.array([0]))


def test_the_stop_token_counts_as_remaining_unless_the_legacy_switch_is_on() -> None:
    assert one_rollout(256)["length_bin"][0] == 1  # 256 to come
    assert one_rollout(255)["length_bin"][0] == 0
    assert one_rollout(256, legacy_off_by_one=True)["length_bin"][0] == 0  # the published count: 255
    assert one_rollout(257, legacy_off_by_one=True)["length_bin"][0] == 1
    assert one_rollout(1)["length_bin"].tolist() == [0]  # one token, the stop token: still one to come


def test_every_state_that_emits_a_response_token_is_labelled() -> None:
    batch = one_rollout(5)
    assert batch["positions"].tolist() == [2, 3, 4, 5, 6]  # prompt of 3: state 2 emits the first token
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 1, 2, 3]]  # the last token is no input


def test_cutting_the_input_does_not_change_length_labels() -> None:
    whole, cut = one_rollout(5000), one_rollout(5000, max_length=1000)
    assert cut["input_ids"].shape[1] == 1000
    assert torch.equal(whole["length_bin"][: len(cut["length_bin"])], cut["length_bin"])
    assert cut["length_bin"][0] == 5 and len(cut["positions"]) == 998


def test_a_capped_rollout_is_censored_and_its_score_follows_the_config() -> None:
    assert one_rollout(300, "length")["censored"].all()
    assert not one_rollout(300, "length", censored="as_observed")["censored"].any()
    assert (one_rollout(300, "length")["reward_bin"] == 0).all()
    assert (one_rollout(300, "length", unfinished="ignore")["reward_bin"] == ANY_REWARD).all()
    with pytest.raises(UserError, match=r"'unfinished': 1.*train_joint's thinking_only"):
        one_rollout(300, "length", unfinished="drop")


def test_what_cannot_be_learned_from_is_left_out_and_counted() -> None:
    finish = ["stop", "abort", "stop", "length", "stop", "stop"]
    grades = [(1.0, "graded"), (None, "error"), (None, "unparseable"), (None, "unfinished"), (0.0, "graded")]
    table, labels = rollouts_table(finish, [[5]] * 6), grades_table(grades)
    data = rollout_data(table, labels, Head(unfinished="drop"), HEAD_GRID, "train_joint")
    assert data.names == ["r0", "r4"] and data.reward_bin.tolist() == [1, 0]
    assert data.dropped == {"without a label": 1, "aborted": 1, "ungraded": 1, "unfinished": 1}
    thinking = rollout_data(table, labels, Head(), HEAD_GRID, "train_joint", thinking_only=True)
    assert thinking.names == ["r0", "r4"]


def test_labels_of_two_graders_are_refused() -> None:
    twice = [{"rollout_id": "r0", "grader": g, "score": 1.0, "status": "graded"} for g in ("rule", "judge")]
    with pytest.raises(UserError, match=r"labels: .*1 rollouts have more than one row by judge, rule"):
        rollout_data(rollouts_table(["stop"], [[5]]), GRADES.make(twice), Head(), HEAD_GRID, "train_joint")


def test_values_are_joined_by_rollout_and_not_by_row() -> None:
    values = [{"rollout_id": f"r{i}", "critic": "c", "fold": 0, "value": v} for i, v in ((2, 0.9), (0, 0.1), (1, 0.6))]
    data = rollout_data(
        rollouts_table(["stop", "stop", "length"], [[7], [8], [9]]), VALUES.make(values), Head(label="value"),
        HEAD_GRID, "train_joint",
    )  # fmt: skip
    assert data.reward_bin.tolist() == [0, 1, 0]  # the capped one counts as zero


def test_flattening_keeps_prompt_then_response() -> None:
    table = pa.concat_tables([rollouts_table(["stop"], [[9, 8]]), rollouts_table(["stop"], [[7]], [4, 5])])
    own = sequences_from_table(table)
    assert own.tokens.tolist() == [1, 2, 3, 9, 8, 4, 5, 7] and own.offsets.tolist() == [0, 5, 8]


def test_a_fold_is_a_stable_share_of_prompts() -> None:
    folds = [prompt_fold(f"p{i}", 4) for i in range(2000)]
    assert folds == [prompt_fold(f"p{i}", 4) for i in range(2000)] and set(folds) == {0, 1, 2, 3}
    assert min(np.bincount(folds)) > 400


# --- the order ---


def test_every_sequence_is_seen_once_per_epoch_in_steps_of_one_size() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 96)
    order = order_by_count(lengths, 32, 8, 1, 2.0, -1, 3, "train_joint")
    assert order.steps == 6 and order.slots == 4 and all(len(b) == 8 for b in order.micro_batches)
    first = np.concatenate(order.micro_batches[: 3 * order.slots])
    assert sorted(first) == list(range(96))
    assert not np.array_equal(first, np.concatenate(order.micro_batches[3 * order.slots :]))


def test_a_step_holds_the_same_rollouts_on_any_number_of_devices() -> None:
    lengths = np.random.default_rng(0).integers(5, 100, 64)
    cases = ((16, 1), (2, 4))
    one, four = (order_by_count(lengths, 16, micro, world, 1.5, -1, 3, "train_joint") for micro, world in cases)

    def steps(order: BatchOrder) -> list[list[int]]:
        starts = range(0, len(order.micro_batches), order.slots)
        return [sorted(np.concatenate(order.micro_batches[i : i + order.slots]).tolist()) for i in starts]

    assert (one.slots, four.slots) == (1, 8) and one.steps == four.steps == 6
    assert steps(one) == steps(four)


@pytest.mark.parametrize(
    ("count", "batch", "micro", "world"), [(3, 128, 16, 1), (1, 16, 4, 2), (100, 10, 4, 1), (7, 7, 2, 3)]
)
def test_no_micro_batch_is_empty_or_too_large_and_there_is_a_step(
    count: int, batch: int, micro: int, world: int
) -> None:
    order = order_by_count(np.full(count, 9), batch, micro, world, 1.0, -1, 0, "train_joint")
    assert order.steps >= 1 and order.slots % world == 0
    assert all(1 <= len(b) <= micro for b in order.micro_batches)


def test_max_steps_caps_the_plan_and_so_the_schedule_knows_it() -> None:
    assert order_by_count(np.full(100, 9), 10, 10, 1, 2.0, 5, 0, "train_joint").steps == 5
    with pytest.raises(UserError, match=r"batch_size is 2, but 4 processes .* Raise train_critic's batch_size"):
        order_by_count(np.full(100, 9), 2, 1, 4, 2.0, -1, 0, "train_critic")


def test_token_batches_are_near_their_budget_and_use_every_sequence_once() -> None:
    lengths = np.random.default_rng(0).integers(20, 120, 3000)
    order = order_by_tokens(lengths, 2048, int(lengths.sum()), 1, seed=0)
    tokens = np.array([lengths[b].sum() for b in order.micro_batches])
    assert sorted(np.concatenate(order.micro_batches)) == list(range(3000))
    assert 0.9 < tokens.mean() / 2048 < 1.1 and tokens.max() < 2048 * 1.3
    padded = sum(len(b) * lengths[b].max() for b in order.micro_batches)
    assert padded < 1.12 * lengths.sum()


# --- optimizer and schedule ---


def test_warm_up_acts_on_the_first_step_and_the_rate_ends_at_zero() -> None:
    rates = [schedule_factor(i, 100, 0.05, "cosine") for i in range(101)]
    assert 0 < rates[0] < rates[4] < rates[5] == 1 and rates[100] == pytest.approx(0) and rates[99] > 0
    assert 0 < schedule_factor(0, 1, 0.05, "linear") < 1  # a single step is a warm-up step
    assert schedule_factor(0, 10, 0.0, "linear") == 1


def test_muon_is_torchs_but_orthogonalises_in_float32_on_a_cpu() -> None:
    """Guards the copy of torch's step against a torch that changes it; bfloat16 keeps three digits."""
    start = {"tall": torch.randn(24, 8), "wide": torch.randn(8, 24)}
    moved = {}
    for kind in (torch.optim.Muon, Muon):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(value.clone()) for value in start.values()]
        optimizer = kind(parameters, lr=0.1, weight_decay=0.3)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        moved[kind] = parameters
    for theirs, own, before in zip(*moved.values(), start.values(), strict=True):
        assert not torch.equal(own, before)
        torch.testing.assert_close(own, theirs, rtol=0.02, atol=0.005)
    group = optimizer.param_groups[0]
    assert orthogonalised(start["tall"].bfloat16(), group).dtype is torch.float32
    singular = torch.linalg.svdvals(orthogonalised(start["tall"], group))
    assert ((singular > 0.6) & (singular < 1.3)).all()


def test_muon_takes_hidden_matrices_and_survives_a_round_trip() -> None:
    model = tiny_model(tiny_tokenizer())
    optimizer = make_optimizer(model, SETTINGS)
    matrices, others = (group["params"] for group in optimizer.param_groups)
    assert all(p.ndim == 2 for p in matrices) and any(p is model.lm_head.weight for p in others)
    assert len(matrices) + len(others) == len(list(model.parameters()))

    def step(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
        model(input_ids=torch.arange(8)[None]).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step(optimizer, model)
    twin = tiny_model(tiny_tokenizer())
    twin.load_state_dict(model.state_dict())
    restored = make_optimizer(twin, SETTINGS)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(2):
        step(optimizer, model)
        step(restored, twin)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


# --- the trainer ---


def tiny_joint() -> JointHead:
    return JointHead(VocabLayout(ROWS, 261, 261, GRID.size), GRID)


def tiny_data(count: int = 24) -> RolloutData:
    rng = np.random.default_rng(0)
    table = rollouts_table(["stop"] * count, [rng.integers(0, 250, rng.integers(2, 30)).tolist() for _ in range(count)])
    grades = grades_table([(float(i % 2), "graded") for i in range(count)])
    return rollout_data(table, grades, Head(), GRID, "train_joint")


def tiny_trainee(model: Any = None, **head: Any) -> Trainee:
    """A joint head on a tiny model; by default every weight is trained, and held to what it was."""
    settings = Head(**{"kl": 1.0, **head})
    reference = tiny_model(tiny_tokenizer()).requires_grad_(False) if has_kl(settings) else None
    return joint_trainee(model or tiny_model(tiny_tokenizer()), tiny_joint(), settings, 16, reference)


def tiny_fit(
    trainee: Trainee, folder: Path, data: Any = None, micro: int = 6, epochs: float = 1.0, world: int = 1,
    settings: Optimisation = SETTINGS, **runtime: Any,
) -> Any:  # fmt: skip
    """Steps of 6 rollouts (or units of other data), 4 an epoch."""
    data = data or tiny_data()
    order = order_by_count(data.input_lengths(), 6, micro, world, epochs, -1, 0, "train_joint")
    return fit(trainee, MicroBatches(data, order), settings, Runtime(**runtime), folder, 1, "train_joint")


def tiny_run(folder: Path, steps: int = 8, save: int = 100, world: int = 1, micro: int = 3) -> Any:
    trainee = tiny_trainee()
    return trainee, tiny_fit(trainee, folder, None, micro, steps / 4, world, save_steps=save)


def weights(trainee: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainee.named_parameters()}


def test_training_lowers_the_loss_and_reports_its_parts(tmp_path: Path) -> None:
    _, short = tiny_run(tmp_path / "a" / "x", steps=1)
    _, outcome = tiny_run(tmp_path / "b" / "x", steps=30)
    assert outcome.steps == 30 and set(outcome.parts) == {"loss", "ce", "kl"}
    assert outcome.parts["ce"] < short.parts["ce"]
    assert short.parts["kl"] == 0  # before the first step, model and reference are equal


def test_the_step_does_not_depend_on_the_micro_batch(tmp_path: Path) -> None:
    whole, parts = (weights(tiny_run(tmp_path / str(m) / "x", micro=m, steps=2)[0]) for m in (6, 2))
    for name in whole:  # sums in another order, and Muon's bfloat16 orthogonalisation amplifies them
        assert torch.allclose(whole[name], parts[name], atol=2e-4), name


SIGNALLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from ziprc.training.trainer import Shown
count = 0
add = Shown.add
def counted(self, sums):
    global count
    count += 1
    if count == {micro_batches}:
        os.kill(os.getpid(), signal.{signal})
    add(self, sums)
Shown.add = counted
"""
TINY_RUN = """
from tests.unit.test_training import tiny_run
tiny_run(Path({folder!r}), save=2)
"""
BASE_STAGE = """
from ziprc.stages import base, context
micro = {root!r} + "/tests/workflow/micro.yaml"
argv = ["--experiment", "micro", "--config-file", micro, "--name", "base", "--results", {folder!r}]
context.run_stage("base", base.run, argv)
"""


def start_and_signal(what: str, folder: Path, micro_batches: int, name: str) -> subprocess.CompletedProcess[str]:
    """Run a program that gets a signal at its so many-th micro-batch."""
    root = str(HERE.parents[2])
    code = (SIGNALLED + what).format(root=root, folder=str(folder), micro_batches=micro_batches, signal=name)
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_a_run_that_was_ended_resumes_to_bit_identical_weights(tmp_path: Path, name: str) -> None:
    torch.set_num_threads(1)
    straight, _ = tiny_run(tmp_path / "straight" / "x")
    folder = tmp_path / "ended" / "x"
    ended = start_and_signal(TINY_RUN, folder, 2 * 5, name)  # two micro-batches per step: inside step 5 of 8
    state = last_complete_state(folder)
    assert state is not None, ended.stderr
    if name == "SIGKILL":
        assert ended.returncode == -signal.SIGKILL and state.name == "checkpoint-4"
    else:
        assert "Step 5 of 8 is done and the training state is saved" in ended.stderr
        assert state.name == "checkpoint-5"
    resumed, outcome = tiny_run(folder, save=2)
    assert outcome.steps == 8
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(resumed).values(), strict=True))


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_training_stage_ends_by_a_signal_with_one_sentence_and_its_exit_code(
    tmp_path: Path, name: str, code: int
) -> None:
    ended = start_and_signal(BASE_STAGE, tmp_path, 3, name)
    assert ended.returncode == code, ended.stderr
    assert f"stage base (micro/base) was stopped by {name}. Step 3 of 20 is done" in ended.stderr
    assert "Traceback" not in ended.stderr and "error" not in ended.stderr
    assert list(tmp_path.glob("micro/checkpoints/.base.training/*/checkpoint-3/complete.json"))
    assert not (tmp_path / "micro" / "checkpoints" / "base").exists()


def test_an_incomplete_or_damaged_state_is_not_resumed(tmp_path: Path) -> None:
    folder = tmp_path / ".x.training" / "new"
    (folder / "checkpoint-6").mkdir(parents=True)
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"weights")
    write_sealed(folder / "checkpoint-4" / COMPLETE, {"files": _digests(folder / "checkpoint-4")})
    assert last_complete_state(folder) == folder / "checkpoint-4"
    (folder / "checkpoint-4" / "model.safetensors").write_bytes(b"weightz")
    assert last_complete_state(folder) is None


def test_only_own_states_of_earlier_settings_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "x"
    new, old = (state_folder(target, settings) for settings in ("new", "old"))
    parent = new.parent
    claim(old)
    (old / "checkpoint-9").mkdir()
    foreign, other = parent / "notes", parent / "other"
    for folder in (foreign, other):
        folder.mkdir()
    (foreign / "text").write_text("mine")
    write_sealed(other / OWNER, {"checkpoint": "y"})
    tiny_run(new, steps=1)
    assert not old.exists() and new.exists() and (foreign / "text").exists() and other.exists()
    forget_states(target)
    assert sorted(parent.iterdir()) == [foreign, other]
    for folder in (foreign, other):
        shutil.rmtree(folder)
    forget_states(target)
    assert not parent.exists()


def test_what_is_shown_says_whose_run_it_is_how_far_and_how_well(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, outcome = tiny_run(tmp_path / ".ziprc.training" / "x")
    lines = [line for line in capfd.readouterr().err.splitlines() if "steps (" in line]
    parts = " ".join(f"{name} {value:.4f}" for name, value in outcome.parts.items())
    assert lines[-1].startswith("ziprc: 8/8 steps (") and f"left, {parts} lr " in lines[-1] and "ktok/s" in lines[-1]
    assert sum("8/8" in line for line in lines) == 1


@dataclass(frozen=True)
class Pairs:
    """Training data of another shape: each unit is two sequences, and there is one supervised position a pair."""

    count: int

    @property
    def names(self) -> list[str]:
        return [f"pair{i}" for i in range(self.count)]

    def input_lengths(self) -> np.ndarray[Any, Any]:
        return np.full(self.count, 8)

    def batch(self, picked: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(np.concatenate([[np.arange(i, i + 4), np.arange(i + 9, i + 13)] for i in picked]))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "count": torch.tensor(len(picked))}


class PairTrainee(Trainee):
    """Wants the first of each pair to have the larger mean state."""

    def loss(self, batch: Any) -> Loss:
        means = self.model.base_model(input_ids=batch["input_ids"]).last_hidden_state.mean((1, 2))
        total = torch.nn.functional.softplus(means[1::2] - means[::2]).sum()
        return Loss(total, {"kept": total.detach() * 0 + len(means) / 2})


def test_data_of_any_shape_can_be_trained_on_and_says_its_own_count(tmp_path: Path) -> None:
    data = Pairs(12)
    trainee = PairTrainee(tiny_model(tiny_tokenizer()))
    model = trainee.model.base_model
    with torch.no_grad():
        before = float(trainee.loss(data.batch(np.arange(12))).total) / 12
    outcome = tiny_fit(trainee, tmp_path / "a" / "x", data, micro=2, epochs=10)
    assert model is trainee.model.base_model and outcome.steps == 20
    assert outcome.parts["kept"] == 1 and outcome.parts["loss"] < before


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_non_finite_step_is_not_taken_and_names_its_rollouts(tmp_path: Path, what: str) -> None:
    model = tiny_model(tiny_tokenizer())
    with torch.no_grad():
        if what == "loss":
            model.lm_head.weight[tiny_joint().layout.joint_slice] = torch.nan
        else:
            model.get_parameter("model.norm.weight").register_hook(lambda g: g * torch.inf)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(UserError, match=rf"The {what} is not finite at step 1 of 4.*r\d+, r\d+"):
        tiny_fit(tiny_trainee(model, kl=0.0), tmp_path / "a" / "x", micro=3)
    assert all(torch.equal(v, before[k]) or v.isnan().any() for k, v in model.state_dict().items())


DISTRIBUTED_RUN = """
import json, os, sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from safetensors.torch import save_file
from tests.unit.test_training import tiny_run, weights
from ziprc.training import trainer
trainer.SECONDS_BETWEEN_READINGS = float("inf")
trainee, outcome = tiny_run(Path({folder!r}) / "x" / "y", steps=3, world=2, save=2)
rank = {folder!r} + "/rank" + os.environ["RANK"]
save_file(weights(trainee), rank + ".safetensors")
Path(rank + ".json").write_text(json.dumps(outcome.parts))
"""


def test_two_processes_take_the_same_steps_as_one_and_report_the_loss_of_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED_RUN.format(root=str(HERE.parents[2]), folder=str(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(trainer, "SECONDS_BETWEEN_READINGS", float("inf"))  # one line, of all three steps
    trainee, outcome = tiny_run(tmp_path / "alone" / "x", steps=3)
    alone = weights(trainee)
    first, second = (load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    for name in alone:
        assert torch.equal(first[name], second[name]), name
        assert torch.allclose(first[name], alone[name], atol=2e-4), name  # sums in another order
    for rank in (0, 1):
        reported = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert reported == pytest.approx(dict(outcome.parts), rel=1e-4), "the share of one process"


# --- settings ---


def joint_settings(**section: Any) -> dict[str, Any]:
    return Config.model_validate({"train_joint": section}).train_joint.model_dump()


def test_defaults_lie_beneath_every_head_that_there_is() -> None:
    own = {"noisy": {"epochs": 3}, "lite": {"learning_rate": 0.01}}
    together = joint_settings(defaults={"epochs": 1, "batch_size": 8, "learning_rate": 0.1}, **own)
    assert together == joint_settings(
        noisy={"epochs": 3, "batch_size": 8, "learning_rate": 0.1},
        ziprc={**ZIPRC_PRESET, "epochs": 1, "batch_size": 8, "learning_rate": 0.1},
        lite={"epochs": 1, "batch_size": 8, "learning_rate": 0.01},
    )
    assert "defaults" not in together and joint_settings(defaults={"epochs": 1})["lite"] is None


def test_a_head_without_settings_of_its_own_keeps_what_it_is_without_defaults() -> None:
    assert joint_settings(defaults={})["ziprc"] == joint_settings()["ziprc"]
    assert joint_settings(defaults={"kl": 1.0})["ziprc"]["kl"] == ZIPRC_PRESET["kl"]


def test_a_typo_in_defaults_is_named_once(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("experiments: {x: {train_joint: {defaults: {learnin_rate: 1.0}}}}")
    with pytest.raises(
        UserError, match=r"'x': unknown key 'train_joint\.defaults\.learnin_rate' \(did you mean 'learni\w+'\?\)\.$"
    ):
        load(tmp_path / "c.yaml", "x")


def test_base_and_heads_share_the_settings_of_their_optimizer() -> None:
    config = Config.model_validate({"base": {"optimizer": "adamw", "weight_decay": 0.1}})
    assert isinstance(config.base, Optimisation) and isinstance(config.train_joint.noisy, Optimisation)
    optimizer = make_optimizer(tiny_model(tiny_tokenizer()), config.base)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(config.base.learning_rate, 0.1)]
    for given, expected in ((None, 3e-3), (1e-4, 1e-4)):
        settings = Optimisation(optimizer="muon", learning_rate=3e-3, adamw_learning_rate=given)
        optimizer = make_optimizer(tiny_model(tiny_tokenizer()), settings)
        assert [g["lr"] for g in optimizer.param_groups] == [3e-3, expected]


# --- models ---


def test_padding_does_not_reach_a_labelled_state() -> None:
    model, data = tiny_model(tiny_tokenizer()), tiny_data(6)
    with torch.no_grad():
        together = labelled(model, data.batch(np.arange(6)))
        alone = torch.cat([labelled(model, data.batch(np.array([i]))) for i in range(6)])
        batch = data.batch(np.arange(6))
        masked = body_states(model, batch["input_ids"], batch["attention_mask"]).flatten(0, 1)[batch["positions"]]
    assert torch.allclose(together, alone, atol=1e-5) and torch.allclose(together, masked, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_slice_only_head_leaves_every_text_logit_bit_identical(tmp_path: Path, tied: bool) -> None:
    torch.set_num_threads(1)
    base, model = (tiny_model(tiny_tokenizer(), tied=tied) for _ in range(2))
    trainee = tiny_trainee(model, trainable="slice", kl=5.0)
    trained = [name for name, parameter in trainee.named_parameters() if parameter.requires_grad]
    assert isinstance(trainee, SliceHead) and trained == ["slice_weight"]
    tiny_fit(trainee, tmp_path / "a" / "x", epochs=2.0, settings=Optimisation(learning_rate=1e-2))
    merged = trainee.merged()
    rows = tiny_joint().layout.joint_slice
    text = [v for v in range(ROWS) if not rows.start <= v < rows.stop]
    ids = torch.arange(60).view(2, 30)
    with torch.no_grad():
        before, after = base(input_ids=ids).logits, merged.eval()(input_ids=ids).logits
    assert torch.equal(before[..., text], after[..., text]) and not torch.equal(before[..., rows], after[..., rows])
    for (name, a), (_, b) in zip(base.named_parameters(), merged.named_parameters(), strict=True):
        if "embed" not in name and "lm_head" not in name:
            assert torch.equal(a, b), name


def test_bf16_autocast_trains_float32_weights_and_says_where_it_is_emulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ziprc.training.durable.native_bfloat16", lambda: False)
    trainee = tiny_trainee()
    outcome = tiny_fit(trainee, tmp_path / "a" / "x", bf16=True)
    assert outcome.parts["loss"] < 10 and {p.dtype for p in trainee.parameters()} == {torch.float32}
    assert isinstance(trainee, JointTrainee)
    assert torch.cuda.is_available() or "without bf16 instructions" in capsys.readouterr().err


# --- the stages ---


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    torch.set_num_threads(1)
    layout = Layout(tmp_path / "results", "tiny")
    head = {"epochs": 1, "batch_size": 16, "optimizer": "muon", "learning_rate": 1e-3, "reward_centres": (0.0, 1.0)}
    joint = {
        "length_edges": GRID.length_edges, "noisy": head,
        "ziprc": {**head, "kl": 1.0, "reward_centres": GRID.reward_centres},
        "lite": {**head, "trainable": "slice", "optimizer": "adamw"},
    }  # fmt: skip
    tiny_checkpoint(layout.checkpoint("base"), joint=False)
    tiny_tables(layout, "train", prompts=20, samples=3, unfinished=0.2)
    yield World(Config.model_validate({"train_joint": joint, "prompts": {"task": "arithmetic"}}), layout)


def test_train_joint_writes_a_checkpoint_that_describes_itself(world: World) -> None:
    lines = {name: train_joint.run(world.context("train_joint", name)) for name in ("noisy-fold0", "ziprc", "lite")}
    for name, line in lines.items():
        folder = world.layout.checkpoint(name)
        assert read_joint_head(folder).layout.joint_start == 261 and str(folder) in line
        record = read_manifest(folder)
        assert set(record["parents"]) == {"base", "rollouts", "grades"} and record["objective"] == "joint"
        assert record["params"][f"train_joint.{name.removesuffix('-fold0')}"]["epochs"] == 1
        assert load_model(folder).dtype == torch.float32
        assert not list(folder.parent.glob(f".{name}.training/*"))
    seen, dropped = set(lines["noisy-fold0"].split()), set(lines["ziprc"].split())
    assert seen != dropped  # fewer rollouts than the head that sees all folds


def test_a_fold_critic_never_sees_prompts_of_its_fold(world: World) -> None:
    rollouts = ROLLOUTS.read(world.layout.table("rollouts", "train"))
    for fold in (0, 1):
        seen = train_joint.outside_fold(rollouts, (fold, 2))["prompt_id"].unique().to_pylist()
        assert seen and all(prompt_fold(p, 2) != fold for p in seen)
    assert train_joint.outside_fold(rollouts, None) is rollouts


def test_two_runs_of_train_joint_write_the_same_bytes(world: World) -> None:
    digests = []
    for _ in range(2):
        train_joint.run(world.context("train_joint", "ziprc"))
        digests.append(manifest_of(world.layout.checkpoint("ziprc")).read_bytes())
    assert digests[0] == digests[1]


class TinyTask:
    """Adds two digits; stands in for the real task."""

    name = "tiny"
    styles = ("plain",)

    def prompts(self, settings: Any, split: str, count: int, seed: int) -> list[Any]:
        return []

    def canonical_answer(self, response: str) -> str | None:
        return response

    def style_of(self, response: str) -> str | None:
        return None

    def vocabulary_corpus(self) -> list[str]:
        return ["Compute the sum of numbers, then answer"] * 3

    def traces(self, settings: Any, count: int, seed: int) -> Iterator[Any]:
        from ziprc.tasks.base import Prompt, Trace, user_message

        rng = np.random.default_rng(seed)
        for i in range(count):
            a, b = rng.integers(0, 50, 2)
            yield (
                Prompt(str(i), "tiny", "tiny", "base", user_message(f"Compute {a}+{b}"), str(a + b), "easy"),
                Trace(f"<think>\n{a}+{b}\n</think>\n\n{a + b}", True, "plain"),
            )


def scratch_config(**base: Any) -> Config:
    architecture = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "num_key_value_heads": 1, "head_dim": 16}  # fmt: skip
    return Config.model_validate({"base": {"tokens": 3000, "batch_tokens": 256, "architecture": architecture, **base}})


def test_base_from_scratch_is_a_normal_transformers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_stage, "get_task", lambda name: TinyTask())
    layout = Layout(tmp_path, "tiny")
    base_stage.run(World(scratch_config(), layout).context("base", "base"))
    folder = layout.checkpoint("base")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    assert (
        model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    text = "<think>\n12+345\n</think>\n\n357<|im_end|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<|im_end|>")
    assert all(len(tokenizer.decode([i])) == 1 for i in ids[2:8])  # digits stand alone
    assert read_manifest(folder)["base"] == {"model": "scratch"}
    first = (folder / "model.safetensors").read_bytes()
    base_stage.run(World(scratch_config(), layout).context("base", "base"))
    assert (folder / "model.safetensors").read_bytes() == first


def test_the_tokenizer_is_a_function_of_its_corpus() -> None:
    corpus, architecture = TinyTask().vocabulary_corpus(), scratch_config().base.architecture
    one, two = (build_tokenizer(corpus, architecture) for _ in range(2))
    assert one.backend_tokenizer.to_str() == two.backend_tokenizer.to_str()
    with pytest.raises(UserError, match="free rows"):
        build_tokenizer(corpus, architecture.model_copy(update={"vocab_size": 260}))


def test_every_small_tokenizer_knows_the_words_of_feedback() -> None:
    tokenizer = build_tokenizer(TinyTask().vocabulary_corpus(), scratch_config().base.architecture)
    feedback = tokenizer("Reward: 1\nLength: 37 tokens", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in feedback] == [
        "Reward", ":", " ", "1", "\n", "Length", ":", " ", "3", "7", " tokens"
    ]  # fmt: skip


def test_a_repeated_segment_can_be_told_from_its_first_copy() -> None:
    data = text_data(repeated_segments(range(40, 60), 3000, seed=1))
    assert len(data) == 32 and set(data.lengths) == {96}
    for i in range(len(data)):
        tokens, period = data.tokens[data.offsets[i] : data.offsets[i + 1]], data.prompt_lengths[i] - 1
        assert len(set(tokens[:period])) == period and 6 <= period <= 20
        assert (tokens[period:] == tokens[:-period]).all()
    batch = data.batch(np.arange(3))
    assert batch["count"] == (data.lengths - data.prompt_lengths)[:3].sum() == len(batch["targets"])
    assert (text_data(repeated_segments(range(40, 60), 3000, seed=2)).tokens != data.tokens).any()


@pytest.mark.parametrize("world", [1, 2])
def test_repeats_have_steps_of_their_own_two_thirds_of_them_in_one_stretch(world: int) -> None:
    config, task = scratch_config(tokens=60_000).base, TinyTask()
    tokenizer = build_tokenizer(task.vocabulary_corpus(), config.architecture)

    def steps(repeats: float) -> tuple[list[set[bool]], float]:
        settings = config.model_copy(update={"repeats": repeats})
        batches = base_batches(settings, task, {}, tokenizer, world, seed=3)
        micro = [
            [batches.data.names[i].startswith("repeat-") for i in picked] for picked in batches.order.micro_batches
        ]
        tokens = [int(batches[i]["attention_mask"].sum()) for i in range(len(batches))]
        share = sum(n for n, kinds in zip(tokens, micro, strict=True) if kinds[0]) / sum(tokens)
        return [set().union(*micro[i : i + world]) for i in range(0, len(micro), world)], share

    assert steps(0.0) == ([{False}] * len(steps(0.0)[0]), 0.0)
    kinds, share = steps(0.2)
    assert all(len(kind) == 1 for kind in kinds) and share == pytest.approx(0.2, abs=0.02)
    repeats = [kind == {True} for kind in kinds]
    begin, stretch = repeats.index(True), sum(repeats) * 2 // 3
    assert all(repeats[begin : begin + stretch]) and begin == pytest.approx(repeats.count(False) / 10, abs=1)
    after = np.diff(np.flatnonzero(repeats[begin + stretch :]))
    assert repeats[-1] and after.max() - after.min() <= 2  # the rest, evenly


def test_base_copies_a_local_folder_and_refuses_one_without_a_chat_template(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source", joint=False)
    layout = Layout(tmp_path, "tiny")
    base_stage.run(World(scratch_config(model=str(source)), layout).context("base", "base"))
    assert (layout.checkpoint("base") / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert read_manifest(layout.checkpoint("base"))["base"] == {"model": str(source), "revision": None, "commit": None}
    (source / "chat_template.jinja").unlink()
    other = Layout(tmp_path, "other")
    with pytest.raises(UserError, match="no chat template"):
        base_stage.run(World(scratch_config(model=str(source)), other).context("base", "base"))
    assert not manifest_of(other.checkpoint("base")).exists()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face cache, offline, that holds a tiny model as `some/model`: files are links to blobs, as the Hub has it."""
    repository = tmp_path / "hub" / "models--some--model"
    snapshot = repository / "snapshots" / COMMIT
    tiny_checkpoint(tmp_path / "source", joint=False)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted((tmp_path / "source").iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_base_is_built_offline_from_a_filled_cache_and_names_the_commit(cache: Path, tmp_path: Path) -> None:
    layout = Layout(tmp_path, "tiny")
    base_stage.run(World(scratch_config(model="some/model"), layout).context("base", "base"))
    folder = layout.checkpoint("base")
    assert read_manifest(folder)["base"] == {"model": "some/model", "revision": None, "commit": COMMIT}
    shutil.rmtree(tmp_path / "hub")
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert load_model(folder).dtype == torch.float32 and load_tokenizer(folder).chat_template


def test_fetch_and_the_judge_find_what_is_in_the_cache_and_refuse_what_cannot_be_used(cache: Path) -> None:
    config = scratch_config(model="some/model")
    assert fetch_experiment(config) == f"fetch: some/model at {COMMIT}"
    assert local_model("some/model", None, "grades.judge.model") == cache
    with pytest.raises(UserError, match=r"revision v2.*hf download some/model --revision v2"):
        local_model("some/model", "v2", "base.model", download=True)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (cache / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"base.model 'some/model' needs .* lacks model-00002-of-00002.safetensors"):
        fetch_experiment(config)
    for damaged in ('{"weight_map": {', "{}", "[]"):
        (cache / "model.safetensors.index.json").write_text(damaged)
        with pytest.raises(UserError, match=r"base.model 'some/model': .*index.json is damaged .* Fetch or copy"):
            fetch_experiment(config)
    (cache / "model.safetensors.index.json").unlink()
    (cache / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"grades.judge.model 'some/model' has no chat template"):
        fetch_experiment(Config.model_validate({"grades": {"judge": {"model": "some/model"}}}))


def test_fetch_reads_every_split(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"problem": f"What is {i}?", "answer": str(i)}) for i in range(60)))
    splits = {"train": "train[20:]", "validation": "train[:10]", "test": "train[10:20]"}
    prompts = {"task": "hub", "settings": {"dataset": str(rows), "splits": splits}}
    found = fetch_experiment(Config.model_validate({"prompts": prompts}))
    assert found == "fetch: 40 prompts of train; 10 prompts of validation; 10 prompts of test"
    prompts["settings"]["splits"]["validation"] = "dev"
    with pytest.raises(UserError, match='Unknown split "dev"'):
        fetch_experiment(Config.model_validate({"prompts": prompts}))
    assert "offline" in fetch_experiment(Config())


def test_base_offline_says_how_to_fetch(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"base.model, revision newest.*could not be fetched.*make fetch EXPERIMENT="):
        base_stage.run(World(scratch_config(model="nobody/nothing"), Layout(tmp_path, "tiny")).context("base", "base"))
