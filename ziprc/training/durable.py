"""What every trainer of the project shares: a run that a kill cannot spoil, and that stops before a bad step.

`Durable` stands before `transformers.Trainer`, or a trainer of TRL, in a class's bases. It brings our optimizers and
schedules, training states that count once they are complete and of which the last is kept (`resume`), SIGTERM and Ctrl-C
that save one and leave, and an error before a step whose gradient is not finite, which names what the batch holds.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PrinterCallback, Trainer

from ziprc.config.base import Optimisation, Runtime
from ziprc.errors import Stopped, UserError
from ziprc.processor import native_bfloat16
from ziprc.training import resume
from ziprc.training.optimizers import make_optimizer, schedule_factor


def machine_arguments(runtime: Runtime, folder: Path, seed: int, max_grad_norm: float) -> dict[str, Any]:
    """Training arguments that follow from the machine: devices, precision, trackers, where states are kept."""
    on_gpu, processes = torch.cuda.is_available(), resume.world_size()
    if runtime.bf16 and not on_gpu and not native_bfloat16():
        print("runtime.bf16=true: without bf16 instructions this processor is faster with false", file=sys.stderr)
    return {
        "output_dir": str(folder), "seed": seed % 2**32, "max_grad_norm": max_grad_norm, "bf16": runtime.bf16,
        "use_cpu": not on_gpu, "dataloader_pin_memory": on_gpu, "remove_unused_columns": False,
        "ddp_find_unused_parameters": False, "ddp_backend": None if on_gpu or processes == 1 else "gloo",
        "report_to": list(runtime.trackers) or "none", "run_name": resume.run_name(folder), "logging_strategy": "no",
        "logging_nan_inf_filter": False, "disable_tqdm": True,
    }  # fmt: skip


def train_to_the_end(trainer: Any, folder: Path) -> Mapping[str, Tensor] | None:
    """Train, going on from the last training state in `folder` if there is one; under FSDP, the whole weights at the end.

    Several processes come out of it together, and have parted: none can talk to another afterwards.
    Raises UserError for a loss or gradient that is not finite, and Stopped after SIGTERM or Ctrl-C, when the state is saved.
    """
    steps, main = trainer.args.max_steps, trainer.is_world_process_zero()
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
    if resume.world_size() > 1:  # nobody may end, or remove the states, while another process is still in train()
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
    return gathered


class Durable(Trainer):
    """See the head of this file; `section` is named in errors. Call `settle` at the end of the constructor."""

    def settle(self, optimisation: Optimisation, section: str) -> None:
        """Take our settings. UserError for an optimizer that cannot work on sharded weights."""
        if optimisation.optimizer == "muon" and self.is_fsdp_enabled:
            raise UserError(
                f"Muon needs whole matrices and cannot train sharded ones. Set {section}'s optimizer to adamw, or use a "
                "launch profile without FSDP (runtime.accelerate)."
            )
        self.optimisation = optimisation
        self.stopped_by = 0  # the signal on which all processes stop
        self.signalled = 0  # the first that this one has had
        self.remove_callback(PrinterCallback)

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

    def _clip_grad_norm(self, model: Any) -> Any:
        norm = super()._clip_grad_norm(model)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP
        if not torch.isfinite(torch.as_tensor(norm)):
            self.refuse_step("gradient", self.step_names())
        return norm

    def step_names(self) -> Sequence[str]:
        """What the step in progress learns from, for errors."""
        raise NotImplementedError

    def refuse_step(self, what: str, names: Sequence[str]) -> None:
        """Raise the UserError of a step that is not taken."""
        shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
        raise UserError(
            f"The {what} is not finite at step {self.state.global_step + 1} of {self.state.max_steps}; the step was "
            f"not taken. The batch holds: {shown}. Lower the learning rate, or look at these."
        )

    def agree(self, wanted: int) -> int:
        """What any process wants (the largest), after all have agreed on the signal to stop at."""
        self.stopped_by = self.signalled
        if self.args.world_size > 1:  # what one process wants, all do
            flags = torch.tensor([[self.signalled, wanted]], device=self.args.device)
            self.stopped_by, wanted = self.accelerator.gather(flags).amax(0).tolist()
        return wanted

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Weights only, tied matrices once, by their first name."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        weights = state_dict if state_dict is not None else self.model.state_dict()
        save_file(distinct(weights), folder / "model.safetensors", metadata={"format": "pt"})

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """None after the last step: the finished model is about to be written."""
        if self.state.global_step >= self.state.max_steps:
            return
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            state = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            self.complete_state(state)
            resume.complete(state)

    def complete_state(self, state: Path) -> None:
        """Add what else the run goes on from; called by the main process before the state counts."""

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing: the only missing keys are tied matrices, stored once."""

    def note(self, number: int, frame: Any) -> None:
        """A signal asks for a saved state after the step in progress."""
        self.signalled = self.signalled or number


def distinct(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor once, by its first name."""
    names = {(tensor.data_ptr(), tensor.numel()): name for name, tensor in reversed(weights.items())}
    return {name: weights[name].contiguous() for name in names.values()}
