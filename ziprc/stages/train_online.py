"""train_online: a policy trained on-policy by verifiable rewards, from the base; `online-<arm>` each.

The checkpoint holds `progress.parquet`, one row a rollout (ziprc/tables/progress.py); what each took is in
`seconds/<name>.json`. While it trains, both are lines of `progress.jsonl` beside its training states. Nothing of validation
or test prompts moves the policy.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ziprc.chat import prompt_token_ids
from ziprc.config.base import Sampling
from ziprc.config.load import Config
from ziprc.engines import start
from ziprc.engines.base import settings_for
from ziprc.engines.recording import check_fit
from ziprc.joint.checkpoint import load_model, save_checkpoint
from ziprc.joint.head import read_joint_head, read_manifest
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.base import Grade, Grader, Item, decide
from ziprc.rewards.grading import check_gradable, judge_grader, rule_grader
from ziprc.stages.context import Context, is_main_process, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.files import write_json
from ziprc.store.manifest import manifest_digests
from ziprc.tables.progress import PROGRESS
from ziprc.tables.prompts import PROMPTS
from ziprc.training import resume
from ziprc.training.durable import train_to_the_end
from ziprc.training.law import unban
from ziprc.training.online import HeldOut, OnlineTrainer, Sampler
from ziprc.training.predicted import Predictor
from ziprc.training.window import Controller


def grading(config: Config, stack: contextlib.ExitStack) -> Any:
    """Verdicts on items, by the experiment's rule and judge."""
    rule: Grader | None = stack.enter_context(rule_grader(config))
    judge: Grader | None = stack.enter_context(judge_grader(config))

    def graded(items: list[Item]) -> list[Grade]:
        verdicts = decide(dict(enumerate(items)), rule, judge)
        return [verdicts[i].grade for i in range(len(items))]

    return graded


def run(context: Context) -> str:
    """Train the arm and write its checkpoint, its table of progress and what each rollout took; the closing line."""
    config, of, sources = context.config, context.variant, context.reads
    own, asked, runtime = config.train_online, config.rollouts, config.runtime
    arm, seed = own.arms[of.arm], derived_seed(config.seed, "train_online")  # arms see the same prompts and seeds
    base = sources["base"]
    prompts = PROMPTS.read(sources["prompts/train"]).to_pylist()
    judged = []
    check_gradable(config, {row["prompt_id"]: row for row in prompts}, sources["prompts/train"])
    if own.judged_every:
        judged = PROMPTS.read(sources["prompts/validation"]).slice(0, own.judged_prompts).to_pylist()
        check_gradable(config, {row["prompt_id"]: row for row in judged}, sources["prompts/validation"])
    tokenizer = load_tokenizer(base)
    ids = {row["prompt_id"]: prompt_token_ids(tokenizer, row["messages"], own.thinking) for row in [*prompts, *judged]}
    check_fit({name: len(tokens) for name, tokens in ids.items()}, asked)
    control = Controller(arm.window, asked.max_new_tokens, seed)
    record = {
        "objective": "grpo", "params": context.params, "base": read_manifest(base).get("base"),
        "parents": manifest_digests(sources), "seed": seed,
    }  # fmt: skip
    folder = resume.state_folder(context.target, record)
    settings = settings_for(
        base, tokenizer, asked, Sampling(min_p=0.0), runtime, runtime.tensor_parallel, log_probs=True
    )
    head = read_joint_head(base) if "joint" in read_manifest(base) else None
    predictor = None
    if arm.window.rule == "predicted" and head is not None:
        settings, predictor = replace(settings, joint=head), Predictor(head.grid, runtime.max_num_seqs)
    model = load_model(base)
    model.set_attn_implementation(runtime.attention)
    with contextlib.ExitStack() as stack:
        ours = own.engine in ("hf", "vllm")
        engine = stack.enter_context(contextlib.closing(start(own.engine, settings))) if ours else None
        sampler = Sampler(
            engine, settings.stop_token_ids, settings.banned, asked.max_new_tokens, asked.max_model_len, settings.reasoning,
            predictor,
        )  # fmt: skip
        held_out = HeldOut(judged, [ids[row["prompt_id"]] for row in judged], own.judged_every, own.judged_samples)
        trainer = OnlineTrainer(
            model, tokenizer, prompts, arm, own, runtime, sampler, control, grading(config, stack), held_out, folder, seed
        )  # fmt: skip
        gathered = train_to_the_end(trainer, folder)
        rows = trainer.rows
        if is_main_process():
            unban(model)
            if gathered is not None:
                model = load_model(base)
                model.load_state_dict(gathered, strict=False)
            dtype = AutoConfig.from_pretrained(base).dtype
            table = PROGRESS.make({name: [row.get(name) for row in rows] for name in PROGRESS.columns.names})

            def more(private: Path) -> None:
                PROGRESS.write(private / "progress.parquet", table)

            save_checkpoint(
                context.target, model.to(dtype), tokenizer, record | {"window": control.plan()[0]}, head, more
            )
            times = [
                {name: value for name, value in row.items() if name == "rollout" or "seconds" in name} for row in rows
            ]
            write_json(context.graph.layout.seconds(context.name), {"rollouts": times})
            resume.forget_states(context.target)
    last = rows[-1] if rows else {"success": 0.0, "tokens_total": 0, "window": 0}
    return (
        f"{context.name}: {arm.rollouts} rollouts of {last['tokens_total']} tokens, {last['success']:.3f} right in the last, "
        f"window {last['window']}; wrote {context.target}"
    )


if __name__ == "__main__":
    run_stage("train_online", run)
