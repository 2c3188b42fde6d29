"""Guided decoding against the engine where nothing tilts, and against whole passes over every prefix where something does."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.doubles import tiny_checkpoint
from ziprc.config.base import Sampling
from ziprc.engines import start
from ziprc.engines.base import EngineSettings, Request
from ziprc.engines.hf import filtered
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.tilt import Tilt, log_weight
from ziprc.reading.states import JointReader
from ziprc.sampling.guided import Guided, GuidedResponse
from ziprc.tables.rollouts import FinishReason

GRID = BinGrid((0.0, 1.0), (0, 8, 16, 32))
TEXT, MOST, SEEDS = 261, 12, (5, 6, 7, 8)
SAMPLING = Sampling(temperature=0.8, min_p=0.5)
PROMPT, CONTEXT = [1, 2, 3], [9, 9, 4, 1, 2]
STOPS = frozenset(range(245, 261))  # of so random a model, so that some responses end


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    home = tmp_path_factory.mktemp("guided")
    return tiny_checkpoint(home / "base", joint=False), tiny_checkpoint(home / "critic", seed=3, grid=GRID)


def decoder(folders: tuple[Path, Path], eta: float, tilt: Tilt = Tilt.EXP, stops: frozenset[int] = STOPS) -> Guided:
    base, critic = folders
    return Guided(
        load_model(base), JointReader.open(critic), TEXT, SAMPLING, stops,
        lambda q, cells: log_weight(tilt, q, eta, 0.01, cells, GRID),
    )  # fmt: skip


def answers(
    folders: tuple[Path, Path], eta: float, tilt: Tilt = Tilt.EXP, stops: frozenset[int] = STOPS
) -> list[GuidedResponse]:
    (found,) = decoder(folders, eta, tilt, stops).respond([PROMPT], [CONTEXT], [SEEDS], MOST)
    return found


def test_without_a_tilt_the_samples_are_those_of_the_engine(folders: tuple[Path, Path]) -> None:
    found = answers(folders, eta=1e12)
    settings = EngineSettings(folders[0], SAMPLING, tuple(STOPS), ((TEXT, 320),), max_model_len=64)
    with contextlib.closing(start("hf", settings)) as engine:
        plain = engine.generate([Request(str(s), tuple(PROMPT), s, MOST) for s in SEEDS])
    assert [of.token_ids for of in found] == [of.token_ids for of in plain]
    assert [of.finish_reason for of in found] == [of.finish_reason for of in plain]
    assert len({of.finish_reason for of in found}) == 2 and len({len(of.token_ids) for of in found}) > 1
    assert all(of.kl == pytest.approx(0, abs=1e-9) for of in found)


@pytest.mark.parametrize("tilt", [Tilt.EXP, Tilt.SOFT_COST])
def test_every_token_is_drawn_from_the_reference_tilted_by_what_the_critic_says_behind_it(
    folders: tuple[Path, Path], tilt: Tilt
) -> None:
    eta = 0.002  # the critic is random and hardly distinguishes tokens
    found = answers(folders, eta, tilt)
    reference, critic = load_model(folders[0]), JointReader.open(folders[1])
    rows = critic.joint.layout.joint_slice
    if tilt is Tilt.EXP:
        assert [of.token_ids for of in found] != [of.token_ids for of in answers(folders, 1e12)]
    for response in found:
        kl = 0.0
        for t, token in enumerate(response.token_ids):
            so_far = list(response.token_ids[:t])
            with torch.inference_mode():
                logits = reference(torch.tensor([PROMPT + so_far])).logits[:, -1].float()
                logits[:, TEXT:] = -torch.inf
                law = filtered(logits, SAMPLING)[0].double()
                ids = torch.isfinite(law).nonzero()[:, 0]
                behind = torch.tensor([CONTEXT + so_far + [i] for i in ids.tolist()])
                cells = critic.model(behind).logits[:, -1, rows].softmax(-1).numpy()
            assert token in ids.tolist()
            q = cells.reshape(len(ids), 2, 3).sum(-1)[:, 1]
            before = law[ids].log_softmax(-1).numpy()
            after = before + log_weight(tilt, q, eta, 0.01, cells, GRID)
            after -= np.logaddexp.reduce(after)
            kl += float((np.exp(after) * (after - before)).sum())
        assert response.kl == pytest.approx(kl, rel=2e-2, abs=1e-4) and kl > 1e-7


def test_prompts_answered_at_once_are_answered_as_each_alone(folders: tuple[Path, Path]) -> None:
    guided = decoder(folders, 0.002)
    asked = [(PROMPT, CONTEXT, SEEDS), ([7], [7], (11, 12)), ([2, 4, 6, 8, 5], [3] * 17, (21, 22, 23))]
    alone = [guided.respond(*([of] for of in one), MOST)[0] for one in asked]
    ends = [max(len(of.token_ids) for of in found) for found in alone]
    assert len(set(ends)) > 1, "prompts that are done leave the batch before others"
    for order in itertools.permutations(range(3)):
        together = guided.respond(*zip(*(asked[i] for i in order), strict=True), MOST)
        for i, found in zip(order, together, strict=True):
            assert [of.token_ids for of in found] == [of.token_ids for of in alone[i]]
            assert [of.kl for of in found] == pytest.approx([of.kl for of in alone[i]], rel=1e-3, abs=1e-7)


def test_a_response_ends_at_its_cap(folders: tuple[Path, Path]) -> None:
    for response in answers(folders, 0.1, stops=frozenset()):
        assert len(response.token_ids) == MOST and response.finish_reason is FinishReason.LENGTH
