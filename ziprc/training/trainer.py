"""The one trainer of the project: `train` takes a trainee, data and their order, and leaves a checkpoint.

It is `transformers.Trainer` (devices, DDP and FSDP through accelerate, accumulation, mixed precision, trackers, format
of training states) with our own:

* loss: a sum divided by the supervised positions of the *global* batch, over accumulation and devices;
* order of data, fixed beforehand and read in sequence, so a resumed run is bit-identical;
* warm-up from the first step, and a schedule that knows the number of steps;
* stop before a step whose loss or gradient is not finite, which names the rollouts;
* training states, which count once they are complete and of which the last is kept (`resume`); SIGTERM and Ctrl-C save
  one and leave;
* display: means over all processes since the line before.

Weights are float32; `bf16` means autocast. Under `accelerate launch` it uses as many processes as it is given.
"""

from __future__ import annotations

import operator
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainerCallback, TrainingArguments

from ziprc.config.base import Optimisation, Runtime
from ziprc.errors import Stopped, UserError
from ziprc.joint.checkpoint import save_checkpoint
from ziprc.joint.head import JointHead
from ziprc.processor import native_bfloat16
from ziprc.progress import progress
from ziprc.training import resume
from ziprc.training.optimizers import make_optimizer, schedule_factor
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
    """Train to the end of the order, going on from the last training state in `folder` if there is one.

    Several processes come out of it together, and have parted: none can talk to another afterwards.
    Raises UserError for a non-finite loss or gradient, and Stopped after SIGTERM or Ctrl-C, when the state is saved.
    """
    on_gpu, processes = torch.cuda.is_available(), resume.world_size()
    if runtime.bf16 and not on_gpu and not native_bfloat16():
        print("runtime.bf16=true: without bf16 instructions this processor is faster with false", file=sys.stderr)
    args = TrainingArguments(  # one item of the data set is one micro-batch, hence the batch size of 1
        str(folder), per_device_train_batch_size=1, max_steps=batches.order.steps, seed=seed % 2**32,
        gradient_accumulation_steps=batches.order.slots // processes, max_grad_norm=optimisation.max_grad_norm,
        bf16=runtime.bf16, use_cpu=not on_gpu, dataloader_pin_memory=on_gpu, remove_unused_columns=False,
        ddp_find_unused_parameters=False, ddp_backend=None if on_gpu or processes == 1 else "gloo",
        save_strategy="steps", save_steps=runtime.save_steps, report_to=list(runtime.trackers) or "none",
        run_name=resume.run_name(folder), logging_strategy="no", logging_nan_inf_filter=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = ZipTrainer(trainee, batches, optimisation, args, section)
    steps, main = batches.order.steps, trainer.is_world_process_zero()
    if main:
        resume.claim(folder)
    state = resume.last_complete_state(folder)
    if main and state is not None:
        print(f"resuming from step {state.name.rpartition('-')[2]} of {steps}", file=sys.stderr, flush=True)
    before = {number: signal.signal(number, trainer.note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    done = trainer.state.global_step
    if done < steps:
        raise Stopped(trainer.stopped_by, f"Step {done} of {steps} is done and the training state is saved.")
    gathered = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if processes > 1:  # nobody may end, or remove the states, while another process is still in train()
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
    return Outcome(done, trainer.shown.means, gathered)


class ZipTrainer(transformers.Trainer):
    """See the head of this file; `section` is named in errors."""

    def __init__(
        self, trainee: Trainee, batches: MicroBatches, optimisation: Optimisation, args: TrainingArguments, section: str
    ) -> None:
        _ = args.device
        args._n_gpu = min(args.n_gpu, 1)  # one process, one device: never torch's DataParallel
        super().__init__(trainee, args, data_collator=operator.itemgetter(0), train_dataset=batches)
        if optimisation.optimizer == "muon" and self.is_fsdp_enabled:
            raise UserError(
                f"Muon needs whole matrices and cannot train sharded ones. Set {section}'s optimizer to adamw, or use a "
                "launch profile without FSDP (runtime.accelerate)."
            )
        self.loss_is_scaled_for_ga = True
        self.optimisation = optimisation
        self.shown = Shown(self)
        self.stopped_by = 0  # the signal on which all processes stop
        self.signalled = 0  # the first that this one has had
        self._step_names: list[int] = []
        self.remove_callback(PrinterCallback)
        self.add_callback(self.shown)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = self.optimizer or make_optimizer(model or self.model, self.optimisation)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            warmup, shape = self.optimisation.warmup, self.optimisation.schedule
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: schedule_factor(step, num_training_steps, warmup, shape)
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Tensor]], device: torch.device) -> Tensor:
        """Supervised positions of the global batch."""
        count = torch.tensor(sum(int(batch["count"]) for batch in batch_samples), device=device)
        self._step_names = [i for batch in batch_samples for i in batch["picked"].tolist()]
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        batch = dict(inputs)
        picked, count = batch.pop("picked"), batch.pop("count")
        sums = model(**batch)
        if not torch.isfinite(sums["loss"].detach()):
            self._refuse_step("loss", picked.tolist())
        self.shown.add({**sums, "count": count, "tokens": batch["attention_mask"].sum()})
        assert num_items_in_batch is not None
        return sums["loss"] * (self.args.world_size / num_items_in_batch)  # DDP and FSDP average over processes

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP
        if not torch.isfinite(torch.as_tensor(norm)):
            self._refuse_step("gradient", self._step_names)
        return norm

    def _refuse_step(self, what: str, picked: list[int]) -> None:
        names = [self.train_dataset.data.names[i] for i in picked]
        shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
        raise UserError(
            f"The {what} is not finite at step {self.state.global_step + 1} of {self.state.max_steps}; the step was "
            f"not taken. The batch holds: {shown}. Lower the learning rate, or look at these."
        )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights only, tied matrices once, by their first name."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = state_dict if state_dict is not None else self.model.state_dict()
        names = {(tensor.data_ptr(), tensor.numel()): name for name, tensor in reversed(weights.items())}
        distinct = {name: weights[name].contiguous() for name in names.values()}
        save_file(distinct, folder / "model.safetensors", metadata={"format": "pt"})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """None after the last step: the finished model is about to be written."""
        if self.state.global_step >= self.state.max_steps:
            return
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            resume.complete(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing: the only missing keys are tied matrices, stored once."""

    def note(self, number: int, frame: Any) -> None:
        """A signal asks for a saved state after the step in progress."""
        self.signalled = self.signalled or number


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
        trainer.stopped_by, due = trainer.signalled, int(now - self.since >= wait)
        if args.world_size > 1:  # what one process wants, all do
            flags = torch.tensor([[trainer.signalled, due]], device=args.device)
            trainer.stopped_by, due = trainer.accelerator.gather(flags).amax(0).tolist()
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
