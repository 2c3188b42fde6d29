"""The one trainer of the project: `train` takes a trainee, data and their order, and leaves a checkpoint.

It is `transformers.Trainer` (devices, DDP and FSDP through accelerate, accumulation, mixed precision, trackers, format
of training states) with our own:

* loss: a sum divided by the supervised positions of the *global* batch, over accumulation and devices;
* order of data, fixed beforehand and read in sequence, so a resumed run is bit-identical;
* warm-up from the first step, a schedule that knows the number of steps, training states, signals, and a stop before a
  step that is not finite: what is in `durable`, and shared with the on-policy trainer;
* display: means over all processes since the line before.

Weights are float32; `bf16` means autocast. Under `accelerate launch` it uses as many processes as it is given.
"""

from __future__ import annotations

import operator
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ziprc.config.base import Optimisation, Runtime
from ziprc.joint.checkpoint import save_checkpoint
from ziprc.joint.head import JointHead
from ziprc.progress import progress
from ziprc.training import resume
from ziprc.training.durable import Durable, machine_arguments, train_to_the_end
from ziprc.training.order import MicroBatches
from ziprc.training.trainees import Trainee

SECONDS_BETWEEN_READINGS = 1.0  # at least: reading the loss waits for the device


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its steps, and the means of the loss's parts over the last stretch that was reported.

    `gathered` is the trainee's whole state under FSDP, whose modules hold only shards afterwards; else None.
    """

    steps: int
    parts: Mapping[str, float]
    gathered: Mapping[str, Tensor] | None = None


def train(
    target: Path, record: Mapping[str, Any], trainee: Trainee, fresh: Callable[[], Trainee], batches: MicroBatches,
    optimisation: Optimisation, runtime: Runtime, section: str, tokenizer: PreTrainedTokenizerBase,
    joint: JointHead | None = None, dtype: torch.dtype = torch.float32,
) -> str:  # fmt: skip
    """Train to the end of the order and save the checkpoint `target` in `dtype`; how it went, for the closing line.

    `record` is what the checkpoint's manifest will say: objective, params, base, parents and the seed that is used here.
    `fresh` makes the untrained trainee once more, to take up the weights that FSDP leaves in shards. `section` is the
    one of the configuration that errors name. Raises what `fit` raises.
    """
    trainee.model.set_attn_implementation(runtime.attention)
    if runtime.gradient_checkpointing:
        trainee.model.gradient_checkpointing_enable({"use_reentrant": False})
    outcome = fit(trainee, batches, optimisation, runtime, resume.state_folder(target, record), record["seed"], section)
    if os.environ.get("RANK", "0") == "0":
        if outcome.gathered is not None:
            trainee = fresh()
            trainee.load_state_dict(outcome.gathered, strict=False)
        save_checkpoint(target, trainee.merged().to(dtype), tokenizer, record, joint)
        resume.forget_states(target)
    parts = ", ".join(f"{name} {value:.4f}" for name, value in outcome.parts.items())
    return f"{outcome.steps} steps, final {parts or 'loss unknown'}, wrote {target}"


def fit(
    trainee: Trainee, batches: MicroBatches, optimisation: Optimisation, runtime: Runtime, folder: Path, seed: int,
    section: str,
) -> Outcome:  # fmt: skip
    """Train to the end of the order. Goes on from, and raises, what `train_to_the_end` does."""
    args = TrainingArguments(  # one item of the data set is one micro-batch, hence the batch size of 1
        **machine_arguments(runtime, folder, seed, optimisation.max_grad_norm), per_device_train_batch_size=1,
        max_steps=batches.order.steps, gradient_accumulation_steps=batches.order.slots // resume.world_size(),
        save_strategy="steps", save_steps=runtime.save_steps,
    )  # fmt: skip
    trainer = ZipTrainer(trainee, batches, optimisation, args, section)
    gathered = train_to_the_end(trainer, folder)
    return Outcome(trainer.state.global_step, trainer.shown.means, gathered)


class ZipTrainer(Durable):
    """See the head of this file; `section` is named in errors."""

    def __init__(
        self, trainee: Trainee, batches: MicroBatches, optimisation: Optimisation, args: TrainingArguments, section: str
    ) -> None:
        _ = args.device
        args._n_gpu = min(args.n_gpu, 1)  # one process, one device: never torch's DataParallel
        super().__init__(trainee, args, data_collator=operator.itemgetter(0), train_dataset=batches)
        self.settle(optimisation, section)
        self.loss_is_scaled_for_ga = True
        self.picked: list[int] = []  # units of the step in progress
        self.shown = Shown(self)
        self.add_callback(self.shown)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Tensor]], device: torch.device) -> Tensor:
        """Supervised positions of the global batch."""
        count = torch.tensor(sum(int(batch["count"]) for batch in batch_samples), device=device)
        self.picked = [i for batch in batch_samples for i in batch["picked"].tolist()]
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        batch = dict(inputs)
        picked, count = batch.pop("picked"), batch.pop("count")
        sums = model(**batch)
        if not torch.isfinite(sums["loss"].detach()):
            self.picked = picked.tolist()
            self.refuse_step("loss", self.step_names())
        self.shown.add({**sums, "count": count, "tokens": batch["attention_mask"].sum()})
        assert num_items_in_batch is not None
        return sums["loss"] * (self.args.world_size / num_items_in_batch)  # DDP and FSDP average over processes

    def step_names(self) -> list[str]:
        names = self.train_dataset.data.names
        return [names[i] for i in self.picked]


class Shown(TrainerCallback):
    """What is seen of a run: a bar (plain lines where there is no terminal) and the trackers."""

    def __init__(self, trainer: ZipTrainer) -> None:
        self.trainer = trainer
        self.sums: dict[str, Tensor] = {}  # since the last line, on this process
        self.means: dict[str, float] = {}  # of the last line, over all processes
        self.bar: tqdm[Any] | None = None  # of the main process

    def add(self, sums: Mapping[str, Tensor]) -> None:
        """Sums of one micro-batch: the loss's parts, `count` of positions and `tokens`. None is read yet."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.since = time.monotonic()
        if state.is_world_process_zero:
            self.bar = progress(state.max_steps, args.run_name, "steps", done=state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning_rate = self.trainer.optimizer.param_groups[0]["lr"]  # the schedule moves on before on_step_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, now = self.trainer, time.monotonic()
        wait = max(self.bar.mininterval, SECONDS_BETWEEN_READINGS) if self.bar is not None else float("inf")
        due = trainer.agree(int(now - self.since >= wait))
        if trainer.stopped_by:
            control.should_save = control.should_training_stop = True
        last = control.should_training_stop or state.global_step >= state.max_steps
        if due or last:
            self.read(state.global_step, last)

    def read(self, step: int, last: bool) -> None:
        """Means over all processes since the last reading, to the bar and the trackers."""
        totals = torch.stack([value.double() for value in self.sums.values()])
        totals = self.trainer.accelerator.reduce(totals, "sum") if self.trainer.args.world_size > 1 else totals
        own = dict(zip(self.sums, totals.tolist(), strict=True))
        count, tokens, now = own.pop("count"), own.pop("tokens"), time.monotonic()
        rate, self.since, self.sums = tokens / max(now - self.since, 1e-9), now, {}
        self.means = {name: value / max(1, count) for name, value in own.items()}
        if self.bar is None:
            return
        parts = " ".join(f"{name} {value:.4f}" for name, value in self.means.items())
        self.bar.n = step
        self.bar.set_postfix_str(f"{parts} lr {self.learning_rate:.2e} {rate / 1000:.1f} ktok/s", refresh=not last)
        if self.trainer.args.report_to:
            self.trainer.log({**self.means, "learning_rate": self.learning_rate, "tokens_per_second": rate})
        if last:
            self.bar.close()
