"""What a base is given before it learns: copies that every reader writes as their sources, or units that change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.doubles import GRID, ROWS, tiny_checkpoint, tiny_model, tiny_tokenizer
from ziprc.config.base import Runtime, Sampling
from ziprc.config.shared import Rollouts
from ziprc.config.vocabulary import Expansion
from ziprc.engines.base import settings_for, unknown_rows
from ziprc.errors import UserError
from ziprc.joint.checkpoint import load_model, save_checkpoint
from ziprc.joint.head import JointHead, read_joint_head
from ziprc.joint.reasoning import INSIDE, ReasoningVocabulary, copied_rows, read_reasoning, text_rows
from ziprc.joint.tokenizer import load_tokenizer, text_ids
from ziprc.joint.vocabulary import derive_layout
from ziprc.store.digests import digest_file
from ziprc.training.expansion import add_copies, copied_ids, rewritten, widen

NOTHING = {"params": {}, "parents": {}}
WORDS = "<|im_start|>user\nSum 12+7, naïve?<|im_end|>\n<think>\n12+7=19 ✓\n</think>\n\n19"


def expanded(folder: Path, own: Expansion, tied: bool = True) -> tuple[Path, ReasoningVocabulary]:
    """A small checkpoint with copies."""
    tokenizer, model = tiny_tokenizer(), tiny_model(tiny_tokenizer(), tied=tied)
    reasoning, marked = add_copies(model, tokenizer, own, [[40, 40, 41]], 0)
    save_checkpoint(folder, model, marked, NOTHING)
    return folder, reasoning


@pytest.mark.parametrize("tied", [True, False])
def test_a_stock_model_loads_it_and_its_bytes_last(tmp_path: Path, tied: bool) -> None:
    folder, reasoning = expanded(tmp_path / "first", Expansion(copies=2), tied)
    assert reasoning.size == 2 * 256 and read_reasoning(folder) == reasoning
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    for matrix in (model.lm_head.weight, model.model.embed_tokens.weight):
        assert len(matrix) == ROWS + 512 and torch.equal(
            matrix[reasoning.rows], matrix[torch.from_numpy(reasoning.of_row)]
        )
    save_checkpoint(tmp_path / "again", load_model(folder), load_tokenizer(folder), NOTHING)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert digest_file(folder / name) == digest_file(tmp_path / "again" / name), name
    assert read_reasoning(tmp_path / "again") == reasoning  # the published loader forgets how many there are


def test_a_copy_is_written_as_its_source_by_every_reader(tmp_path: Path) -> None:
    folder, reasoning = expanded(tmp_path / "model", Expansion(copies=2))
    plain, marked = tiny_tokenizer(), AutoTokenizer.from_pretrained(folder)
    ids = plain.encode(WORDS)
    assert marked.encode(WORDS) == ids  # no text is read as a copy
    place = {source: j for j, source in enumerate(reasoning.of_row.tolist())}  # the last copy of each
    swapped = [reasoning.start + place[i] if i in place else i for i in ids]
    assert sum(a != b for a, b in zip(ids, swapped, strict=True)) > 20
    assert marked.decode(swapped) == plain.decode(ids) == WORDS
    stream = marked.backend_tokenizer.decode(swapped, skip_special_tokens=False)  # what a server's stream is made by
    assert stream == WORDS
    assert marked.convert_ids_to_tokens([swapped[20]]) != marked.convert_ids_to_tokens(
        [ids[20]]
    )  # but they can be told apart
    model = load_model(folder)
    made = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False)
    assert marked.decode(made[0].tolist()).startswith(WORDS)


def test_the_tokenizer_of_a_model_family_keeps_the_mark_out_of_texts_too(tmp_path: Path) -> None:
    """Its own class would make the decoder anew, without what takes marks away."""
    tiny_tokenizer().save_pretrained(tmp_path / "qwen")
    config = tmp_path / "qwen" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "qwen")
    assert type(tokenizer).__name__.startswith("Qwen2")
    reasoning, marked = add_copies(tiny_model(tokenizer), tokenizer, Expansion(), [], 0)
    marked.save_pretrained(tmp_path / "again")
    for again in (AutoTokenizer.from_pretrained(tmp_path / "again"), load_tokenizer(tmp_path / "again")):
        assert again.decode([reasoning.start + 40, 41]) == tokenizer.decode([40, 41])
        assert again.encode(WORDS) == tokenizer.encode(WORDS)
        for name in ("eos_token_id", "pad_token_id", "chat_template", "model_max_length", "all_special_ids"):
            assert getattr(again, name) == getattr(tokenizer, name), name


def test_special_tokens_tags_and_turns_have_no_copies(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    apart = set(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]))
    assert set(copied_ids(tokenizer, Expansion(), []).tolist()) == set(range(261)) - apart
    signs = copied_ids(tokenizer, Expansion(subset="digits+operators"), [])
    assert sorted(tokenizer.decode(signs.tolist())) == sorted("0123456789+-*/=")
    few = copied_ids(tokenizer, Expansion(subset="frequent", frequent=3), [[50, 51, 50], [51, 50, 259, 259, 259], [7]])
    assert few.tolist() == [7, 50, 51]  # the tag, 259, is the most frequent of all


def test_noise_moves_copies_apart_from_their_sources_by_the_seed(tmp_path: Path) -> None:
    rows = []
    for seed in (0, 0, 1):
        model = tiny_model(tiny_tokenizer())
        reasoning, _ = add_copies(model, tiny_tokenizer(), Expansion(init_noise=0.5), [], seed)
        weight = model.get_output_embeddings().weight.detach()
        rows.append(weight[reasoning.rows] - weight[torch.from_numpy(reasoning.of_row)])
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    assert float(rows[0].std() / weight[: reasoning.start].std()) == pytest.approx(0.5, abs=0.05)


def test_copies_and_a_joint_head_share_a_checkpoint(tmp_path: Path) -> None:
    folder, reasoning = expanded(tmp_path / "model", Expansion())
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    copies = copied_rows(model.config)
    head = JointHead(derive_layout(tokenizer, ROWS + 256, GRID.size, model.generation_config, None, copies), GRID)
    assert head.layout.joint_start == 261 == text_rows(tokenizer, model) and head.layout.reasoning_size == 256
    save_checkpoint(tmp_path / "both", model, tokenizer, NOTHING, head)
    assert read_joint_head(tmp_path / "both") == head and read_reasoning(tmp_path / "both") == reasoning
    assert max(text_ids(tmp_path / "both")) == 260
    banned = unknown_rows(tmp_path / "both", tokenizer)
    assert banned == ((261, ROWS),)  # the joint head and what pads it; copies are for the region to ban


def test_whatever_runs_it_knows_of_the_copies_or_bans_them(tmp_path: Path) -> None:
    folder, reasoning = expanded(tmp_path / "model", Expansion())
    asked = (folder, load_tokenizer(folder), Rollouts(), Sampling(), Runtime(), 1)
    with_them, without = settings_for(*asked), settings_for(*asked, copies=False)
    assert with_them.reasoning == reasoning and without.reasoning is None
    assert (reasoning.rows.start, reasoning.rows.stop) in without.banned


@pytest.mark.parametrize("tied", [True, False])
def test_new_units_change_nothing_and_can_learn(tmp_path: Path, tied: bool) -> None:
    before, model = (tiny_model(tiny_tokenizer(), tied=tied) for _ in range(2))
    added = widen(model, 32 * 256)
    assert added == round(32 * 256 / (3 * 32 * 2)) and model.config.intermediate_size == 64 + added
    ids = torch.arange(1, 40)[None]
    torch.testing.assert_close(model(ids).logits, before(ids).logits, rtol=0, atol=1e-6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    mlp = model.model.layers[0].mlp
    assert mlp.down_proj.weight[:, 64:].abs().sum() > 0 and mlp.up_proj.weight.grad[64:].abs().sum() > 0
    save_checkpoint(tmp_path / "wide", model, tiny_tokenizer(), NOTHING)
    torch.testing.assert_close(load_model(tmp_path / "wide")(ids).logits, model.eval()(ids).logits)


def test_a_thought_is_rewritten_and_the_rest_is_not() -> None:
    own = ReasoningVocabulary(300, ((10, 20),), 2, turn=1, opens=2, closes=3)
    rng = np.random.default_rng(0)
    text = [12, 2, *range(8, 22), 3, 12, 13]
    whole = rewritten(text, 0, own, 1.0, rng)
    assert own.plain(whole).tolist() == text and own.is_copy(whole).tolist() == [False] * 4 + [True] * 10 + [False] * 5
    assert rewritten(text, 0, own, 0.0, rng) == text
    assert own.is_copy(rewritten([12, 13], INSIDE, own, 1.0, rng)).all()
    half = own.is_copy(rewritten([2, *[12] * 2000], 0, own, 0.5, rng)).mean()
    assert 0.45 < half < 0.55
    both = set(rewritten([2, *[12] * 50], 0, own, 1.0, rng)[1:])
    assert both == {302, 312}  # each of its copies


def test_what_cannot_have_copies_says_so(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(UserError, match="already"):
        model = tiny_model(tokenizer)
        add_copies(model, tokenizer, Expansion(), [], 0)
        add_copies(model, tokenizer, Expansion(), [], 0)
    with pytest.raises(UserError, match=r"scaled \(final_logit_softcapping\)"):
        model = tiny_model(tokenizer)
        model.config.final_logit_softcapping = 30.0
        add_copies(model, tokenizer, Expansion(), [], 0)
    with pytest.raises(UserError, match="special token"):
        other = tiny_tokenizer()
        other.chat_template = (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
        )
        add_copies(tiny_model(tokenizer), other, Expansion(), [], 0)
    with pytest.raises(UserError, match="no token <think>"):
        text = tokenizer.backend_tokenizer.to_str().replace("<think>", "<thought>")
        other = type(tokenizer)(
            tokenizer_object=type(tokenizer.backend_tokenizer).from_str(text), eos_token="<|im_end|>"
        )
        other.chat_template = tokenizer.chat_template
        add_copies(tiny_model(tokenizer), other, Expansion(), [], 0)


def test_a_changed_config_is_noticed(tmp_path: Path) -> None:
    folder, _ = expanded(tmp_path / "model", Expansion())
    record = json.loads((folder / "config.json").read_text())
    record["ziprc"]["reasoning"]["start"] -= 1
    (folder / "config.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="copies are its last ones"):
        read_reasoning(folder)
    assert read_reasoning(tiny_checkpoint(tmp_path / "plain")) is None
