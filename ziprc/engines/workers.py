"""Work shared out among processes, each with an engine and GPUs of its own, or done in this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from typing import Any, TypeVar

from ziprc.errors import UserError

T = TypeVar("T")
Work = Callable[[str, Sequence[T]], None]  # of one process: its title, and what it has to do


def share_out(title: str, work: Work[T], items: Sequence[T], workers: int, tensor_parallel: int) -> None:
    """Have `work` done on all items by up to `workers` processes; the same one every time, since it starts an engine.

    With more than one, `work` and the items have to be picklable. UserError when a process has not ended well.
    """
    workers = min(workers, len(items))
    if workers == 1:
        work(title, items)
    elif workers > 1:
        names = [f"{title}, worker {i + 1} of {workers}" for i in range(workers)]
        jobs = [(name, work, items[i::workers]) for i, name in enumerate(names)]
        _run_workers(jobs, _device_groups(workers, tensor_parallel))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _worker(title: str, work: Work[Any], items: Sequence[Any]) -> None:
    """Body of a worker process; ends when its parent is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(title, items)
    except UserError as error:
        print(f"{title}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def _device_groups(workers: int, tensor_parallel: int) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of every worker; None on a machine without GPUs."""
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if not torch.cuda.device_count():
        return [None] * workers
    if len(devices) < workers * tensor_parallel:
        raise UserError(
            f"runtime.workers={workers} with runtime.tensor_parallel={tensor_parallel} need "
            f"{workers * tensor_parallel} GPUs, but {len(devices)} are visible. Lower one of the two "
            "keys, or ask for more GPUs."
        )
    return [",".join(devices[i * tensor_parallel : (i + 1) * tensor_parallel]) for i in range(workers)]


@contextlib.contextmanager
def _visible_devices(devices: str | None) -> Iterator[None]:
    """Set CUDA_VISIBLE_DEVICES for a process that is started inside: it has to be there before CUDA is touched."""
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        yield
    finally:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before


def _await(processes: Sequence[Any]) -> None:
    """Return when all have ended well; UserError as soon as one has not."""
    running = {process.sentinel: process for process in processes}
    while running:
        for sentinel in wait(list(running)):
            process = running.pop(sentinel)
            process.join()
            if process.exitcode != 0:
                raise UserError(
                    f"{process.name} died with exit code {process.exitcode}; the other workers were stopped. Its last "
                    "words are in this stage's log (-9 or 137 often means that memory ran out: lower runtime.workers, "
                    "runtime.max_num_seqs or runtime.kv_cache_gib). Finished pieces are kept: run the command again."
                )


def _run_workers(jobs: Sequence[tuple[str, Work[Any], Sequence[Any]]], device_groups: Sequence[str | None]) -> None:
    """One spawned process per job; none survives this call."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_worker, args=job, name=job[0]) for job in jobs]
    started = []
    try:
        for process, devices in zip(processes, device_groups, strict=True):
            with _visible_devices(devices):
                process.start()
            started.append(process)
        _await(started)
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
            process.join()
