"""train_online: a policy trained on-policy by verifiable rewards, from the base; `online-<arm>` each.

The checkpoint holds `progress.parquet`, one row a rollout (ziprc/tables/progress.py); what each took is in
`seconds/<name>.json`. While it trains, both are lines of `progress.jsonl` beside its training states. Nothing of validation
or test prompts moves the policy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from ziprc.chat import prompt_token_ids
from ziprc.config.base import Sampling
from ziprc.config.load import Config
from ziprc.config.online import Arm
from ziprc.engines import start
from ziprc.engines.base import settings_for
from ziprc.engines.recording import check_fit
from ziprc.errors import UserError, first_few
from ziprc.joint.checkpoint import load_model, save_checkpoint
from ziprc.joint.head import read_joint_head, read_manifest
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.base import Grade, Grader, Item, decide
from ziprc.rewards.grade import target_of
from ziprc.rewards.grading import check_gradable, judge_grader, rule_grader
from ziprc.stages.context import Context, is_main_process, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.files import write_json
from ziprc.store.manifest import manifest_digests
from ziprc.systems.online import GRADERS
from ziprc.tables.progress import PROGRESS
from ziprc.tables.prompts import PROMPTS
from ziprc.training import resume
from ziprc.training.account import Row
from ziprc.training.arguments import HeldOut, Sampler
from ziprc.training.durable import train_to_the_end
from ziprc.training.law import unban
from ziprc.training.online import OnlineTrainer
from ziprc.training.predicted import Predictor
from ziprc.training.window import Controller


def grading(config: Config, arm: Arm, stack: contextlib.ExitStack) -> Any:
    """Verdicts on items, by the experiment's rule and judge; on a grader's words, by the teacher's score."""
    rule: Grader | None
    judge: Grader | None = None
    if arm.asks == "gradings":
        rule = stack.enter_context(import_module("ziprc.rewards.grade").grader(config))
    else:
        rule, judge = stack.enter_context(rule_grader(config)), stack.enter_context(judge_grader(config))

    def graded(items: list[Item]) -> list[Grade]:
        verdicts = decide(dict(enumerate(items)), rule, judge)
        return [verdicts[i].grade for i in range(len(items))]

    return graded


def check_prompts(config: Config, arm: Arm, rows: Mapping[str, Any], source: Path) -> None:
    """UserError for prompts that nobody could grade responses to, by id."""
    if arm.asks == "prompts":
        check_gradable(config, rows, source)
    elif lacking := sorted(name for name, row in rows.items() if target_of(row["answer"]) is None):
        raise UserError(f"{source}: {len(lacking)} questions lack a teacher's score in [0, 1]: {first_few(lacking)}.")


def keep(context: Context, model: Any, tokenizer: Any, record: Mapping[str, Any], head: Any, rows: list[Row]) -> None:
    """Write the checkpoint with its table of progress, and what each rollout took; the training states are forgotten."""
    table = PROGRESS.make({name: [row.get(name) for row in rows] for name in PROGRESS.columns.names})
    save_checkpoint(
        context.target,
        model,
        tokenizer,
        record,
        head,
        lambda folder: PROGRESS.write(folder / "progress.parquet", table),
    )
    times = [{name: value for name, value in row.items() if name == "rollout" or "seconds" in name} for row in rows]
    write_json(context.graph.layout.seconds(context.name), {"rollouts": times})
    resume.forget_states(context.target)


def run(context: Context) -> str:
    """Train the arm and write its checkpoint, its table of progress and what each rollout took; the closing line."""
    config, of, sources = context.config, context.variant, context.reads
    own, arm, runtime = config.train_online, config.train_online.arms[of.arm], config.runtime
    section, thinking = ("rollouts", own.thinking) if arm.asks == "prompts" else ("gradings", False)
    asked = getattr(config, section)
    seed = derived_seed(config.seed, "train_online")  # arms see the same prompts and seeds
    base, source = sources["base"], sources[f"{arm.asks}/train"]
    prompts = PROMPTS.read(source).to_pylist()
    judged, judged_every = [], own.judged_every if arm.asks == "prompts" else 0
    check_prompts(config, arm, {row["prompt_id"]: row for row in prompts}, source)
    if judged_every:
        judged = PROMPTS.read(sources["prompts/validation"]).slice(0, own.judged_prompts).to_pylist()
        check_prompts(config, arm, {row["prompt_id"]: row for row in judged}, sources["prompts/validation"])
    graders = import_module(GRADERS) if arm.rubric is not None else None
    rubrics = graders.rubrics_of(prompts, sources) if graders else {}
    prompts = [row for row in prompts if not rubrics or row["prompt_id"] in rubrics]
    tokenizer = load_tokenizer(base)
    ids = {row["prompt_id"]: prompt_token_ids(tokenizer, row["messages"], thinking) for row in [*prompts, *judged]}
    check_fit({name: len(tokens) for name, tokens in ids.items()}, asked, section)
    control = Controller(arm.window, asked.max_new_tokens, seed)
    record = {
        "objective": "grpo", "params": context.params, "base": read_manifest(base).get("base"),
        "parents": manifest_digests(sources), "seed": seed,
    }  # fmt: skip
    if "grader" in read_manifest(base):
        record["grader"] = read_manifest(base)["grader"]
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
        held_out = HeldOut(judged, [ids[row["prompt_id"]] for row in judged], judged_every, own.judged_samples)
        work = graders.work_of(config, arm.rubric, rubrics, sources, folder, stack) if graders else None
        trainer = OnlineTrainer(
            model, tokenizer, prompts, arm, own.model_copy(update={"thinking": thinking}), runtime, sampler, control,
            grading(config, arm, stack), held_out, folder, seed, work,
        )  # fmt: skip
        gathered = train_to_the_end(trainer, folder)
        rows = trainer.rows
        if is_main_process():
            unban(model)
            if gathered is not None:
                model = load_model(base)
                model.load_state_dict(gathered, strict=False)
            model = model.to(AutoConfig.from_pretrained(base).dtype)
            keep(context, model, tokenizer, record | {"window": control.plan()[0]}, head, rows)
    last = rows[-1] if rows else {"success": 0.0, "tokens_total": 0, "window": 0}
    return (
        f"{context.name}: {arm.rollouts} rollouts of {last['tokens_total']} tokens, {last['success']:.3f} right in the last, "
        f"window {last['window']}; wrote {context.target}"
    )


if __name__ == "__main__":
    run_stage("train_online", run)
