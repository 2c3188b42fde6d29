"""On-policy training: TRL's GRPOTrainer (https://arxiv.org/abs/2402.03300), sampling through our engines.

One rollout is: the window of its responses is planned, the engine gets the weights and samples with seeded requests, the
graders judge what came out, TRL turns rewards to advantages and takes its optimiser steps, and a row of the progress table
says what happened. What is ours, and TRL's is not:

* the sampler is our engine in the trainer's own precision, so `hf` and `vllm` give the same run to the token; rows that are
  never sampled are banned in the log-probabilities too; how far sampler and trainer differ is measured in every rollout;
* training states at the ends of rollouts only. TRL drops a rollout that is half learned from, and samples another one after
  a resume; so a stop waits for the end of the rollout, and a resumed run is the run that was never stopped;
* the window (window.py) and every metric read the graders' unshaped verdicts; a failure to grade is no reward of 0: the
  response is left out of its group.

Private methods of TRL that are overridden: `_generate_single_turn`, `_calculate_rewards`, `_generate_and_score_completions`,
`_prepare_inputs`, `_compute_loss`, `_get_per_token_logps_and_entropies`, `_load_optimizer_and_scheduler`;
tests/unit/test_online_guards.py guards each. B responses of this process, T tokens, V rows of the output matrix.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

with warnings.catch_warnings():  # of a newer vLLM than TRL knows, which is of no matter where ours samples
    warnings.simplefilter("ignore", UserWarning)
    from trl import GRPOTrainer

from ziprc.config.base import Runtime, Sampling
from ziprc.config.online import Arm, TrainOnline
from ziprc.engines.base import Request, Response
from ziprc.engines.recording import response_texts
from ziprc.errors import Dark, UserError, first_few
from ziprc.joint.reasoning import NEVER, ReasoningVocabulary
from ziprc.progress import progress
from ziprc.rewards.base import Grade, Item
from ziprc.rewards.combine import reward_function
from ziprc.store.digests import derived_seed
from ziprc.store.manifest import read_sealed, write_sealed
from ziprc.tables.rollouts import FinishReason
from ziprc.training import resume
from ziprc.training.account import PARTS, Answer, Rollout, Row, described, ratios, reason_of, score_of
from ziprc.training.arguments import HeldOut, Sampler, grpo_config
from ziprc.training.durable import Durable, distinct
from ziprc.training.law import add_region_head, ban, in_regions
from ziprc.training.micro import Sizes, by_length
from ziprc.training.rubric import Judged, Work, judged_by_one, step_advantages
from ziprc.training.rubric import described as described_work
from ziprc.training.vocabulary import CopiesRate, Use, drift_row, put_back
from ziprc.training.window import Controller, Seen

STATE, ROWS = "online.json", "progress.jsonl"
Grader = Callable[[Sequence[Item]], list[Grade]]


class OnlineTrainer(Durable, GRPOTrainer):
    """See the head of this file. `prompts` are rows of the prompts table."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Row], arm: Arm, own: TrainOnline,
        runtime: Runtime, sampler: Sampler, rule: Controller, grader: Grader, held_out: HeldOut, folder: Path, seed: int,
        work: Work | None = None,
    ) -> None:  # fmt: skip
        if len(prompts) < arm.prompts:
            raise UserError(
                f"A rollout asks {arm.prompts} different prompts, but the split has {len(prompts)}. Raise prompts.train or lower "
                "the arm's `prompts`."
            )
        self.sizes = Sizes.of(arm, runtime.rollouts_per_device, resume.world_size())
        self.arm, self.own, self.sampler, self.rule, self.grader = arm, own, sampler, rule, grader
        self.held_out, self.run_seed, self.folder, self.runtime, self.work = held_out, seed, folder, runtime, work
        self.rows: list[Row] = []
        self.now = Rollout()
        self.pushed = -1  # the optimiser step whose weights the engine has
        functions = [reward_function(name, of, sampler.cap) for name, of in arm.rewards.items()]
        super().__init__(
            model, functions, grpo_config(arm, own, runtime, sampler, self.sizes, folder, seed), processing_class=tokenizer,
            train_dataset=Dataset.from_list([{**row, "prompt": row["messages"]} for row in prompts]),
        )  # fmt: skip
        self.settle(arm, "train_online.arms")
        if self.is_fsdp_enabled and sampler.engine is not None:
            raise UserError(
                f"train_online.engine={own.engine} takes whole weights, which FSDP has cut in pieces. Set it to colocate or "
                "server, or use a launch profile without FSDP (runtime.accelerate)."
            )
        for one in (self.model, self.ref_model):
            if one is not None:
                whole = self.accelerator.unwrap_model(one)
                ban(whole, sampler.banned)
                if sampler.reasoning is not None:
                    add_region_head(whole, sampler.reasoning, arm.temperature)
        self.rate = (
            CopiesRate(self.model, sampler.reasoning, arm.copies_rate) if sampler.reasoning is not None else None
        )
        self.add_callback(EndOfRollout(self))

    # --- a rollout: sample, grade ---

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, multimodal_fields: Any, num_generations: int, *more: Any
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """One response to each prompt, in the window that is planned: ids and log-probabilities of their tokens."""
        now, number = self.now, self.rule.memory.rollouts
        now.window, now.probe = self.rule.plan()
        now.prompt_ids = prompt_ids
        now.use = None if self.sampler.reasoning is None else Use(self.sampler.reasoning)
        if self.sampler.engine is None:
            self.vllm_generation.max_completion_length = now.window
            with now.timed("generate"):
                ids, said = super()._generate_single_turn(prompt_ids, images, multimodal_fields, num_generations, *more)
            ended = [FinishReason.STOP if one[-1] in self.sampler.stops else FinishReason.LENGTH for one in ids]
            now.responses = [Response("", tuple(one), why) for one, why in zip(ids, ended, strict=True)]
            return ids, said
        self.push()
        first = self.accelerator.process_index * len(prompt_ids)
        seeds = [derived_seed(self.run_seed, "rollout", number, first + i) for i in range(len(prompt_ids))]
        now.responses = self.sample(prompt_ids, seeds, now.window, "generate")
        said = [response.log_probs.tolist() for response in now.responses if response.log_probs is not None]
        return [list(response.token_ids) for response in now.responses], said

    def push(self) -> None:
        """Give the engine the weights of now, once a step."""
        if self.sampler.engine is not None and self.pushed != self.state.global_step:
            with self.now.timed("push"):
                self.sampler.engine.load_weights(distinct(self.accelerator.unwrap_model(self.model).state_dict()))
            self.pushed = self.state.global_step

    def sample(self, prompt_ids: Sequence[Sequence[int]], seeds: Sequence[int], cap: int, part: str) -> list[Response]:
        """One response to each prompt, drawn by the law that is trained."""
        law = Sampling(temperature=self.arm.temperature, min_p=0.0)
        requests = [
            Request(str(i), tuple(ids), seed, cap, law)
            for i, (ids, seed) in enumerate(zip(prompt_ids, seeds, strict=True))
        ]
        engine, predictor = self.sampler.engine, self.sampler.predictor
        assert engine is not None
        with self.now.timed(part):
            if predictor is not None and part == "generate":  # judgements are of whole responses
                return predictor.sample(engine, requests, self.arm.window)
            return engine.generate(requests)

    def grade(
        self, prompts: Sequence[Row], responses: Sequence[Response], texts: Sequence[str], part: str
    ) -> list[Grade | None]:
        """The verdict on every response; None for one that did not end by itself."""
        ended = [i for i, response in enumerate(responses) if response.finish_reason is FinishReason.STOP]
        items = [Item.of(prompts[i], texts[i]) for i in ended]
        with self.now.timed(part):
            found = dict(zip(ended, self.grader(items), strict=True))
        return [found.get(i) for i in range(len(responses))]

    def _calculate_rewards(self, inputs: list[Row], prompts: Any, completions: Any, completion_ids_list: Any) -> Tensor:
        """Grade, tell the window and the progress table, let TRL call the reward functions: [all responses, functions]."""
        now, number = self.now, self.rule.memory.rollouts + 1
        texts = response_texts(now.responses, self.processing_class)
        grades = self.grade(inputs, now.responses, texts, "grade")
        known = [
            {**row, "score": score_of(grade) or 0.0, "finished": grade is not None, "window": now.window}
            for row, grade in zip(inputs, grades, strict=True)
        ]
        if self.work is not None:
            now.judged = self.judge_work(inputs, texts, grades)
            known = [{**row, "rubric": one.reward} for row, one in zip(known, now.judged, strict=True)]
        rewards = super()._calculate_rewards(known, prompts, completions, completion_ids_list)
        rows = zip(inputs, now.prompt_ids, now.responses, grades, strict=True)
        answers = gather_object(
            [
                Answer(
                    row["prompt_id"], row["difficulty"], len(ids), len(response.token_ids), grade is not None, score_of(grade),
                    reason_of(grade, response.finish_reason),
                )
                for row, ids, response, grade in rows
            ]
        )  # fmt: skip
        lacking = [] if self.work is None else gather_object([one.reward is None for one in now.judged])
        failed = torch.tensor([answer.score is None for answer in answers], device=rewards.device)
        if lacking:
            failed |= torch.tensor(lacking, device=rewards.device)
        if bad := (~torch.isfinite(rewards).all(-1) & ~failed).nonzero()[:, 0].tolist():
            raise UserError(
                f"A reward is not a number for {len(bad)} responses of rollout {number}, to prompts "
                f"{first_few(sorted({answers[i].prompt_id for i in bad}))}. The last training state is kept. Mend the function "
                "(rewards of the arm)."
            )
        rewards[failed] = torch.nan  # TRL leaves what is not graded out of its group
        now.row = {"rollout": number, "window": now.window, "probe": now.probe, **described(answers)}
        if self.work is not None:
            now.row |= described_work(gather_object(now.judged)) | self.work.counts()
        length, finished, right = (
            np.array([getattr(a, key) for a in answers]) for key in ("length", "finished", "right")
        )
        self.rule.observe(Seen(now.window, now.probe, length, finished, right))
        now.row |= {"decision": self.rule.memory.reason, "next_window": self.rule.plan()[0]}
        # TRL shuffles with torch's global generator, whatever the engine has drawn from it
        torch.manual_seed(derived_seed(self.run_seed, "shuffle", number))
        return rewards

    def judge_work(self, inputs: Sequence[Row], texts: Sequence[str], grades: Sequence[Grade | None]) -> list[Judged]:
        """What the rubric says of this process's responses; a dark batch is an error, with the state saved before it."""
        assert self.work is not None
        finished, right = [grade is not None for grade in grades], [score_of(grade) for grade in grades]
        with self.now.timed("rubric"):
            found, dark = judged_by_one(self.work, self.accelerator, (list(inputs), list(texts), finished, right))
        if dark is not None:
            if self.state.global_step > 0:
                self._save_checkpoint(self.model, trial=None)
            raise Dark(
                f"{dark} No step was taken in rollout {self.rule.memory.rollouts + 1}; the training state is saved."
            )
        return found

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL's rollout; where steps get credit, with an advantage for every token, [B, T]."""
        output = super()._generate_and_score_completions(inputs)
        if self.work is not None and self.work.own.credit == "steps":
            ids = [one.token_ids for one in self.now.responses]
            more = step_advantages(
                self.now.judged, ids, self.processing_class, self.arm.samples, self.work.own.step_weight
            )
            advantages = output["advantages"].unsqueeze(1).repeat(1, output["completion_mask"].shape[1])
            for row, own in zip(advantages, more, strict=True):
                row[: len(own)] += torch.as_tensor(own, device=row.device)
            output["advantages"] = advantages
        return output

    # --- learning from it ---

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Tensor]:
        """TRL's micro-batch of the rollout; when the rollout is new, its responses are first put together by length."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is before:
            return inputs
        size, rows = self.sizes.accumulation, self._buffered_inputs
        apart = self.arm.loss != "bnpo"  # whose micro-batches have equal weights, whatever is in them
        steps = [by_length(rows[first : first + size], apart) for first in range(0, len(rows), size)]
        self._buffered_inputs = [micro for step in steps for micro in step]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _get_per_token_logps_and_entropies(
        self, model: Any, ids: Tensor, mask: Tensor, keep: int, *more: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        with self.now.timed("score") if not torch.is_grad_enabled() else contextlib.nullcontext():
            if self.sampler.reasoning is None:
                found = super()._get_per_token_logps_and_entropies(model, ids, mask, keep, *more, **kwargs)
            else:
                batches = zip(*(one.split(kwargs.get("batch_size") or len(ids)) for one in (ids, mask)), strict=True)
                with self.accelerator.autocast():
                    parts = [in_regions(model, self.sampler.reasoning, *batch, keep) for batch in batches]
                log_probs, entropies, states, inside = (torch.cat(part) for part in zip(*parts, strict=True))
                found = log_probs, entropies, None
                if torch.is_grad_enabled():  # the pass that is learned from
                    weight = self.accelerator.unwrap_model(model).get_output_embeddings().weight.detach()
                    self.now.use.learn(states.detach(), entropies.detach(), inside, mask[:, -keep:].bool(), weight)
        self.scored = found[0].detach()
        return found

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        made, optimizer = self.optimizer is None, super().create_optimizer(model)
        if made and self.rate is not None and self.arm.copies_rate != 1:
            self.rate.attach(optimizer)
        return optimizer

    def _compute_loss(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """TRL's loss; refused before the step when a token of it has no probability."""
        loss: Tensor = super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        new = self.scored[mask]
        if not (torch.isfinite(loss.detach()) and torch.isfinite(new).all()):
            self.refuse_step("loss", self.step_names())
        if (new < NEVER / 2).any():
            raise UserError(
                f"The sampler drew a token without probability, at step {self.state.global_step + 1} of {self.state.max_steps}, "
                f"in {self.step_names()[0]}; the step was not taken. Sampler and trainer ban other rows of the output matrix."
            )
        old = inputs["old_per_token_logps"][mask] if "old_per_token_logps" in inputs else new
        self.now.log_ratios.append((new - old).float().cpu())
        if "sampling_per_token_logps" in inputs:
            self.now.mismatches.append((old - inputs["sampling_per_token_logps"][mask]).float().cpu())
        return loss

    def step_names(self) -> list[str]:
        return [f"rollout {self.rule.memory.rollouts}"]

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        self.now.norms.append(float(norm))
        return norm

    def end_rollout(self) -> None:
        """Finish the row of the progress table, judge the policy where that is due, and warn of a sampler that differs."""
        now, row, before = self.now, self.now.row, self.rows[-1] if self.rows else {}
        means = {name: float(np.nanmean(of)) for name, of in self._metrics["train"].items() if len(of)}
        self._metrics["train"].clear()
        found = self.over_processes(ratios(now, self.arm.clip_low, self.arm.clip_high))
        row |= {
            "step": self.state.global_step, "reward": means.get("reward"), "reward_std": means.get("reward_std"),
            "reward_total": before.get("reward_total", 0.0) + means.get("reward", 0.0),
            "tokens_total": before.get("tokens_total", 0) + row["tokens_response"],
            "zero_variance": means.get("frac_reward_zero_std"), "entropy": means.get("entropy"), "kl": means.get("kl"),
            "clip_fraction": means.get("clip_ratio/region_mean"), "grad_norm": float(np.mean(now.norms)),
            "learning_rate": self.lr_used, **found,
        }  # fmt: skip
        if self.sampler.reasoning is not None:
            row |= self.vocabulary_row(self.sampler.reasoning)
        if self.held_out.every and (
            row["rollout"] % self.held_out.every == 0 or self.state.global_step >= self.state.max_steps
        ):
            row |= self.judge()
        self.close_row(row)
        if self.is_world_process_zero() and row.get("mismatch_kl", 0.0) > self.runtime.mismatch:
            print(
                f"rollout {row['rollout']}: sampler and trainer differ by {row['mismatch_kl']:.2g} nats a token, more than "
                f"runtime.mismatch={self.runtime.mismatch:g}: what is learned from was drawn by another policy",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def vocabulary_row(self, reasoning: ReasoningVocabulary) -> Row:
        """What became of the copies in this rollout, and of their rows since the beginning."""
        now, model = self.now, self.accelerator.unwrap_model(self.model)
        responses = [response.token_ids for response in now.responses]
        now.use.see(now.prompt_ids, responses)
        rng = np.random.default_rng(derived_seed(self.run_seed, "put back", now.row["rollout"]))
        gaps = put_back(model, reasoning, now.prompt_ids, responses, self.sampler.banned, rng)
        now.use.add(copy_kl=sum(gaps), probed=len(gaps))
        return now.use.with_others(gather_object([now.use])).row() | drift_row(model, reasoning)

    def over_processes(self, found: dict[str, float]) -> dict[str, float]:
        """Means over the processes that have a number."""
        every = gather_object([found])
        return {name: float(np.mean([of[name] for of in every if name in of])) for name in sorted(set().union(*every))}

    def close_row(self, row: Row) -> None:
        """Add a row to the table and its file, and to the trackers; the next rollout begins."""
        row |= {f"seconds_{part}": self.now.seconds.get(part, 0.0) for part in PARTS}
        row["seconds"] = time.monotonic() - self.now.began
        self.rows.append(row)
        if self.is_world_process_zero():
            with open(self.folder / ROWS, "a") as file:
                file.write(json.dumps(row) + "\n")
        if self.args.report_to:
            self.log({name: value for name, value in row.items() if isinstance(value, int | float)})
        self.now = Rollout()

    def judge(self) -> Row:
        """How the policy of now answers the held-out prompts, at the largest window, with the same seeds every time."""
        own = self.held_out
        self.push()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        asked = [(p, k) for p in range(len(own.prompts)) for k in range(own.samples)][rank::world]
        seeds = [derived_seed(self.run_seed, "held out", own.prompts[p]["prompt_id"], k) for p, k in asked]
        answers = self.sample([own.token_ids[p] for p, _ in asked], seeds, self.sampler.cap, "judge")
        texts = response_texts(answers, self.processing_class)
        grades = self.grade([own.prompts[p] for p, _ in asked], answers, texts, "judge")
        mine = [
            (p, 0.0 if grade is None else score_of(grade), len(answer.token_ids))
            for (p, _), grade, answer in zip(asked, grades, answers, strict=True)
        ]
        every = gather_object(mine)
        scores = [[score for q, score, _ in every if q == p and score is not None] for p in range(len(own.prompts))]
        means = [float(np.mean(of)) for of in scores if of]  # all of them, or the grader has failed on a prompt
        known = {"held_out": float(np.mean(means)), "held_out_scores": means} if len(means) == len(scores) else {}
        return {"held_out": None, **known, "held_out_tokens": sum(tokens for _, _, tokens in every)}

    # --- training states ---

    def complete_state(self, state: Path) -> None:
        write_sealed(state / STATE, {"window": self.rule.state(), "rows": len(self.rows)})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        kept = read_sealed(Path(checkpoint) / STATE) if checkpoint else None
        if kept:
            self.rule.load(kept["window"])
        if self.is_world_process_zero():  # rows after the state are of rollouts that will be sampled again
            lines = (self.folder / ROWS).read_text().splitlines()[: kept["rows"]] if kept else []
            self.rows = [json.loads(line) for line in lines]
            (self.folder / ROWS).write_text("".join(f"{line}\n" for line in lines))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: a checkpoint describes itself."""


class EndOfRollout(TrainerCallback):
    """Closes rollouts, saves at their ends, and shows how far the run is."""

    def __init__(self, trainer: OnlineTrainer) -> None:
        self.trainer, self.bar = trainer, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        self.saved = state.global_step
        if state.is_world_process_zero:
            done = state.global_step // trainer.sizes.updates
            self.bar = progress(trainer.arm.rollouts, args.run_name, "rollouts", done=done)
        if trainer.held_out.every and state.global_step == 0:
            trainer.close_row({"rollout": 0, "step": 0, "tokens_total": 0} | trainer.judge())

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.lr_used = self.trainer.optimizer.param_groups[0]["lr"]  # the schedule moves on before on_step_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if state.global_step % trainer.sizes.updates:
            return
        trainer.end_rollout()
        due = trainer.agree(int(state.global_step - self.saved >= trainer.runtime.save_steps))
        if trainer.stopped_by:
            control.should_training_stop = True
        if due or trainer.stopped_by:
            control.should_save, self.saved = True, state.global_step
        if self.bar is not None:
            row = trainer.rows[-1]
            rate = row["tokens_response"] / max(row["seconds"], 1e-9)
            self.bar.set_postfix_str(
                f"right {row['success']:.3f} window {row['window']} length {row['length_mean']:.0f} cut {row['truncated']:.0%} "
                f"{rate / 1000:.1f} ktok/s", refresh=False,
            )  # fmt: skip
            self.bar.update()
            if state.global_step >= state.max_steps or trainer.stopped_by:
                self.bar.close()
