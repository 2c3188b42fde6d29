"""Labels of every candidate in two passes against the loop that tries one token after the other, and against the pack alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.doubles import tiny_checkpoint, tiny_model, tiny_tables, tiny_tokenizer
from ziprc.config.icl_v import TrainCritic
from ziprc.evaluation.critic.labels import critic_labels
from ziprc.joint.bins import BinGrid
from ziprc.joint.readout import TokenPair
from ziprc.reading import leaves
from ziprc.reading.leaves import trunk_and_branches, trunk_and_leaves
from ziprc.reading.logits import Candidates, candidates
from ziprc.reading.states import JointReader
from ziprc.store.layout import Layout
from ziprc.tables.grades import GRADES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.packs import Graded, graded_rollouts, pack_data, rotated_packs

TOKENIZER = tiny_tokenizer()
GRID = BinGrid((0.0, 0.5, 1.0), (0, 8, 16, 32))
TEXT = 261


@pytest.mark.parametrize("cells", [leaves.MASK_CELLS, 300])
def test_a_leaf_is_the_state_of_a_sequence_that_ends_in_it(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(leaves, "MASK_CELLS", cells)  # 300: a few leaves at a time
    model, rng = tiny_model(TOKENIZER), torch.Generator().manual_seed(1)
    trunk = torch.randint(0, TEXT, (2, 30), generator=rng)
    tried, before = torch.randint(0, TEXT, (2, 17), generator=rng), torch.randint(1, 31, (2, 17), generator=rng)
    states, tips = trunk_and_leaves(model, trunk, tried, before)
    with torch.inference_mode():
        torch.testing.assert_close(states, model.base_model(trunk).last_hidden_state)
        for row, n in np.ndindex(2, 17):
            sequence = torch.cat([trunk[row, : before[row, n]], tried[row, n : n + 1]])[None]
            alone = model.base_model(sequence).last_hidden_state[0, -1]
            torch.testing.assert_close(tips[row, n], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cells", [leaves.MASK_CELLS, 600])
def test_a_branch_has_the_states_of_a_sequence_that_goes_on_so(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(leaves, "MASK_CELLS", cells)  # 600: one or two branches at a time
    model, rng = tiny_model(TOKENIZER), torch.Generator().manual_seed(2)
    trunk = torch.randint(0, TEXT, (30,), generator=rng)
    branches = [
        (before, torch.randint(0, TEXT, (m,), generator=rng)) for before, m in ((30, 9), (1, 4), (17, 1), (30, 12))
    ]
    found = trunk_and_branches(model, trunk, branches)
    found += trunk_and_branches(model, trunk, branches[2:3])
    for (before, ids), states in zip([*branches, branches[2]], found, strict=True):
        with torch.inference_mode():
            alone = model.base_model(torch.cat([trunk[:before], ids])[None]).last_hidden_state[0, before - 1 :]
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-5)


def test_a_trunk_without_leaves() -> None:
    model, empty = tiny_model(TOKENIZER), torch.zeros(1, 0, dtype=torch.int64)
    states, tips = trunk_and_leaves(model, torch.arange(5)[None], empty, empty)
    assert states.shape[1] == 5 and tips.shape[1] == 0


def test_candidates_are_the_plausible_tokens_and_the_one_that_was_taken() -> None:
    model, rng = tiny_model(TOKENIZER), np.random.default_rng(0)
    pairs = [TokenPair(rng.integers(0, TEXT, n), rng.integers(0, TEXT, m)) for n, m in ((3, 7), (9, 1), (5, 12))]
    found = candidates(model, TEXT, pairs, token_budget=20, chunk=4, min_p=0.6)
    sizes = []
    for pair, of in zip(pairs, found, strict=True):
        ids = torch.tensor(np.concatenate([pair.prompt, pair.response]))[None]
        with torch.inference_mode():
            log_probs = model(ids).logits[0, len(pair.prompt) - 1 : -1, :TEXT].log_softmax(-1).numpy()
        for t, taken in enumerate(pair.response):
            own = slice(of.offsets[t], of.offsets[t + 1])
            likely = np.flatnonzero(log_probs[t] >= log_probs[t].max() + np.log(0.6))
            assert of.ids[own].tolist() == sorted({*likely.tolist(), int(taken)})
            np.testing.assert_allclose(of.log_prob[own], log_probs[t][of.ids[own]], atol=1e-5)
            sizes.append(len(of.ids[own]))
    assert max(sizes) > 3 and len(of.state) == len(of.ids)
    alone = candidates(model, TEXT, pairs, 1000, 100, min_p=np.inf)
    assert all(of.ids.tolist() == pair.response.tolist() for of, pair in zip(alone, pairs, strict=True))


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory: pytest.TempPathFactory) -> list[Graded]:
    layout = Layout(tmp_path_factory.mktemp("labels"), "tiny")
    tiny_tables(layout, "train", prompts=2, samples=5, unfinished=0.3)
    found, _ = graded_rollouts(*(s.read(layout.table(s.name, "train")) for s in (ROLLOUTS, GRADES)), "grades")
    assert any(r.cut for r in found)
    return found


@pytest.mark.parametrize("room", [10_000, 150])
def test_labels_equal_the_loop_over_prefixes(tmp_path: Path, rollouts: list[Graded], room: int) -> None:
    reader = JointReader.open(tiny_checkpoint(tmp_path / "critic", grid=GRID))
    own, rng = TrainCritic(pack_rollouts=4, feedback="full", max_length=room), np.random.default_rng(0)
    plausible = {}
    for i, r in enumerate(rollouts[:-1]):  # the last one is not asked for
        counts = rng.integers(1, 4, len(r.response))
        ids = [np.unique([*rng.integers(0, TEXT, c - 1), t]) for c, t in zip(counts, r.response, strict=True)]
        offsets = np.cumsum([0, *map(len, ids)])
        plausible[i] = Candidates(offsets, np.concatenate(ids), np.zeros(offsets[-1], np.float32))
    found = dict(critic_labels(reader, TOKENIZER, rollouts, plausible, own, seed=3, budget=400))
    assert set(found) == set(plausible)

    packs, last = rotated_packs(rollouts, 4, seed=3)
    data = pack_data(rollouts, packs, TOKENIZER, own, GRID)
    assert (data.left_out > 0) == (room == 150)
    at = {
        data.members[k]: (p, k)
        for p, n in enumerate(last)
        for k in range(data.segments[p + 1] - n, data.segments[p + 1])
    }
    rows = reader.joint.layout.joint_slice

    def joint(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return reader.model(torch.tensor(ids)[None].long()).logits[0, -1, rows].softmax(-1).numpy()

    centres = np.repeat(GRID.reward_centres, GRID.L)
    for i, of in plausible.items():
        pack, k = at[i]
        start, labels = data.first[k] + 1, found[i]
        prefix = data.tokens[data.offsets[pack] : start]
        assert labels.siblings == k - data.segments[pack] and (labels.siblings >= 2 or room == 150)
        for t in range(len(rollouts[i].response) + 1):
            before = np.concatenate([prefix, rollouts[i].response[:t]])
            assert labels.values[t] == pytest.approx(joint(before) @ centres, abs=1e-5)
            if t < len(rollouts[i].response):
                for n in range(of.offsets[t], of.offsets[t + 1]):
                    cells = joint(np.append(before, of.ids[n]))
                    np.testing.assert_allclose(labels.cells[n], cells, atol=5e-4)  # float16
                    assert labels.q[n] == pytest.approx(cells @ centres, abs=1e-5)
