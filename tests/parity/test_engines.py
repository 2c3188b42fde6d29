"""vLLM against plain Transformers on a random Qwen3: same tokens, same readings, no reserved row at any setting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.doubles import small_qwen3, tight
from ziprc.config.base import Sampling
from ziprc.engines.base import EngineSettings, Request, Response, make_engine
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import JointHead, load_model
from ziprc.joint.readout import TokenPair, read_joint
from ziprc.joint.vocabulary import VocabLayout
from ziprc.tables.rollouts import FinishReason

pytest.importorskip("vllm")
from ziprc.engines.vllm import Readout, VLLMEngine

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


def sampled_with(engine: VLLMEngine, sampling: Sampling, requests: list[Request]) -> list[Response]:
    """Generate under other sampling settings; they travel with each request."""
    before, engine.settings = engine.settings, replace(engine.settings, sampling=sampling)
    try:
        return engine.generate(requests)
    finally:
        engine.settings = before


def test_equal_seeds_give_equal_tokens_and_finish_reasons(
    settings: EngineSettings, requests: list[Request], sampled: list[Response]
) -> None:
    reference = make_engine("hf", settings).generate(requests)
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
    reference = make_engine("hf", replace(settings, sampling=sampling, joint=None)).generate(few)
    assert share_equal(sampled_with(vllm, sampling, few), reference) >= 0.98  # 1 of 60


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
    reference = make_engine("hf", settings).generate(requests)
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
        make_engine("vllm", replace(settings, model=tmp_path))


def test_the_later_reading_of_a_position_counts() -> None:
    readout = Readout(slice(0, 1))
    readout.add([(0, 0), (1, 0)], torch.tensor([[0.1], [0.2]]))
    readout.add([(0, 0)], torch.tensor([[0.3]]))  # computed again
    readout.add([(1, 1), (0, 1)], torch.tensor([[0.4], [0.5]]))
    readout.add([(0, 2)], torch.tensor([[0.6]]))  # under way when request 0 stopped
    first, second = readout.by_request([2, 2])
    np.testing.assert_allclose(first[:, 0], [0.3, 0.5])
    np.testing.assert_allclose(second[:, 0], [0.2, 0.4])


def test_reserved_rows_are_never_sampled(engines: dict[str, VLLMEngine]) -> None:
    hot = Sampling(temperature=2.0, min_p=0.0)
    rng = np.random.default_rng(2)
    requests = [Request(str(i), (int(rng.integers(10, TEXT)),), i, 210) for i in range(900)]

    def tokens(engine: str, count: int) -> np.ndarray:
        return np.concatenate([r.token_ids for r in sampled_with(engines[engine], hot, requests[:count])])

    masked = tokens("usual", 900)
    assert len(masked) >= 100_000  # some responses stop early
    assert masked.max() < TEXT
    assert (tokens("unmasked", 25) >= TEXT).sum() > 50  # the same settings do sample them when nothing bans them
