"""On-policy training is the same run, to the token, whichever of our engines samples."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.doubles import servable_checkpoint, tiny_tokenizer
from ziprc.config.base import Runtime, Sampling
from ziprc.config.online import Arm, TrainOnline, Window
from ziprc.engines import start
from ziprc.engines.base import EngineSettings, unknown_rows
from ziprc.joint.checkpoint import load_model
from ziprc.rewards.base import Grade, Item, graded
from ziprc.training.arguments import HeldOut, Sampler
from ziprc.training.durable import train_to_the_end
from ziprc.training.online import OnlineTrainer
from ziprc.training.window import Controller

pytest.importorskip("vllm")

CAP = 24
STOPS = tuple(range(0, 260, 8))
WINDOW = Window(rule="adaptive", smallest=4, quantum=4, least=4)
ARM = Arm(learning_rate=1e-2, rollouts=4, prompts=4, samples=4, warmup=0, updates=2, window=WINDOW)
PROMPTS = [
    {"prompt_id": f"p{i}", "messages": [{"role": "user", "content": f"say {i}"}], "answer": None, "extra": "{}",
     "difficulty": "any"}
    for i in range(16)
]  # fmt: skip


def short(items: list[Item]) -> list[Grade]:
    return [graded(len(item.response) <= 4) for item in items]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return servable_checkpoint(tmp_path_factory.mktemp("base") / "model")


def run(base: Path, folder: Path, kind: str) -> tuple[list[dict[str, Any]], list[list[int]], dict[str, torch.Tensor]]:
    """The rows of the progress table, every response, and the weights that four rollouts end with."""
    tokenizer, model = tiny_tokenizer(), load_model(base)
    banned = unknown_rows(base, tokenizer)
    settings = EngineSettings(base, Sampling(min_p=0.0), STOPS, banned, 64, log_probs=True, max_num_seqs=64)
    with contextlib.closing(start(kind, settings)) as engine:
        trainer = OnlineTrainer(
            model, tokenizer, PROMPTS, ARM, TrainOnline(), Runtime(rollouts_per_device=32),
            Sampler(engine, STOPS, banned, CAP, 64),
            Controller(WINDOW, CAP, 0), short, HeldOut([], [], 0, 1), folder / ".online-x.training" / kind, 0,
        )  # fmt: skip
        responses: list[list[int]] = []
        plain = trainer._generate_single_turn

        def kept(*arguments: Any) -> Any:
            found = plain(*arguments)
            responses.extend(found[0])
            return found

        trainer._generate_single_turn = kept  # type: ignore[method-assign]
        train_to_the_end(trainer, folder / ".online-x.training" / kind)
    return trainer.rows, responses, model.state_dict()


def test_both_engines_give_the_same_run(base: Path, tmp_path: Path) -> None:
    ours, theirs = (run(base, tmp_path, kind) for kind in ("hf", "vllm"))
    assert len(ours[1]) == 64 and ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        for name in ("window", "decision", "success", "tokens_response", "by_reason", "right_length_q95"):
            assert a[name] == b[name], name
        assert a["mismatch_kl"] < 1e-9 and b["mismatch_kl"] < 1e-9
        assert json.dumps(a["reward"]) == json.dumps(b["reward"])
    assert len({row["window"] for row in ours[0]}) > 1
    for name, tensor in ours[2].items():
        torch.testing.assert_close(theirs[2][name], tensor, atol=1e-5, rtol=0)
