"""A reasoning vocabulary in both engines and in training: one law, which is the base's until it learns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.doubles import tight, tiny_tokenizer
from tests.parity.test_online import base  # noqa: F401, a fixture
from ziprc.config.base import Sampling
from ziprc.config.vocabulary import Expansion
from ziprc.engines import start
from ziprc.engines.base import EngineSettings, Request, unknown_rows
from ziprc.engines.hf import HFEngine
from ziprc.engines.taps import Text, taps_of
from ziprc.joint.checkpoint import load_model, save_checkpoint
from ziprc.joint.reasoning import INSIDE, ReasoningVocabulary, read_reasoning
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.training.expansion import add_copies
from ziprc.training.law import add_region_head, ban, in_regions

pytest.importorskip("vllm")

STOPS = (258,)  # <|im_end|>, which has no copy
HOT = Sampling(temperature=2.0, min_p=0.0)


@pytest.fixture(scope="module")
def expanded(base: Path) -> Path:  # noqa: F811
    tokenizer, model, folder = load_tokenizer(base), load_model(base), base.parent / "expanded"
    _, marked = add_copies(model, tokenizer, Expansion(copies=2), [], 0)
    save_checkpoint(folder, model, marked, {"params": {}, "parents": {}})
    return folder


@pytest.fixture(scope="module")
def own(expanded: Path) -> ReasoningVocabulary:
    found = read_reasoning(expanded)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def settings(expanded: Path, own: ReasoningVocabulary) -> EngineSettings:
    banned = unknown_rows(expanded, load_tokenizer(expanded))
    return EngineSettings(
        expanded, Sampling(min_p=0.0), STOPS, banned, 256, reasoning=own, log_probs=True, max_num_seqs=256
    )  # fmt: skip


@pytest.fixture(scope="module")
def engines(settings: EngineSettings) -> Iterator[dict[str, Any]]:
    with contextlib.ExitStack() as stack:
        yield {kind: stack.enter_context(contextlib.closing(start(kind, settings))) for kind in ("hf", "vllm")}


def requests(own: ReasoningVocabulary, count: int, cap: int, sampling: Sampling | None = None) -> list[Request]:
    """A third of the prompts leave the block to be opened, open it, or have closed it."""
    said = ([], [own.opens], [own.opens, own.closes])
    return [
        Request(str(i), (own.turn, own.opens, 40 + i % 50, own.turn, *said[i % 3]), i, cap, sampling)
        for i in range(count)
    ]


def inside(own: ReasoningVocabulary, request: Request, ids: tuple[int, ...]) -> np.ndarray:
    return own.inside([own.at_end(request.prompt_token_ids)], np.array([ids]))[0]


def test_both_engines_sample_the_same(engines: dict[str, Any], own: ReasoningVocabulary) -> None:
    asked = requests(own, 48, 48)
    hf, vllm = (engines[kind].generate(asked) for kind in ("hf", "vllm"))
    assert [one.token_ids for one in hf] == [one.token_ids for one in vllm]
    for one, other in zip(hf, vllm, strict=True):
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5)
    shares = [own.is_copy(one.token_ids).mean() for request, one in zip(asked, hf, strict=True) if len(one.token_ids) > 8
              and inside(own, request, one.token_ids).all()]  # fmt: skip
    assert len(shares) > 5 and 0.5 < np.mean(shares) < 0.8  # two copies of every token


def test_a_hundred_thousand_hot_tokens_hold_no_copy_outside_the_block(
    engines: dict[str, Any], own: ReasoningVocabulary
) -> None:
    for kind in ("vllm", "hf"):
        asked = requests(own, 660, 240, HOT)
        found, tokens, copies, closed = engines[kind].generate(asked), 0, 0, 0
        for request, one in zip(asked, found, strict=True):
            within, copy = inside(own, request, one.token_ids), own.is_copy(one.token_ids)
            assert not (copy & ~within).any(), request.key
            tokens, copies, closed = tokens + len(within), copies + copy.sum(), closed + (within[0] and not within[-1])
        assert tokens > 100_000 and copies > 10_000 and closed > 20, (kind, tokens, copies, closed)


def test_a_half_thought_in_a_prompt_goes_on_as_a_thought(engines: dict[str, Any], own: ReasoningVocabulary) -> None:
    """As a branch does, or a resumed response; and the session's words on it are the law's own."""
    copy = own.rows.start + 3
    asked = [Request("half", (own.turn, 40, own.turn, own.opens, 41, copy, 42), 5, 32)]
    said = {}
    for kind, engine in engines.items():
        session = engine.session()
        session.add(asked[0])
        steps = []
        while (step := session.step()) is not None:
            steps.append((int(step.token_ids[0]), float(step.log_prob[0]), float(step.entropy[0])))
        session.close()
        said[kind] = steps
        plain = engine.generate(asked)[0]
        assert [one[0] for one in steps] == list(plain.token_ids)
        np.testing.assert_allclose([one[1] for one in steps[1:]], plain.log_probs[:-1], atol=1e-4)
    np.testing.assert_allclose(said["hf"], said["vllm"], atol=1e-4)
    assert own.is_copy([one[0] for one in said["hf"]]).any() and np.isfinite(said["hf"]).all()


def scored(folder: Path, reasoning: ReasoningVocabulary, ids: torch.Tensor, keep: int, temperature: float) -> Any:
    """What the trainer says of the last `keep` tokens."""
    model = load_model(folder)
    ban(model, unknown_rows(folder, load_tokenizer(folder)))
    add_region_head(model, reasoning, temperature)
    with torch.no_grad():
        log_probs, entropies, _, where = in_regions(model, reasoning, ids, torch.ones_like(ids), keep)
    return log_probs, entropies, where


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_draws_by_the_law_that_is_trained(
    engines: dict[str, Any], own: ReasoningVocabulary, expanded: Path, temperature: float
) -> None:
    asked = requests(own, 24, 40, Sampling(temperature=temperature, min_p=0.0))
    checked = 0
    for request, one in zip(asked, engines["hf"].generate(asked), strict=True):
        ids = torch.tensor([[*request.prompt_token_ids, *one.token_ids]])
        log_probs, _, where = scored(expanded, own, ids, len(one.token_ids), temperature)
        np.testing.assert_allclose(log_probs[0], one.log_probs, atol=1e-5)
        checked += int(where.sum())
    assert checked > 100


def test_at_first_it_is_the_base(base: Path, expanded: Path, own: ReasoningVocabulary) -> None:  # noqa: F811
    """Outside the block to the bit, though copies stand in what came before; in it, copies and source together."""
    rng = np.random.default_rng(0)
    plain = rng.integers(1, 250, size=(4, 60))
    plain[:, 3], plain[:, 4], plain[:, 40] = own.turn, own.opens, own.closes
    mixed = plain.copy()
    mixed[:, 5:40] = np.where(rng.random((4, 35)) < 0.5, own.rows.start + plain[:, 5:40], plain[:, 5:40])
    np.testing.assert_array_equal(own.plain(mixed), plain)
    keep = 55
    ours, entropies, where = scored(expanded, own, torch.from_numpy(mixed), keep, 1.0)
    # the base, scored by the same head at the same places: its own vocabulary is all there is
    nothing = replace(own, copies=0)
    model = load_model(base)
    ban(model, unknown_rows(base, tiny_tokenizer()))
    add_region_head(model, nothing, 1.0)
    with torch.no_grad():
        theirs, base_entropies, _ = model(
            input_ids=torch.from_numpy(plain), attention_mask=torch.ones(4, 60).long(), inside=where
        )
    assert (
        where.sum() == 4 * 36
        and torch.equal(ours[~where], theirs[~where])
        and torch.equal(entropies[~where], base_entropies[~where])
    )
    shift = (theirs - ours)[where]
    closing = torch.from_numpy(plain[:, -keep:])[where] == own.closes
    np.testing.assert_allclose(shift[~closing], np.log(3), atol=1e-5)  # a third of what the token had
    np.testing.assert_allclose(shift[closing], 0, atol=1e-5)  # which has no copy
    assert closing.sum() == 4
    np.testing.assert_allclose(entropies[where], base_entropies[where] + np.log(3), atol=0.1)


def test_the_second_runner_says_what_the_first_does(
    own: ReasoningVocabulary, settings: EngineSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams
    from vllm.config import VllmConfig
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu import buffer_utils
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors
    from vllm.v1.worker.gpu.states import RequestState

    from tests.parity.test_engines import context
    from ziprc.engines import vllm as module

    size = own.rows.stop
    taken = {"engine": -2, "banned": [list(one) for one in settings.banned], "reasoning": own.to_dict()}
    config = VllmConfig(additional_config={"ziprc": taken})
    monkeypatch.setattr(buffer_utils, "is_uva_available", lambda: False)
    state = RequestState(8, 64, 64, 0, size, torch.device("cpu"))
    (second,) = build_custom_logits_processors(config, state, False, [module.ApplyTaps])
    prompt, texts = [own.turn, own.opens], [[40, 41], [40, own.closes, 41], [own.rows.start, 42, 43]]
    params = [
        SamplingParams(temperature=0.5, extra_args={"ziprc_request": i, "ziprc_begin": INSIDE})
        for i in range(len(texts))
    ]
    slots = []
    for i, text in enumerate(texts):
        state.add_request(str(i), len(prompt), prompt + text, 0, 20)
        slots.append(state.req_id_to_index[str(i)])
        state.all_token_ids.gpu[slots[-1], : len(prompt + text)] = torch.tensor(prompt + text)  # as its kernel would
        second.add_request(slots[-1], params[i])
    logits = torch.randn(len(texts), size, generator=torch.Generator().manual_seed(0))
    first = module.ApplyTaps(config, torch.device("cpu"), False)
    live = [list(text) for text in texts]
    first.update_state(BatchUpdate(3, removed=[], added=[(i, params[i], prompt, live[i]) for i in range(3)], moved=[]))
    known = [len(prompt) + len(text) for text in texts]
    for token in (44, own.closes, 45):  # in step with one another, a token at a time
        by_first, by_second = first.apply(logits.clone()), second.apply(logits.clone(), context(slots, known))
        assert torch.equal(by_first, by_second)
        for i, slot in enumerate(slots):
            live[i].append(token)
            state.all_token_ids.gpu[slot, known[i]] = token
            known[i] += 1
    assert torch.isneginf(by_first[:, own.rows]).all()  # all have closed by now
    module._taps.pop(-2, None)


def test_what_is_read_beside_copies_has_no_holes(settings: EngineSettings, own: ReasoningVocabulary) -> None:
    """The tap of the region stands before the reader, so that entropy is that of the law; what is banned weighs nothing."""
    from ziprc.engines.taps import ReadStates, TextRows

    reader = ReadStates(None, TextRows(settings.banned, own.rows.stop))
    logits = torch.randn(2, own.rows.stop, generator=torch.Generator().manual_seed(1))
    texts = [Text(INSIDE, 1.0, lambda a, b: [][a:b]), Text(0, 1.0, lambda a, b: [][a:b])]
    for tap in taps_of(settings, reader):
        tap.apply([(0, 0), (1, 0)], logits, texts)
    found = reader.take([(0, 0), (1, 0)], np.array([40, 40], dtype=np.int32))
    law = torch.distributions.Categorical(logits=logits)
    np.testing.assert_allclose(found.log_prob, law.log_prob(torch.tensor([40, 40])), atol=1e-5)
    probabilities = logits.softmax(-1)
    np.testing.assert_allclose(found.entropy, torch.special.entr(probabilities).sum(-1), rtol=1e-5)


def test_a_preempted_thought_goes_on_where_it_was(settings: EngineSettings, own: ReasoningVocabulary) -> None:
    """The last test: another engine of vLLM takes what the first stands on with it when it is closed."""
    from ziprc.engines.vllm import VLLMEngine

    asked = requests(own, 24, 120)
    with contextlib.closing(HFEngine(settings)) as engine:
        calm = engine.generate(asked)
    with contextlib.closing(tight(VLLMEngine)(settings)) as engine:
        scheduler, count = engine.llm.llm_engine.engine_core.engine_core.scheduler, []
        plain = scheduler._preempt_request
        scheduler._preempt_request = lambda *a, **k: (count.append(1), plain(*a, **k))[1]
        pressed = engine.generate(asked)
    assert count, "nothing was preempted"
    assert [one.token_ids for one in pressed] == [one.token_ids for one in calm]
