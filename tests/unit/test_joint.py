"""The joint head's parts: bins, distributions, the slice of the vocabulary, self-describing checkpoints, reading."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from tests.doubles import GRID, ROWS, tiny_checkpoint, tiny_model, tiny_tokenizer
from ziprc.engines.base import unknown_rows
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model, save_checkpoint
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.head import JointHead, read_joint_head, read_manifest
from ziprc.joint.readout import TokenPair, batches_by_tokens, read_joint, slice_weight
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.joint.vocabulary import VocabLayout, check_layout, derive_layout
from ziprc.store.manifest import write_sealed

OFFICIAL = BinGrid(tuple(i / 6 for i in range(7)), (0, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768))
BINARY = BinGrid((0.0, 1.0), OFFICIAL.length_edges)


class FakeVocabulary:
    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {f"t{i}": i for i in range(self.size)}


# --- bins -------------------------------------------------------------------------------------------------------------


def test_flat_index_is_reward_major_with_length_fastest():
    assert OFFICIAL.flat_index(0, 7) == 7
    assert OFFICIAL.flat_index(1, 0) == 8
    assert OFFICIAL.flat_index(6, 7) == OFFICIAL.size - 1 == 55


def test_remaining_length_changes_bin_between_255_and_256_and_not_between_256_and_257():
    assert OFFICIAL.length_bin([0, 255, 256, 257, 511, 512]).tolist() == [0, 0, 1, 1, 1, 2]


def test_lengths_at_and_above_the_last_edge_join_the_last_bin():
    assert OFFICIAL.length_bin([16384, 32767, 32768, 10**6]).tolist() == [7, 7, 7, 7]


def test_official_reward_edges_lie_half_way_and_are_clamped_outside():
    assert np.allclose(OFFICIAL.reward_edges, [0, 1 / 12, 3 / 12, 5 / 12, 7 / 12, 9 / 12, 11 / 12, 1])
    assert np.allclose(BINARY.reward_edges, [0, 0.5, 1])


def test_a_score_on_an_edge_belongs_to_the_upper_bin_and_one_to_the_top():
    assert BINARY.reward_bin([0.0, 0.4999, 0.5, 1.0]).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("bad", [float("nan"), -0.01, 1.01, float("inf")])
def test_scores_that_are_no_number_in_the_unit_interval_are_refused(bad):
    with pytest.raises(UserError, match="a score must be a number in"):
        OFFICIAL.reward_bin([0.5, bad])


def test_negative_remaining_tokens_are_refused():
    with pytest.raises(UserError, match="at least 0"):
        OFFICIAL.length_bin([3, -1])


@pytest.mark.parametrize(
    ("centres", "edges"),
    [
        ((0.0,), (0, 1, 2)),
        ((0.5, 0.5), (0, 1, 2)),
        ((0.0, 1.1), (0, 1, 2)),
        ((0.0, 1.0), (1, 2, 3)),
        ((0.0, 1.0), (0, 1)),
    ],
)
def test_grids_that_make_no_sense_are_refused(centres, edges):
    with pytest.raises(UserError, match="must"):
        BinGrid(centres, edges)


def test_a_grid_survives_json():
    assert BinGrid.from_dict(json.loads(json.dumps(OFFICIAL.to_dict()))) == OFFICIAL


# --- distributions ----------------------------------------------------------------------------------------------------


def point(grid: BinGrid, reward: int, length: int) -> JointDistribution:
    cells = np.zeros(grid.size)
    cells[grid.flat_index(reward, length)] = 1
    return JointDistribution(grid, cells)


def test_expectations_use_centres_and_midpoints():
    one = point(BINARY, 1, 2)
    assert one.expected_reward() == 1.0
    assert one.expected_remaining() == 768.0


def test_expected_reward_of_the_golden_vector():
    cells = np.zeros((2, BINARY.size))
    for row, masses in enumerate(
        [{(1, 2): 0.5, (0, 2): 0.1, (1, 5): 0.1, (0, 5): 0.3}, {(1, 3): 0.3, (0, 3): 0.3, (0, 6): 0.4}]
    ):
        for (r, k), p in masses.items():
            cells[row, BINARY.flat_index(r, k)] = p
    both = JointDistribution(BINARY, cells)
    assert np.allclose(both.expected_reward(), [0.6, 0.3])
    assert np.allclose(both.expected_remaining(), [2918.4, 5836.8])


def test_quantiles_interpolate_inside_a_bin():
    grid = BinGrid((0.0, 1.0), (0, 10, 20))
    even = JointDistribution(grid, np.full(4, 0.25))
    assert [float(even.length_quantile(q)) for q in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 5, 10, 15, 20]
    assert float(point(grid, 0, 1).median_remaining()) == 15


def test_a_quantile_skips_empty_bins():
    grid = BinGrid((0.0, 1.0), (0, 1, 2, 3))
    split = JointDistribution(grid, np.array([0.5, 0, 0.5, 0, 0, 0]))
    assert float(split.length_quantile(0.75)) == 2.5


@pytest.mark.parametrize("cells", [np.zeros(4), np.full(4, np.nan), np.full(4, 0.5)])
def test_cells_that_do_not_sum_to_one_are_refused(cells):
    with pytest.raises(UserError, match="sum to 1"):
        JointDistribution(BinGrid((0.0, 1.0), (0, 1, 2)), cells)


def test_the_wrong_number_of_cells_is_refused():
    with pytest.raises(UserError, match="expected 4 cells, found 3"):
        JointDistribution(BinGrid((0.0, 1.0), (0, 1, 2)), np.full(3, 1 / 3))


# --- vocabulary -------------------------------------------------------------------------------------------------------


def test_the_slice_starts_right_above_the_highest_id_in_use():
    layout = derive_layout(FakeVocabulary(151669), 151936, 56)
    assert (layout.text_size, layout.joint_start, layout.joint_stop) == (151669, 151669, 151725)


def test_ids_that_only_the_generation_config_knows_count_as_used():
    class Generation:
        eos_token_id = (7, 12)

    assert derive_layout(FakeVocabulary(10), 32, 4, Generation()).joint_start == 13


def test_an_overlap_is_refused_with_both_ids():
    with pytest.raises(UserError, match=r"starts at row 8, but id 8 .* first free id is\s+10"):
        derive_layout(FakeVocabulary(10), 32, 4, first_row=8)


def test_a_slice_that_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(UserError, match=r"rows 30 to 33 \(4 rows\).* has 32 rows"):
        derive_layout(FakeVocabulary(30), 32, 4)


def test_a_negative_first_row_is_refused():
    with pytest.raises(UserError, match="needs rows -2"):
        check_layout(VocabLayout(32, 10, -2, 4), [0])


def test_a_layout_without_reasoning_rows_is_read_from_records_that_do_not_know_them():
    layout = VocabLayout(32, 10, 10, 4)
    old = {name: value for name, value in asdict(layout).items() if not name.startswith("reasoning")}
    assert len(old) == 4 and VocabLayout.from_dict(old) == layout and layout.reasoning_size == 0
    with pytest.raises(KeyError):
        VocabLayout.from_dict({"vocab_size": 32})


@pytest.mark.parametrize("start", [4, 9, 11, 13, 25])
def test_reasoning_rows_that_overlap_text_or_joint_rows_or_do_not_fit_are_refused(start):
    check_layout(VocabLayout(32, 10, 10, 4, 14, 8), range(10))
    with pytest.raises(UserError, match=rf"needs rows {start} to {start + 7} .* text takes 0 to 9 .* 10 to 13"):
        check_layout(VocabLayout(32, 10, 10, 4, start, 8), range(10))


def test_reasoning_rows_are_kept_with_the_checkpoint_and_banned_like_any_row_that_is_no_token(tmp_path: Path):
    without, model, tokenizer = tiny_checkpoint(tmp_path / "a"), tiny_model(tiny_tokenizer()), tiny_tokenizer()
    head = read_joint_head(without)
    layout = replace(head.layout, reasoning_start=head.layout.joint_stop, reasoning_size=20)
    save_checkpoint(tmp_path / "b", model, tokenizer, {}, JointHead(layout, head.grid))
    assert read_joint_head(tmp_path / "b").layout == layout
    assert read_manifest(tmp_path / "b")["joint"]["layout"]["reasoning_size"] == 20
    assert unknown_rows(tmp_path / "b", tokenizer) == unknown_rows(without, tokenizer) == ((261, ROWS),)


# --- checkpoints and reading ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "ziprc")


def test_a_checkpoint_says_where_its_grid_is_in_both_files(folder: Path):
    head = read_joint_head(folder)
    assert head.grid == GRID
    assert json.loads((folder / "config.json").read_text())["ziprc"] == head.to_dict()
    assert not list(folder.glob("*.bin"))


def test_a_checkpoint_whose_slice_overlaps_its_tokenizer_is_refused_on_load(tmp_path: Path):
    path = tiny_checkpoint(tmp_path / "ziprc")
    record = read_manifest(path)
    record["joint"]["layout"]["joint_start"] = 100
    write_sealed(path / "ziprc.json", record)
    with pytest.raises(UserError, match=r"row 100, but id 100 .* first free id is\s+261"):
        read_joint_head(path)


def test_a_checkpoint_without_a_head_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="has no joint head"):
        read_joint_head(tiny_checkpoint(tmp_path / "base", joint=False))


@pytest.mark.parametrize("offline", [True, False])
def test_a_saved_tokenizer_does_not_tell_whether_the_machine_was_offline(tmp_path: Path, offline: bool) -> None:
    folder = tiny_checkpoint(tmp_path / "ziprc")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=offline)
    assert "local_files_only" in tokenizer.init_kwargs  # else this test is about nothing, and so is the line it holds
    load_tokenizer(folder).save_pretrained(tmp_path / "again")
    assert "local_files_only" not in (tmp_path / "again" / "tokenizer_config.json").read_text()


def test_a_grid_that_does_not_match_its_rows_is_refused(tmp_path: Path):
    path = tiny_checkpoint(tmp_path / "ziprc")
    record = read_manifest(path)
    record["joint"]["grid"]["reward_centres"] = [0, 1]
    write_sealed(path / "ziprc.json", record)
    with pytest.raises(UserError, match="8 cells but the layout 12 rows"):
        read_joint_head(path)


def test_folders_without_model_or_tokenizer_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="not a model folder"):
        load_model(tmp_path)


def test_the_readout_equals_the_slice_of_full_logits_whatever_the_batch(folder: Path):
    model, head = load_model(folder), read_joint_head(folder)
    rng = np.random.default_rng(0)
    pairs = [
        TokenPair(rng.integers(0, 256, p).tolist(), rng.integers(0, 256, m).tolist())
        for p, m in [(3, 5), (7, 1), (2, 9)]
    ]
    for budget in (1, 10_000):
        for i, joint in read_joint(model, head, pairs, budget):
            with torch.inference_mode():
                logits = model(torch.tensor([[*pairs[i].prompt, *pairs[i].response]])).logits[0].float()
            states = logits[len(pairs[i].prompt) - 1 : -1, head.layout.joint_slice]
            assert joint.shape == (len(pairs[i].response), GRID.size)
            assert np.abs(joint - torch.softmax(states, -1).numpy()).max() < 1e-5  # fp32 rounding of two orders of work


def test_the_slice_weight_is_a_view_of_the_output_matrix(folder: Path):
    model, head = load_model(folder), read_joint_head(folder)
    weight = slice_weight(model, head)
    assert weight.shape == (GRID.size, 32)
    assert weight.data_ptr() == model.get_output_embeddings().weight[head.layout.joint_start].data_ptr()


def test_batches_keep_to_the_token_budget_and_hold_every_row_once():
    lengths = [5, 100, 7, 30, 30, 1]
    batches = list(batches_by_tokens(lengths, 64))
    assert sorted(i for batch in batches for i in batch) == list(range(6))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 64 for b in batches)


def test_the_tokenizer_double_leaves_rows_for_the_head():
    assert len(tiny_tokenizer()) + GRID.size <= ROWS
