"""Live control: vLLM's session against `generate`, against the reference session, and against forward passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.doubles import small_qwen3, tight
from ziprc.config.base import Sampling
from ziprc.engines import start
from ziprc.engines.base import Engine, EngineSettings, Request, Session, Step
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import JointHead
from ziprc.joint.readout import TokenPair, read_joint
from ziprc.joint.vocabulary import VocabLayout
from ziprc.reading.logits import token_scores
from ziprc.tables.rollouts import FinishReason

pytest.importorskip("vllm")
from ziprc.engines.vllm import BLOCK_TOKENS, VLLMEngine

TEXT, JOINT_ROWS, VOCAB = 352, 16, 384
SEATS = 24  # fewer than the requests, so that some wait
JOINT_TOLERANCE, SCORE_TOLERANCE = 1e-5, 1e-4  # float32, sums in another order; scores are up to 10 nats


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    folder = small_qwen3(tmp_path_factory.mktemp("model"), VOCAB)
    head = JointHead(VocabLayout(VOCAB, TEXT, TEXT, JOINT_ROWS), BinGrid((0.0, 1.0), tuple(range(0, 72, 8))))
    sampling = Sampling(temperature=0.8, min_p=0.02)  # so that tempered or filtered scores would differ
    return EngineSettings(folder, sampling, (5, 9), ((TEXT, VOCAB),), max_model_len=256, joint=head, max_num_seqs=SEATS)


@pytest.fixture(scope="module")
def engines(settings: EngineSettings) -> Iterator[dict[str, Engine]]:
    """All engines of this module, held to the end: when a vLLM engine is closed, every other of its process dies."""
    every: dict[str, Engine] = {
        "vllm": VLLMEngine(settings),
        "tight": tight(VLLMEngine)(settings),
        "no joint": VLLMEngine(replace(settings, joint=None)),
        "hf": start("hf", settings),
    }
    yield every
    for engine in every.values():
        engine.close()


@pytest.fixture
def session(engines: dict[str, Engine]) -> Iterator[Session]:
    session = engines["vllm"].session()
    yield session
    session.close()


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(10, TEXT, rng.integers(3, 60)).tolist()) for _ in range(60)]
    return [Request(f"r{i}", p, int(rng.integers(2**62)), int(rng.integers(4, 60))) for i, p in enumerate(prompts)]


@dataclass
class Heard:
    """All rows of one request, in the order in which they came."""

    token_ids: tuple[int, ...]
    position: list[int]
    finish: list[FinishReason | None]
    joint: np.ndarray | None  # [m, R·L]
    log_prob: np.ndarray  # [m]
    entropy: np.ndarray  # [m]
    cached: list[int]


def by_key(steps: Sequence[Step]) -> dict[str, Heard]:
    rows: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    for s in steps:
        assert len(set(s.keys)) == len(s.keys)
        joint = [None] * len(s.keys) if s.joint is None else s.joint
        for i, row in enumerate(
            zip(s.token_ids.tolist(), s.position.tolist(), s.finish, joint, s.log_prob, s.entropy, s.cached.tolist(),
                strict=True)
        ):  # fmt: skip
            rows[s.keys[i]].append(row)
    heard = {}
    for key, many in rows.items():
        token_ids, position, finish, joint, log_prob, entropy, cached = zip(*many, strict=True)
        heard[key] = Heard(
            token_ids,
            list(position),
            list(finish),
            None if joint[0] is None else np.stack(joint),
            np.array(log_prob),
            np.array(entropy),
            list(cached),
        )
    return heard


def drained(session: Session, steps: int | None = None) -> list[Step]:
    """Step to the end, or `steps` times."""
    seen: list[Step] = []
    while steps is None or len(seen) < steps:
        step = session.step()
        if step is None:
            break
        seen.append(step)
    return seen


def whole(engine: Engine, requests: Sequence[Request]) -> dict[str, Heard]:
    session = engine.session()
    try:
        for request in requests:
            session.add(request)
        return by_key(drained(session))
    finally:
        session.close()


@pytest.fixture(scope="module")
def heard(engines: dict[str, Engine], requests: list[Request]) -> dict[str, Heard]:
    return whole(engines["vllm"], requests)


def pairs_of(requests: Sequence[Request], heard: Mapping[str, Heard]) -> list[TokenPair]:
    return [TokenPair(q.prompt_token_ids, heard[q.key].token_ids) for q in requests]


# --- what a session says --------------------------------------------------------------------------------------------


def test_a_session_samples_what_generate_samples(
    engines: dict[str, Engine], requests: list[Request], heard: dict[str, Heard]
) -> None:
    for response in engines["vllm"].generate(requests):
        assert heard[response.key].token_ids == response.token_ids
        assert heard[response.key].finish[-1] == response.finish_reason
        np.testing.assert_allclose(heard[response.key].joint, response.joint, atol=JOINT_TOLERANCE)


def test_the_reference_says_the_same(
    engines: dict[str, Engine], requests: list[Request], heard: dict[str, Heard]
) -> None:
    reference = whole(engines["hf"], requests)
    same = [q.key for q in requests if reference[q.key].token_ids == heard[q.key].token_ids]
    assert len(same) >= len(requests) - 1  # a draw can be as close as a rounding error
    for key in same:
        ours, theirs = heard[key], reference[key]
        assert (ours.position, ours.finish) == (theirs.position, theirs.finish)
        np.testing.assert_allclose(ours.joint, theirs.joint, atol=JOINT_TOLERANCE)
        np.testing.assert_allclose(ours.log_prob, theirs.log_prob, atol=SCORE_TOLERANCE)
        np.testing.assert_allclose(ours.entropy, theirs.entropy, atol=SCORE_TOLERANCE)


def test_every_position_comes_once_and_in_order(requests: list[Request], heard: dict[str, Heard]) -> None:
    assert set(heard) == {q.key for q in requests} and len(requests) > 2 * SEATS
    for request in requests:
        own = heard[request.key]
        assert own.position == list(range(len(own.token_ids)))
        assert own.finish[-1] is not None and not any(own.finish[:-1])
        assert own.finish[-1] is FinishReason.STOP or len(own.token_ids) == request.max_new_tokens
    assert {own.finish[-1] for own in heard.values()} == {FinishReason.STOP, FinishReason.LENGTH}


def test_scores_equal_a_forward_pass_on_the_finished_text(
    settings: EngineSettings, requests: list[Request], heard: dict[str, Heard]
) -> None:
    assert settings.joint is not None
    model, pairs = load_model(settings.model), pairs_of(requests, heard)
    for batch in token_scores(model, TEXT, pairs, token_budget=8192, chunk=512):
        for i, _, log_prob, entropy in zip(*batch, strict=True):
            own = heard[requests[i].key]
            assert own.log_prob[0] == 0
            np.testing.assert_allclose(own.log_prob[1:], log_prob[:-1], atol=SCORE_TOLERANCE)
            np.testing.assert_allclose(own.entropy, entropy, atol=SCORE_TOLERANCE)
    for i, joint in read_joint(model, settings.joint, pairs):
        np.testing.assert_allclose(heard[requests[i].key].joint, joint, atol=JOINT_TOLERANCE)


def test_a_step_has_the_promised_types(session: Session, requests: list[Request]) -> None:
    for request in requests[:3]:
        session.add(request)
    step = session.step()
    assert step is not None and sorted(step.keys) == ["r0", "r1", "r2"]
    assert step.token_ids.dtype == step.position.dtype == step.cached.dtype == np.int32
    assert step.joint.dtype == step.log_prob.dtype == step.entropy.dtype == np.float32
    assert step.joint.shape == (3, JOINT_ROWS)
    np.testing.assert_allclose(step.joint.sum(-1), 1, atol=1e-5)


def test_without_a_head_a_session_says_the_same_but_for_the_joint(
    engines: dict[str, Engine], settings: EngineSettings, requests: list[Request], heard: dict[str, Heard]
) -> None:
    for engine in (engines["no joint"], start("hf", replace(settings, joint=None))):
        bare = whole(engine, requests)
        same = [key for key, own in bare.items() if own.token_ids == heard[key].token_ids]
        assert len(same) >= len(requests) - 1  # a draw can be as close as a rounding error
        for key in same:
            assert bare[key].joint is None and bare[key].position == heard[key].position
            np.testing.assert_allclose(bare[key].log_prob, heard[key].log_prob, atol=SCORE_TOLERANCE)
            np.testing.assert_allclose(bare[key].entropy, heard[key].entropy, atol=SCORE_TOLERANCE)


# --- coming and going -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "hf"])
def test_who_is_aborted_is_silent_and_the_others_do_not_notice(
    engines: dict[str, Engine], requests: list[Request], heard: dict[str, Heard], kind: str
) -> None:
    session = engines[kind].session()
    for request in requests:
        session.add(request)
    before = drained(session, 3)
    gone = {q.key for i, q in enumerate(requests) if i % 3 == 0}  # some decode, some wait for a seat, some have ended
    assert gone & set(before[-1].keys) and gone - {key for step in before for key in step.keys}
    session.abort([*gone, "never heard of"])
    after = drained(session)
    session.close()
    assert not gone & {key for step in after for key in step.keys}
    rest = by_key([*before, *after])
    for request in requests:
        if request.key not in gone:
            assert rest[request.key].token_ids == heard[request.key].token_ids
            assert rest[request.key].position == heard[request.key].position


def test_aborting_everybody_ends_the_session_and_frees_the_memory(
    engines: dict[str, Engine], session: Session, requests: list[Request]
) -> None:
    for request in requests:
        session.add(request)
    drained(session, 2)
    session.abort([q.key for q in requests])
    assert session.step() is None
    pool = engines["vllm"].llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool  # type: ignore[attr-defined]
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # block 0 is vLLM's own null block


def test_requests_can_join_at_any_step(
    engines: dict[str, Engine], session: Session, requests: list[Request], heard: dict[str, Heard]
) -> None:
    steps: list[Step] = []
    for first in range(0, 40, 5):
        for request in requests[first : first + 5]:
            session.add(request)
        steps += drained(session, 2)
    late = by_key(steps + drained(session))
    for request in requests[:40]:
        assert late[request.key].token_ids == heard[request.key].token_ids
        assert late[request.key].position == heard[request.key].position
        np.testing.assert_allclose(late[request.key].log_prob, heard[request.key].log_prob, atol=SCORE_TOLERANCE)


def test_a_key_can_come_back_after_its_request_has_gone(
    session: Session, requests: list[Request], heard: dict[str, Heard]
) -> None:
    request = requests[0]
    session.add(request)
    session.add(replace(requests[1], max_new_tokens=50))
    drained(session, 2)
    session.abort([request.key])
    session.add(request)
    again = by_key(drained(session))[request.key]
    assert (again.token_ids, again.position) == (heard[request.key].token_ids, heard[request.key].position)


def longest(requests: Sequence[Request], heard: Mapping[str, Heard]) -> Request:
    return max(requests, key=lambda q: len(heard[q.key].token_ids))


def test_a_branch_starts_in_the_state_of_its_parent(
    session: Session, requests: list[Request], heard: dict[str, Heard]
) -> None:
    parent = longest(requests, heard)
    others = [q for q in requests if q is not parent][:8]
    for request in [parent, *others]:
        session.add(request)
    so_far = by_key(drained(session, 50))[parent.key]
    assert len(so_far.token_ids) == 50 and so_far.finish[-1] is None, "no response is long enough for this test"
    for kept in (30, 49):
        prefix = (*parent.prompt_token_ids, *so_far.token_ids[:kept])
        session.add(Request(f"branch {kept}", prefix, kept, 10))
    rest = by_key(drained(session))
    assert so_far.token_ids + rest[parent.key].token_ids == heard[parent.key].token_ids
    for kept in (30, 49):
        branch, length = rest[f"branch {kept}"], len(parent.prompt_token_ids) + kept
        np.testing.assert_allclose(branch.joint[0], so_far.joint[kept], atol=JOINT_TOLERANCE)
        np.testing.assert_allclose(branch.entropy[0], so_far.entropy[kept], atol=SCORE_TOLERANCE)
        assert branch.position[0] == 0 and branch.log_prob[0] == 0
        assert branch.cached[0] == cached_of(length) > 0


def cached_of(length: int) -> int:
    """Whole blocks, and never the last token: its state has to be computed."""
    return (length - 1) // BLOCK_TOKENS * BLOCK_TOKENS


def test_an_aborted_response_can_be_resumed_from_the_cache(
    session: Session, requests: list[Request], heard: dict[str, Heard]
) -> None:
    paused = longest(requests, heard)
    for request in [paused, *(q for q in requests[:5] if q is not paused)]:
        session.add(request)
    kept = by_key(drained(session, 40))[paused.key].token_ids
    session.abort([paused.key])
    drained(session, 3)
    session.add(replace(paused, prompt_token_ids=(*paused.prompt_token_ids, *kept), max_new_tokens=10))
    resumed = by_key(drained(session))[paused.key]
    assert resumed.cached[0] == cached_of(len(paused.prompt_token_ids) + 40) > 0
    np.testing.assert_allclose(resumed.joint[0], heard[paused.key].joint[40], atol=JOINT_TOLERANCE)


def test_a_session_starts_with_an_empty_prefix_cache(engines: dict[str, Engine]) -> None:
    request = Request("long", tuple(range(20, 120)), 1, 4)
    for _ in range(2):
        assert whole(engines["vllm"], [request])["long"].cached[0] == 0


def test_preempted_requests_lose_and_repeat_nothing(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler = engines["tight"].llm.llm_engine.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
    preempt, preempted = scheduler._preempt_request, []

    def counted(request: Any, *rest: Any, **options: Any) -> None:
        preempted.append(request.request_id)
        preempt(request, *rest, **options)

    monkeypatch.setattr(scheduler, "_preempt_request", counted)
    rng = np.random.default_rng(1)
    long = [Request(f"p{i}", tuple(rng.integers(10, TEXT, 150).tolist()), i, 60) for i in range(20)]
    free, squeezed = whole(engines["vllm"], long), whole(engines["tight"], long)
    assert preempted
    for key, own in squeezed.items():
        assert own.position == list(range(len(own.token_ids)))
        assert own.token_ids == free[key].token_ids
        np.testing.assert_allclose(own.joint, free[key].joint, atol=JOINT_TOLERANCE)
        np.testing.assert_allclose(own.log_prob, free[key].log_prob, atol=SCORE_TOLERANCE)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vllm", "hf"])
def test_what_can_never_run_is_refused_by_name(engines: dict[str, Engine], kind: str) -> None:
    session = engines[kind].session()
    with pytest.raises(UserError, match=r"big has 250 prompt tokens and may add 7, 257 in all.*max_model_len=256"):
        session.add(Request("big", (20,) * 250, 0, 7))
    with pytest.raises(UserError, match="void has 0 prompt tokens"):
        session.add(Request("void", (), 0, 7))
    session.add(Request("fits", (20,) * 250, 0, 6))
    with pytest.raises(UserError, match="fits is already in flight"):
        session.add(Request("fits", (20,), 0, 6))
    assert len(by_key(drained(session))["fits"].token_ids) <= 6
    session.close()


def test_there_is_one_session_at_a_time(
    engines: dict[str, Engine], requests: list[Request], heard: dict[str, Heard]
) -> None:
    session = engines["vllm"].session()
    for request in requests:
        session.add(request)
    drained(session, 2)
    for again in (engines["vllm"].session, lambda: engines["vllm"].generate(requests[:1])):
        with pytest.raises(UserError, match="still open"):
            again()
    session.close()
    for response in engines["vllm"].generate(requests):  # nothing is left of what was in flight
        assert response.token_ids == heard[response.key].token_ids
        assert response.joint is not None
