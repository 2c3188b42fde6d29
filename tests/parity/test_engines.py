"""vLLM against plain Transformers on a random Qwen3: same tokens, same readings, no reserved row at any setting."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.doubles import small_qwen3, tight
from ziprc.config.base import Sampling
from ziprc.engines import start
from ziprc.engines.base import EngineSettings, Request, Response
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import JointHead
from ziprc.joint.readout import TokenPair, read_joint
from ziprc.joint.vocabulary import VocabLayout
from ziprc.tables.rollouts import FinishReason

pytest.importorskip("vllm")
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.engine.core import EngineCore
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcRequestState,
    build_custom_logits_processors,
)
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from ziprc.engines import vllm as module
from ziprc.engines.taps import Ban, ReadJoint
from ziprc.engines.vllm import ApplyTaps, VLLMEngine

TEXT, JOINT_ROWS, VOCAB = 352, 16, 384
STOPS = (5, 9)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    folder = small_qwen3(tmp_path_factory.mktemp("model"), VOCAB)
    head = JointHead(VocabLayout(VOCAB, TEXT, TEXT, JOINT_ROWS), BinGrid((0.0, 1.0), tuple(range(0, 72, 8))))
    return EngineSettings(
        folder, Sampling(min_p=0.02), STOPS, ((TEXT, VOCAB),), max_model_len=256, joint=head, max_num_seqs=64
    )


@pytest.fixture(scope="module")
def engines(settings: EngineSettings) -> Iterator[dict[str, VLLMEngine]]:
    """All engines of this module, held to the end: when one is closed or collected, every other of its process dies."""
    unmasked = replace(settings, banned=(), joint=None)
    every = {"usual": VLLMEngine(settings), "tight": tight(VLLMEngine)(settings), "unmasked": VLLMEngine(unmasked)}
    yield every
    for engine in every.values():
        engine.close()


@pytest.fixture(scope="module")
def vllm(engines: dict[str, VLLMEngine]) -> VLLMEngine:
    return engines["usual"]


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(10, TEXT, rng.integers(3, 60)).tolist()) for _ in range(150)]
    seeds, caps = rng.integers(2**62, size=150), rng.integers(4, 60, size=150)
    return [Request(str(i), prompts[i], int(seeds[i]), int(caps[i])) for i in range(150)]


@pytest.fixture(scope="module")
def sampled(vllm: VLLMEngine, requests: list[Request]) -> list[Response]:
    return vllm.generate(requests)


def long_requests(count: int, cap: int) -> list[Request]:
    rng = np.random.default_rng(1)
    return [Request(str(i), tuple(rng.integers(10, TEXT, 150).tolist()), i, cap) for i in range(count)]


def share_equal(a: list[Response], b: list[Response]) -> float:
    return float(np.mean([x.token_ids == y.token_ids for x, y in zip(a, b, strict=True)]))


def test_equal_seeds_give_equal_tokens_and_finish_reasons(
    settings: EngineSettings, requests: list[Request], sampled: list[Response]
) -> None:
    reference = start("hf", settings).generate(requests)
    assert [r.key for r in sampled] == [r.key for r in requests]
    assert share_equal(sampled, reference) >= 0.99
    for ours, theirs in zip(sampled, reference, strict=True):
        if ours.token_ids == theirs.token_ids:
            assert ours.finish_reason == theirs.finish_reason
            np.testing.assert_allclose(ours.joint, theirs.joint, atol=1e-5)
    assert {r.finish_reason for r in sampled} == {FinishReason.STOP, FinishReason.LENGTH}


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.0), Sampling(temperature=0.7, min_p=0.0, top_p=0.8),
     Sampling(min_p=0.1, top_k=5, top_p=0.9), Sampling(temperature=1.5, min_p=0.0, top_k=20)],
    ids=str,
)  # fmt: skip
def test_every_sampling_setting_means_the_same(
    settings: EngineSettings, vllm: VLLMEngine, requests: list[Request], sampling: Sampling
) -> None:
    few = requests[:60]
    reference = start("hf", replace(settings, sampling=sampling, joint=None)).generate(few)
    ours = vllm.generate([replace(request, sampling=sampling) for request in few])
    assert share_equal(ours, reference) >= 0.98  # 1 of 60


def test_requests_of_one_batch_can_differ_in_settings_and_stop_tokens(
    settings: EngineSettings, vllm: VLLMEngine, requests: list[Request], sampled: list[Response]
) -> None:
    kinds = (None, Sampling(temperature=0.0), Sampling(temperature=0.7, min_p=0.0, top_p=0.8))
    stops = ((), tuple(range(10, TEXT, 4)))
    mixed = [replace(q, sampling=kinds[i % 3], stop=stops[i % 2]) for i, q in enumerate(requests)]
    ours, theirs = vllm.generate(mixed), start("hf", settings).generate(mixed)
    assert share_equal(ours, theirs) >= 0.99
    assert [r.token_ids for r in ours[::6]] == [r.token_ids for r in sampled[::6]]  # these asked for nothing special
    assert np.mean([r.finish_reason is FinishReason.STOP for r in ours[1::2]]) > 0.5
    for response in ours[1::2]:
        assert not set(response.token_ids[:-1]) & {*stops[1], *STOPS}


def test_the_reading_equals_a_forward_pass_on_the_finished_text(
    settings: EngineSettings, requests: list[Request], sampled: list[Response]
) -> None:
    assert settings.joint is not None
    pairs = [TokenPair(q.prompt_token_ids, r.token_ids) for q, r in zip(requests, sampled, strict=True)]
    for i, joint in read_joint(load_model(settings.model), settings.joint, pairs):
        assert sampled[i].joint is not None
        np.testing.assert_allclose(sampled[i].joint, joint, atol=1e-5)


def test_stop_tokens_end_a_response_and_belong_to_it(requests: list[Request], sampled: list[Response]) -> None:
    for request, response in zip(requests, sampled, strict=True):
        assert not set(response.token_ids[:-1]) & set(STOPS)
        if response.finish_reason is FinishReason.STOP:
            assert response.token_ids[-1] in STOPS
        else:
            assert len(response.token_ids) == request.max_new_tokens


def test_a_call_does_not_depend_on_earlier_calls(
    vllm: VLLMEngine, requests: list[Request], sampled: list[Response]
) -> None:
    vllm.generate(requests[40:90])
    for first, again in zip(sampled, vllm.generate(requests), strict=True):
        assert first.token_ids == again.token_ids
        np.testing.assert_array_equal(first.joint, again.joint)


def test_prompts_beyond_one_forward_pass_are_sampled_with_their_seeds(
    settings: EngineSettings, vllm: VLLMEngine
) -> None:
    requests = long_requests(100, cap=4)  # 15,000 prompt tokens; chunked prefill would crash on a CPU generator
    reference = start("hf", settings).generate(requests)
    assert share_equal(vllm.generate(requests), reference) >= 0.99


def test_preempted_requests_give_the_same_tokens_and_readings(
    engines: dict[str, VLLMEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = engines["tight"].llm.llm_engine.engine_core.engine_core.scheduler
    preempt, preempted = scheduler._preempt_request, []

    def counted(request: Any, *rest: Any, **options: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *rest, **options)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    requests = long_requests(20, cap=60)  # 7 blocks each in the end, 40 in all
    free, squeezed = engines["usual"].generate(requests), engines["tight"].generate(requests)
    assert preempted
    for a, b in zip(free, squeezed, strict=True):
        assert a.token_ids == b.token_ids
        np.testing.assert_allclose(a.joint, b.joint, atol=1e-5)


def test_a_head_size_that_the_cpu_kernel_lacks_is_refused(settings: EngineSettings, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"head_dim": 16, "max_position_embeddings": 512}')
    if torch.cuda.is_available():
        pytest.skip("a limit of the CPU backend")
    with pytest.raises(UserError, match=r"heads of 16 dimensions.*32, 64"):
        start("vllm", replace(settings, model=tmp_path))


def test_reserved_rows_are_never_sampled(engines: dict[str, VLLMEngine]) -> None:
    hot = Sampling(temperature=2.0, min_p=0.0)
    rng = np.random.default_rng(2)
    requests = [Request(str(i), (int(rng.integers(10, TEXT)),), i, 210, hot) for i in range(900)]

    def tokens(engine: str, count: int) -> np.ndarray:
        return np.concatenate([r.token_ids for r in engines[engine].generate(requests[:count])])

    masked = tokens("usual", 900)
    assert len(masked) >= 100_000  # some responses stop early
    assert masked.max() < TEXT
    assert (tokens("unmasked", 25) >= TEXT).sum() > 50  # the same settings do sample them when nothing bans them


# --- vLLM's two model runners ---------------------------------------------------------------------------------------


def ours(number: int | None) -> SamplingParams:
    """At temperature 1 and nothing cut, so that the second runner's sampler needs no kernel before it draws."""
    return SamplingParams(extra_args=None if number is None else {"ziprc_request": number})


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> VllmConfig:
    """For processors of an engine -1, whose taps are a reader and a ban."""
    joint = slice(TEXT, TEXT + JOINT_ROWS)
    monkeypatch.setitem(module._taps, -1, [ReadJoint(joint), Ban([(TEXT, VOCAB)])])
    return VllmConfig(additional_config={"ziprc": {"engine": -1, "banned": [[TEXT, VOCAB]]}})


@pytest.fixture
def second_runner(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> tuple[RequestState, Sampler]:
    """What the second runner keeps of its requests, and its sampler with our processor, built as the runner builds them."""
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)  # no memory is pinned without a GPU
    requests = RequestState(8, 64, 64, 0, VOCAB, torch.device("cpu"))
    own = build_custom_logits_processors(config, requests, False, [ApplyTaps])
    sampler = Sampler(config, 8, VOCAB, torch.device("cpu"), requests, custom_logits_processors=own)
    return requests, sampler


def context(slots: list[int], known: list[int]) -> LogitsContext:
    """Batch position → slot, and the tokens that the state of each knows."""
    index, pos = torch.tensor(slots), torch.tensor(known) - 1
    zeros = torch.zeros(len(slots), dtype=torch.int64)
    return LogitsContext(index, index, index.numpy(), zeros, zeros, pos, np.array(known, dtype=np.int32))


def test_both_runners_read_and_ban_the_same(config: VllmConfig, second_runner: tuple[RequestState, Sampler]) -> None:
    """Requests 0, 1 and 2 and one that is not ours, in rows of different order."""
    out: dict[int | None, list[int]] = {0: [], 1: [9] * 4, 2: [9] * 7, None: [9]}
    said = dict(zip(out, torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0)), strict=True))
    reader = module._taps[-1][0]
    assert isinstance(reader, ReadJoint)

    def read() -> dict[Any, bytes]:
        joint = dict(zip(reader.places, (row.numpy().tobytes() for row in torch.cat(reader._waiting)), strict=True))
        reader.places.clear()
        reader._waiting.clear()
        return joint

    first = ApplyTaps(config, torch.device("cpu"), False)
    added = [(row, ours(number), [5], out[number]) for row, number in enumerate((None, 2, 0))]
    first.update_state(BatchUpdate(3, removed=[], added=added, moved=[]))
    moved = [(0, 1, MoveDirectionality.SWAP)]
    first.update_state(BatchUpdate(4, removed=[], added=[(3, ours(1), [5], out[1])], moved=moved))
    order = [2, None, 0, 1]
    by_first = dict(zip(order, first.apply(torch.stack([said[n] for n in order])), strict=True))
    read_by_first = read()
    assert list(read_by_first) == [(2, 7), (0, 0), (1, 4)]

    requests, sampler = second_runner
    slots = {}
    for number, tokens in out.items():
        requests.add_request(str(number), 5, [5] * 5 + tokens, 0, 20)
        slots[number] = requests.req_id_to_index[str(number)]
        sampler.add_request(slots[number], ours(number))
    order = [1, 0, None, 2]
    ctx = context([slots[n] for n in order], [5 + len(out[n]) for n in order])
    processed = sampler.apply_sampling_params(
        torch.stack([said[n] for n in order]), ctx.expanded_idx_mapping, ctx.idx_mapping, ctx.idx_mapping_np, ctx.pos,
        ctx.input_ids, ctx.expanded_local_pos, ctx.seq_lens_upper_bound_np,
    )  # fmt: skip
    assert read() == read_by_first
    for number, row in zip(order, processed, strict=True):
        assert torch.equal(row, by_first[number])
        assert torch.equal(row[:TEXT], said[number][:TEXT])
        assert torch.isneginf(row[TEXT:]).all() if number is not None else torch.equal(row, said[None])


def test_a_slot_forgets_its_last_request(second_runner: tuple[RequestState, Sampler]) -> None:
    requests, sampler = second_runner
    own = sampler.logits_processors[-1]
    assert isinstance(own, ApplyTaps)
    requests.add_request("a", 3, [5, 5, 5], 0, 20)
    slot = requests.req_id_to_index["a"]
    assert own.add_request(slot, ours(0))
    assert torch.isneginf(own.apply(torch.zeros(1, VOCAB), context([slot], [3]))[0, TEXT:]).all()
    assert not own.add_request(slot, ours(None))
    assert not own.apply(torch.zeros(1, VOCAB), context([slot], [3])).any()


def test_a_part_of_a_prompt_is_read_under_another_name(second_runner: tuple[RequestState, Sampler]) -> None:
    requests, sampler = second_runner
    own = sampler.logits_processors[-1]
    requests.add_request("a", 9, [5] * 9, 0, 20)
    slot = requests.req_id_to_index["a"]
    own.add_request(slot, ours(0))
    own.apply(torch.zeros(1, VOCAB), context([slot], [4]))
    own.apply(torch.zeros(1, VOCAB), context([slot], [9]))
    assert module._taps[-1][0].places == [(0, -5), (0, 0)]  # type: ignore[attr-defined]


def test_a_processor_that_finds_no_taps_still_bans(config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(module._taps, -1)  # as in a tensor-parallel worker, whose process has none
    worker = ApplyTaps(config, torch.device("cpu"), False)
    worker.update_state(BatchUpdate(1, removed=[], added=[(0, ours(0), [5], [])], moved=[]))
    banned = worker.apply(torch.zeros(1, VOCAB))
    assert torch.isneginf(banned[:, TEXT:]).all() and not banned[:, :TEXT].any()


def test_vllm_still_has_what_we_use_of_its_inside(vllm: VLLMEngine) -> None:
    """Names that are no part of its interface; tests of what they do are above and in test_sessions."""
    engine = vllm.llm.llm_engine
    core = engine.engine_core.engine_core
    assert isinstance(core, EngineCore) and hasattr(core, "batch_queue")
    assert "internal" in inspect.signature(engine.abort_request).parameters
    for owner, name in ((engine.engine_core, "get_output"), (engine.engine_core, "shutdown"),
                        (engine.output_processor, "process_outputs"), (core.scheduler, "_preempt_request")):  # fmt: skip
        assert callable(getattr(owner, name)), name
    assert {"new_token_ids", "finish_reason", "prefill_stats"} <= set(EngineCoreOutput.__struct_fields__)
    assert list(inspect.signature(process_dict_updates).parameters) == ["req_entries", "batch_update", "new_state"]
    assert {"idx_mapping_np", "seq_lens_upper_bound_np"} <= set(LogitsContext.__dataclass_fields__)
    assert "prompt_len" in LogitsProcRequestState.__dataclass_fields__
