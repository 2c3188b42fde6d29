"""What on-policy training needs of both engines: new weights take effect at once, and each token's log-probability is true."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.doubles import small_qwen3
from ziprc.config.base import Sampling
from ziprc.engines import start
from ziprc.engines.base import Engine, EngineSettings, Request, Response
from ziprc.errors import UserError
from ziprc.joint.checkpoint import load_model

pytest.importorskip("vllm")

TEXT, VOCAB = 352, 384


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    folder = small_qwen3(tmp_path_factory.mktemp("model"), VOCAB)
    plain = Sampling(min_p=0.0)
    return EngineSettings(folder, plain, (5, 9), ((TEXT, VOCAB),), max_model_len=256, log_probs=True, max_num_seqs=64)


@pytest.fixture(scope="module")
def vllm(settings: EngineSettings) -> Iterator[Engine]:
    engine = start("vllm", settings)
    yield engine
    engine.close()


@pytest.fixture
def requests() -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(10, TEXT, rng.integers(3, 60)).tolist()) for _ in range(96)]
    return [Request(str(i), prompt, i, 40) for i, prompt in enumerate(prompts)]


def perturbed(folder: Path, seed: int) -> dict[str, torch.Tensor]:
    """Weights of the model, all of them moved."""
    noise = torch.Generator().manual_seed(seed)
    weights = load_model(folder).state_dict()
    return {
        name: w + 0.02 * torch.randn(w.shape, generator=noise)
        for name, w in weights.items()
        if name != "lm_head.weight"
    }


def same(ours: list[Response], theirs: list[Response]) -> float:
    return float(np.mean([a.token_ids == b.token_ids for a, b in zip(ours, theirs, strict=True)]))


def test_both_engines_sample_alike_after_a_push_and_otherwise_than_before(
    settings: EngineSettings, vllm: Engine, requests: list[Request]
) -> None:
    reference = start("hf", settings)
    before = reference.generate(requests)
    for seed in (1, 2):
        weights = perturbed(settings.model, seed)
        vllm.load_weights(weights)
        reference.load_weights(weights)
        ours, theirs = vllm.generate(requests), reference.generate(requests)
        assert same(ours, theirs) >= 0.98  # a rounding error may decide one draw
        assert same(ours, before) < 0.1
    vllm.load_weights({n: w for n, w in load_model(settings.model).state_dict().items() if n != "lm_head.weight"})
    assert same(vllm.generate(requests), before) >= 0.98


@pytest.mark.parametrize("kind", ["hf", "vllm"])
@pytest.mark.parametrize("sampling", [Sampling(min_p=0.0), Sampling(temperature=0.7, min_p=0.05)], ids=str)
def test_log_probs_are_those_of_the_law_that_drew(
    settings: EngineSettings, vllm: Engine, requests: list[Request], kind: str, sampling: Sampling
) -> None:
    asked = [replace(request, sampling=sampling) for request in requests[:24]]
    model = load_model(settings.model)
    engine = vllm if kind == "vllm" else start("hf", settings)
    engine.load_weights(model.state_dict())
    for request, response in zip(asked, engine.generate(asked), strict=True):
        whole = torch.tensor([*request.prompt_token_ids, *response.token_ids])
        with torch.inference_mode():
            logits = model(whole[None]).logits[0, len(request.prompt_token_ids) - 1 : -1, :TEXT] / sampling.temperature
        probabilities = logits.softmax(-1)
        kept = probabilities >= sampling.min_p * probabilities.amax(-1, keepdim=True)
        law = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
        expected = law.gather(-1, torch.tensor(response.token_ids)[:, None])[:, 0]
        np.testing.assert_allclose(response.log_probs, expected, atol=2e-5)


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_weights_of_another_model_are_refused(settings: EngineSettings, vllm: Engine, kind: str) -> None:
    engine = vllm if kind == "vllm" else start("hf", settings)
    weights = dict(load_model(settings.model).state_dict())
    with pytest.raises(UserError, match=r"hold unknown .*extra"):
        engine.load_weights({**weights, "extra": torch.zeros(1)})
    weights.pop("model.norm.weight")
    with pytest.raises(UserError, match=r"lack .*model\.norm\.weight"):
        engine.load_weights(weights)
