"""Rollouts in shards: fixed chunks of requests that go through an engine, in this process or in several, and are kept.

A shard starts from a drained engine with an empty prefix cache, and its seeds come from outside, so its bytes depend
neither on earlier shards nor on the number of workers. Each is written atomically under a name that holds the digest of
all that its content follows from: after a kill the finished ones are kept, and stale ones are never read.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ziprc.engines import start
from ziprc.engines.base import Engine, EngineSettings, OnTokens, Request, Response
from ziprc.errors import UserError
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.progress import progress
from ziprc.store.digests import digest_json
from ziprc.store.layout import manifest_of
from ziprc.store.manifest import require_intact, write_manifest
from ziprc.tables.rollouts import ROLLOUTS, FinishReason

ID_LENGTH = 24


@dataclass(frozen=True)
class Wanted:
    """One rollout to be made."""

    prompt_id: str
    thinking: bool
    sample_index: int
    seed: int
    prompt: tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """Rollouts that are made in one call of the engine, and the file that keeps them."""

    path: Path
    wanted: tuple[Wanted, ...]


@dataclass(frozen=True)
class Job:
    """What one engine process has to do."""

    title: str
    kind: str
    settings: EngineSettings
    policy: str
    max_new_tokens: int
    shards: tuple[Shard, ...]


def shards_of(wanted: Sequence[Sequence[Wanted]], prompts_per_shard: int, folder: Path, digest: str) -> list[Shard]:
    """Fixed chunks of prompts. The file name holds the digest of all that the content follows from."""
    shards = []
    for number, first in enumerate(range(0, len(wanted), prompts_per_shard)):
        chunk = tuple(itertools.chain.from_iterable(wanted[first : first + prompts_per_shard]))
        own = digest_json([digest, prompts_per_shard, number])[:ID_LENGTH]
        shards.append(Shard(folder / f"{number:05d}-{own}.parquet", chunk))
    return shards


def drop_stale(folder: Path, shards: Sequence[Shard]) -> None:
    """Make the folder of the shards and drop from it what belongs to other inputs, is unfinished, or is damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {path for shard in shards if _is_whole(shard) for path in (shard.path, manifest_of(shard.path))}
    for found in folder.iterdir():
        if found not in kept:
            found.unlink()


def _is_whole(shard: Shard) -> bool:
    if not manifest_of(shard.path).exists():
        return False
    try:
        require_intact(shard.path)
    except UserError:
        print(f"{shard.path} is damaged and is made again", file=sys.stderr, flush=True)
        return False
    return True


# --- one process: engine, shards ------------------------------------------------------------------------------------


def _rollout_id(wanted: Wanted, policy: str) -> str:
    content = [wanted.prompt_id, policy, wanted.thinking, wanted.sample_index, wanted.seed]
    return digest_json(content)[:ID_LENGTH]


def _texts(responses: Sequence[Response], tokenizer: Any) -> list[str]:
    """Responses as text: special tokens kept, the stop token left out."""
    ids = [r.token_ids[:-1] if r.finish_reason is FinishReason.STOP else r.token_ids for r in responses]
    return tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _token_lists(lists: Sequence[Sequence[int]]) -> pa.LargeListArray:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in lists])]).astype(np.int64)
    values = np.fromiter(itertools.chain.from_iterable(lists), dtype=np.int32, count=int(offsets[-1]))
    return pa.LargeListArray.from_arrays(offsets, values)


def rollout_table(wanted: Sequence[Wanted], responses: Sequence[Response], policy: str, tokenizer: Any) -> pa.Table:
    """Columns of the rollouts table, in the order wanted."""
    return ROLLOUTS.make(
        {
            "rollout_id": [_rollout_id(w, policy) for w in wanted],
            "prompt_id": [w.prompt_id for w in wanted],
            "sample_index": [w.sample_index for w in wanted],
            "seed": [w.seed for w in wanted],
            "prompt_token_ids": _token_lists([w.prompt for w in wanted]),
            "response_token_ids": _token_lists([r.token_ids for r in responses]),
            "response_text": _texts(responses, tokenizer),
            "finish_reason": [r.finish_reason.value for r in responses],
            "thinking": [w.thinking for w in wanted],
            "policy": [policy] * len(wanted),
        }
    )


def _make_shard(engine: Engine, shard: Shard, job: Job, tokenizer: Any, on_tokens: OnTokens) -> None:
    requests = [Request(_rollout_id(w, job.policy), w.prompt, w.seed, job.max_new_tokens) for w in shard.wanted]
    responses = engine.generate(requests, on_tokens)
    ROLLOUTS.write(shard.path, rollout_table(shard.wanted, responses, job.policy, tokenizer))
    write_manifest(shard.path, {}, {})


def _run_job(job: Job) -> None:
    """Start an engine and make the shards one after the other."""
    tokenizer = load_tokenizer(job.settings.model)
    most = sum(len(shard.wanted) for shard in job.shards) * job.max_new_tokens
    with contextlib.closing(start(job.kind, job.settings)) as engine, progress(most, job.title, "tok") as bar:

        def on_tokens(tokens: int) -> None:
            bar.total -= job.max_new_tokens - tokens  # what this response did not use
            bar.update(tokens)

        for shard in job.shards:
            _make_shard(engine, shard, job, tokenizer, on_tokens)


# --- several processes ----------------------------------------------------------------------------------------------


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _worker(job: Job) -> None:
    """Body of a worker process; ends when its parent is killed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        _run_job(job)
    except UserError as error:
        print(f"{job.title}: {error}", file=sys.stderr, flush=True)
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
                    "runtime.max_num_seqs or runtime.kv_cache_gib). Finished shards are kept: run the command again."
                )


def _run_workers(jobs: Sequence[Job], device_groups: Sequence[str | None]) -> None:
    """One spawned process per job; none survives this call."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_worker, args=(job,), name=job.title) for job in jobs]
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


def make_shards(
    shards: Sequence[Shard],
    title: str,
    kind: str,
    workers: int,
    settings: EngineSettings,
    policy: str,
    max_new_tokens: int,
) -> None:
    """Make the shards that are not there yet, in this process or in up to `workers` of them."""
    missing = [shard for shard in shards if not manifest_of(shard.path).exists()]
    workers = min(workers, len(missing))
    names = [title] if workers == 1 else [f"{title}, worker {i + 1} of {workers}" for i in range(workers)]
    jobs = [
        Job(name, kind, settings, policy, max_new_tokens, tuple(missing[i::workers])) for i, name in enumerate(names)
    ]
    if workers == 1:
        _run_job(jobs[0])
    elif workers > 1:
        _run_workers(jobs, _device_groups(workers, settings.tensor_parallel))
