"""Live sampling on real engines: vLLM against replay, against the reference session, and branches out of the cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from tests.doubles import small_qwen3
from tests.properties.test_live import GRID, BranchOnce, Erratic, equal_to_replay, pool_of, whole_responses, zip_rc_plus
from ziprc.config.base import Sampling
from ziprc.engines import start
from ziprc.engines.base import Engine, EngineSettings
from ziprc.errors import UserError
from ziprc.joint.head import JointHead
from ziprc.joint.vocabulary import VocabLayout
from ziprc.sampling.controller import Budget, Controller, Policy
from ziprc.sampling.live.records import Answered, Question
from ziprc.sampling.live.runner import Runner
from ziprc.sampling.policies.base import Reader
from ziprc.sampling.policies.fixed import Fixed
from ziprc.sampling.policies.pruning import ValuePruning
from ziprc.sampling.policies.stopping import AdaptiveConsistency
from ziprc.sampling.tree import ROOT, Status

pytest.importorskip("vllm")
from ziprc.engines.vllm import BLOCK_TOKENS, VLLMEngine

TEXT, VOCAB = 352, 384
STOPS = (5, *range(12, TEXT, 16))  # many, so that a random model ends at all lengths
SLOTS, CAP = 4, 30
MAX_MODEL_LEN = 256
JOINT_TOLERANCE, SCORE_TOLERANCE = 1e-5, 1e-4  # as in test_sessions


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    folder = small_qwen3(tmp_path_factory.mktemp("model"), VOCAB)
    head = JointHead(VocabLayout(VOCAB, TEXT, TEXT, GRID.size), GRID)
    sampling = Sampling(temperature=0.8, min_p=0.02)
    return EngineSettings(folder, sampling, STOPS, ((TEXT, VOCAB),), MAX_MODEL_LEN, joint=head, max_num_seqs=64)


@pytest.fixture(scope="module")
def vllm(settings: EngineSettings) -> Iterator[Engine]:
    engine = VLLMEngine(settings)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(10, TEXT, rng.integers(3, 60)).tolist()) for _ in range(12)]
    return [Question(f"q{i}", prompt, int(rng.integers(1 << 40))) for i, prompt in enumerate(prompts)]


def answer_of(prompt: int, token_ids: Sequence[int]) -> int | None:
    assert token_ids[-1] in STOPS
    return None if len(token_ids) < 2 or token_ids[-2] % 4 == 3 else token_ids[-2] % 4


def live(
    engine: Engine, policy: Policy, asked: Sequence[Question], interval: int = 3, **options: Any
) -> list[Answered]:
    controller = Controller(policy, Budget(branches=SLOTS, interval=interval))
    settings = {"window": 2, "max_new_tokens": CAP, "cells": GRID.size, "in_flight": 8, **options}
    session = engine.session()
    try:
        return sorted(Runner(session, controller, asked, answer_of, **settings).run(), key=lambda one: one.index)
    finally:
        session.close()


def reader() -> Reader:
    return Reader(GRID)


PLAIN: dict[str, Policy] = {
    "majority": Fixed(reader(), k=SLOTS),
    "adaptive consistency": AdaptiveConsistency(reader(), threshold=0.8, k_max=SLOTS),
    "value pruning": ValuePruning(reader(), k=3, threshold=0.4),
    "zip-rc-plus": zip_rc_plus(np.random.default_rng(0), 1e-6),
}


@pytest.fixture(scope="module")
def pool(vllm: Engine, asked: list[Question]) -> Any:
    """What the engine says when nobody interferes."""
    session = vllm.session()
    found = pool_of(asked, list(whole_responses(session, asked, SLOTS, CAP)), answer_of)
    session.close()
    assert 0.1 < found.finished.mean() < 0.99
    return found


@pytest.mark.parametrize("name", PLAIN)
def test_live_on_vllm_is_replay_of_its_own_tokens(vllm: Engine, asked: list[Question], pool: Any, name: str) -> None:
    controller = Controller(PLAIN[name], Budget(branches=SLOTS, interval=3))
    compared = list(equal_to_replay(controller, pool, 2, live(vllm, PLAIN[name], asked), resumes=False))
    assert sum(compared) == len(asked) if name != "zip-rc-plus" else any(compared)


@pytest.mark.parametrize("name", ["majority", "adaptive consistency", "value pruning"])
def test_the_reference_engine_decides_the_same(
    vllm: Engine, settings: EngineSettings, asked: list[Question], name: str
) -> None:
    ours = live(vllm, PLAIN[name], asked)
    theirs = live(start("hf", settings), PLAIN[name], asked)
    equal = [x for x, y in zip(ours, theirs, strict=True) if x.branches == y.branches]
    assert len(equal) >= len(asked) - 1  # a draw can be as close as a rounding error
    for x, y in zip(ours, theirs, strict=True):
        if x in equal:
            assert (x.slot, x.tokens, x.latency, len(x.decisions)) == (y.slot, y.tokens, y.latency, len(y.decisions))
            assert x.probability == pytest.approx(y.probability, abs=SCORE_TOLERANCE)


def test_a_branch_grows_from_its_parent_out_of_the_cache(vllm: Engine) -> None:
    at, rng = 6, np.random.default_rng(1)
    asked = [Question(f"b{i}", tuple(rng.integers(10, TEXT, 70).tolist()), i) for i in range(16)]
    branched = 0
    for one in live(vllm, BranchOnce(at=at), asked, interval=1, window=1, in_flight=16):
        if len(one.branches) == 1:  # the first sample was too short
            assert one.prefill == 70
            continue
        parent, child = one.branches
        assert (child.parent, child.fork) == (0, at) and child.token_ids[:at] == parent.token_ids[:at]
        assert one.prefill == 70 + (70 + at - 70 // BLOCK_TOKENS * BLOCK_TOKENS)
        states = [d.trees.signals[0] for d in one.decisions if d.trees.length[0, 1] == at + 1]
        of_parent = [d.trees.signals[0, 0] for d in one.decisions if d.trees.length[0, 0] == at + 1]
        np.testing.assert_allclose(states[0][1][: GRID.size], of_parent[0][: GRID.size], atol=JOINT_TOLERANCE)
        np.testing.assert_allclose(states[0][1][GRID.size :], of_parent[0][GRID.size :], atol=SCORE_TOLERANCE)
        branched += 1
    assert branched >= 4


def test_a_policy_that_does_everything_loses_no_token(vllm: Engine, asked: list[Question]) -> None:
    policy = Erratic(rates=(0.7, 0.5, 0.5))
    resumed = 0
    for one in live(vllm, policy, asked, interval=2):
        assert one.error is None and one.tokens == sum(branch.generated for branch in one.branches)
        for branch in one.branches:
            prefix = one.branches[branch.parent].token_ids[: branch.fork] if branch.parent != ROOT else ()
            assert branch.token_ids[: branch.fork] == prefix and len(branch.token_ids) <= CAP
            assert not set(branch.token_ids[:-1]) & set(STOPS)
        resumed += sum((d.decision.run & (d.trees.status == Status.PAUSED)).sum() for d in one.decisions)
    assert resumed > 10


def test_a_prompt_that_is_too_long_is_refused_before_a_token_is_drawn(vllm: Engine, asked: list[Question]) -> None:
    long = Question("endless", (20,) * MAX_MODEL_LEN, 0)
    with pytest.raises(UserError, match=r"endless has 256 prompt tokens and may add 30.*max_model_len=256"):
        live(vllm, PLAIN["majority"], [*asked, long])


def test_an_engine_that_breaks_in_a_step_fails_only_the_prompt_that_breaks_it(
    vllm: Engine, asked: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = vllm.llm.llm_engine.engine_core  # type: ignore[attr-defined]
    output, broken = core.get_output, "1:q1/0/0"

    def get_output() -> Any:
        if any(key == broken and one.emitted > 2 for key, one in vllm._session._by_key.items()):  # type: ignore[attr-defined]
            raise RuntimeError("out of luck")
        return output()

    calm = live(vllm, PLAIN["majority"], asked)
    monkeypatch.setattr(core, "get_output", get_output)
    controller = Controller(PLAIN["majority"], Budget(branches=SLOTS, interval=3))
    settings: dict[str, Any] = {"window": 2, "max_new_tokens": CAP, "cells": GRID.size, "in_flight": 4}
    runner = Runner(vllm.session(), controller, asked, answer_of, **settings, new_session=vllm.session)
    for one in runner.run():
        if one.question.key == "q1":
            assert "Prompt q1" in str(one.error) and "out of luck" in str(one.error)
        else:
            assert one.error is None and one.branches == calm[one.index].branches
