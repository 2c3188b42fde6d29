"""The one trainer of the project: `transformers.Trainer` with our loss, order of data, optimizer and resume.

What the Trainer gives: devices, DDP and FSDP through accelerate, accumulation, mixed precision, trackers, the format of
training states. What is ours, each in a few lines below:

* the loss is a sum divided by the labelled positions of the *global* batch, over accumulation and devices;
* the order of data is fixed beforehand (`order.Plan`) and read in sequence, so a resumed run is bit-identical;
* warm-up from the first step, and a schedule that knows the number of steps;
* a non-finite loss or gradient stops before the step and names the rollouts;
* a training state counts only once it is complete; only the last one is kept; SIGTERM saves one and leaves.

Weights are float32; `bf16` means autocast. Under `accelerate launch` it uses as many processes as it is given.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ziprc.config.base import Runtime
from ziprc.errors import UserError
from ziprc.processor import native_bfloat16
from ziprc.store.digests import digest_file, digest_json
from ziprc.store.files import sync_file
from ziprc.store.manifest import read_sealed, write_sealed
from ziprc.training.optimizers import OptimizerSettings, make_optimizer, make_schedule
from ziprc.training.order import MicroBatches, only_item
from ziprc.training.trainees import Trainee

COMPLETE = "complete.json"  # of a training state, written last: its files and their digests
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its steps, and the means of the loss's parts over the last stretch that was reported.

    `gathered` is the trainee's whole state under FSDP, whose modules hold only shards afterwards; else None.
    """

    steps: int
    parts: Mapping[str, float]
    gathered: Mapping[str, Tensor] | None = None

    def text(self) -> str:
        parts = ", ".join(f"{name} {value:.4f}" for name, value in self.parts.items())
        return f"{self.steps} steps, final {parts or 'loss unknown'}"


def world_size() -> int:
    """Processes of this launch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def state_folder(target: Path, identity: Any) -> Path:
    """Where training states of `target` are kept: beside it, by a digest of everything that determines the run."""
    return target.parent / f".{target.name}.training" / digest_json([identity, world_size()])[:16]


def run_name(folder: Path) -> str:
    """The checkpoint's name, from `.<name>.training/<digest>`."""
    return folder.parent.name.removeprefix(".").removesuffix(".training")


def last_complete_state(folder: Path) -> Path | None:
    """The newest training state that was written to its end and is intact."""
    found = [p for p in folder.glob("checkpoint-*") if _is_complete(p)]
    return max(found, key=lambda p: int(p.name.rpartition("-")[2]), default=None)


def _is_complete(state: Path) -> bool:
    """Whether the marker is there and every file is what it says; a damaged state is named and left out."""
    marker = state / COMPLETE
    if not marker.exists():
        return False
    with contextlib.suppress(UserError):
        if read_sealed(marker)["files"] == _digests(state):
            return True
    print(f"{state} is damaged and is not resumed from", file=sys.stderr, flush=True)
    return False


def _digests(state: Path) -> dict[str, str]:
    return {p.name: digest_file(p) for p in sorted(state.iterdir()) if p.is_file() and p.name != COMPLETE}


def fit(
    trainee: Trainee, data: MicroBatches, settings: OptimizerSettings, runtime: Runtime, folder: Path, seed: int
) -> Outcome:
    """Train to the end of the plan, resuming from `folder` if a state is there; sibling (stale) states are removed.

    Several processes come out of it together, and have parted: none can talk to another afterwards.

    Raises UserError for a non-finite loss or gradient, and after SIGTERM (the state is saved; run again to resume).
    """
    trainer = ZipTrainer(trainee, data, settings, runtime, folder, seed)
    if trainer.is_world_process_zero():
        for stale in folder.parent.glob("*"):
            if stale != folder:
                shutil.rmtree(stale, ignore_errors=True)
    state = last_complete_state(folder)
    if state is not None and trainer.is_world_process_zero():
        print(f"resuming from step {state.name.rpartition('-')[2]} of {data.plan.steps}", file=sys.stderr, flush=True)
    with trainer.sigterm_noted():
        trainer.train(resume_from_checkpoint=str(state) if state else None)
    if trainer.state.global_step < data.plan.steps:
        raise UserError(
            f"Stopped by SIGTERM after step {trainer.state.global_step} of {data.plan.steps}; the state is saved. "
            "Run the same command again to go on from there."
        )
    gathered = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    if trainer.args.world_size > 1:  # nobody may end, or remove the states, while another process is still in train()
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
    return Outcome(trainer.state.global_step, trainer.meter.means, gathered)


def forget_states(target: Path) -> None:
    """Remove the training states of a finished checkpoint."""
    shutil.rmtree(target.parent / f".{target.name}.training", ignore_errors=True)


def training_arguments(
    data: MicroBatches, settings: OptimizerSettings, runtime: Runtime, folder: Path, seed: int
) -> TrainingArguments:
    """The Trainer's own settings. One item of the data set is one micro-batch, hence the batch size of 1."""
    on_gpu = torch.cuda.is_available()
    if runtime.bf16 and not on_gpu and not native_bfloat16():
        print("runtime.bf16=true: without bf16 instructions this processor is faster with false", file=sys.stderr)
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=data.plan.slots // world_size(),
        max_steps=data.plan.steps,
        max_grad_norm=settings.max_grad_norm,
        bf16=runtime.bf16,
        use_cpu=not on_gpu,
        save_strategy="steps",
        save_steps=runtime.save_steps,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to=list(runtime.trackers) or "none",
        run_name=run_name(folder),
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,
        ddp_backend=None if on_gpu or world_size() == 1 else "gloo",
        seed=seed % 2**32,
    )


class ZipTrainer(transformers.Trainer):
    """See the head of this file."""

    def __init__(
        self,
        trainee: Trainee,
        data: MicroBatches,
        settings: OptimizerSettings,
        runtime: Runtime,
        folder: Path,
        seed: int,
    ) -> None:
        args = training_arguments(data, settings, runtime, folder, seed)
        _ = args.device
        args._n_gpu = min(args.n_gpu, 1)  # one process, one device: never torch's DataParallel
        super().__init__(trainee, args, data_collator=only_item, train_dataset=data)
        if settings.kind == "muon" and self.is_fsdp_enabled:
            raise UserError(
                "Muon needs whole matrices and cannot train sharded ones. Set train_joint's optimizer to adamw, or use "
                "a launch profile without FSDP (runtime.accelerate)."
            )
        self.loss_is_scaled_for_ga = True
        self.settings = settings
        self.meter = Meter(data.plan.steps, run_name(folder))
        self._step_names: list[int] = []
        self._stop_requested = False
        self.remove_callback(PrinterCallback)
        self.add_callback(_Steps(self))

    # --- data, optimizer, schedule ---

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            self.optimizer = make_optimizer(model or self.model, self.settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = make_schedule(optimizer or self.optimizer, num_training_steps, self.settings)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    # --- loss ---

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Tensor]], device: torch.device) -> Tensor:
        """Labelled positions of the global batch."""
        count = torch.tensor(sum(len(batch["positions"]) for batch in batch_samples), device=device)
        self._step_names = [i for batch in batch_samples for i in batch["picked"].tolist()]
        return self.accelerator.gather(count).sum() if self.args.world_size > 1 else count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | None = None
    ) -> Any:
        batch = dict(inputs)
        picked = batch.pop("picked")
        sums = model(**batch)
        if not torch.isfinite(sums["loss"].detach()):
            self._refuse_step("loss", picked.tolist())
        self.meter.add(sums, len(batch["positions"]), batch["attention_mask"])
        assert num_items_in_batch is not None
        return sums["loss"] * (self.args.world_size / num_items_in_batch)  # DDP and FSDP average over processes

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP
        if not torch.isfinite(torch.as_tensor(norm)):
            self._refuse_step("gradient", self._step_names)
        return norm

    def _refuse_step(self, what: str, picked: list[int]) -> None:
        names = self.train_dataset.names(picked)
        shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
        raise UserError(
            f"The {what} is not finite at step {self.state.global_step + 1} of {self.state.max_steps}; the step was "
            f"not taken. The batch holds: {shown}. Lower the learning rate, or look at these rollouts."
        )

    # --- training states ---

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights only, tied matrices once."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = state_dict if state_dict is not None else self.model.state_dict()
        seen: set[tuple[int, int]] = set()
        distinct = {}
        for name, tensor in weights.items():
            key = (tensor.data_ptr(), tensor.numel())
            if key not in seen:
                seen.add(key)
                distinct[name] = tensor.contiguous()
        save_file(distinct, folder / "model.safetensors", metadata={"format": "pt"})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A state becomes valid with its marker; only then are older ones removed."""
        if self.state.global_step >= self.state.max_steps:
            return  # the finished model is about to be written
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        for path in folder.iterdir():
            sync_file(path)
        write_sealed(folder / COMPLETE, {"files": _digests(folder)})
        for other in folder.parent.glob("checkpoint-*"):
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing: the only missing keys are tied matrices, stored once."""

    @contextlib.contextmanager
    def sigterm_noted(self) -> Iterator[None]:
        """While open, SIGTERM asks for a saved state after the step in progress."""

        def note(number: int, frame: Any) -> None:
            self._stop_requested = True

        before = signal.signal(signal.SIGTERM, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop; all of them answer alike."""
        if self.args.world_size == 1:
            return self._stop_requested
        flag = torch.tensor(int(self._stop_requested), device=self.args.device)
        return bool(self.accelerator.gather(flag).any())


class _Steps(TrainerCallback):
    """After each step: a line now and then, and the wish to stop."""

    def __init__(self, trainer: ZipTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.meter.begin(state.global_step)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.learning_rate = self.trainer.optimizer.param_groups[0]["lr"]  # the schedule moves on before on_step_end

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if trainer.stop_requested():
            control.should_save = control.should_training_stop = True
        last = state.global_step >= state.max_steps
        if trainer.is_world_process_zero() and (last or trainer.meter.due()):
            report = trainer.meter.report(state.global_step, self.learning_rate)
            if trainer.args.report_to:
                trainer.log(report)


class Meter:
    """Sums of the loss's parts and tokens on this process since the last line; none is read in between."""

    def __init__(self, steps: int, name: str) -> None:
        self.steps, self.name = steps, name
        self.means: dict[str, float] = {}
        self.begin(0)

    def begin(self, step: int) -> None:
        self.started = self.last_line = time.monotonic()
        self.first_step = step
        self._clear()

    def _clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.positions = 0
        self.tokens: Tensor | int = 0

    def add(self, sums: Mapping[str, Tensor], positions: int, mask: Tensor) -> None:
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()
        self.positions += positions
        self.tokens = self.tokens + mask.sum()

    def due(self) -> bool:
        return time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES

    def report(self, step: int, learning_rate: float) -> dict[str, float]:
        """Print a line, and return its numbers for trackers."""
        now = time.monotonic()
        self.means = {name: float(value) / max(1, self.positions) for name, value in self.sums.items()}
        rate = int(self.tokens) / max(now - self.last_line, 1e-9)
        left = (now - self.started) / max(1, step - self.first_step) * (self.steps - step)
        parts = " ".join(f"{name} {value:.4f}" for name, value in self.means.items())
        print(
            f"{self.name}: step {step}/{self.steps} {parts} lr {learning_rate:.2e} {rate / 1000:.1f} ktok/s "
            f"{left:.0f} s left",
            file=sys.stderr,
            flush=True,
        )
        self.last_line = now
        self._clear()
        return {**self.means, "learning_rate": learning_rate, "tokens_per_second": rate}
