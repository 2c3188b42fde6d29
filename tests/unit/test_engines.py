"""The reference engine's sampler, the rows it may never sample, and the rollouts stage around it (no vLLM needed)."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.doubles import World
from ziprc.chat import CHATML_TEMPLATE
from ziprc.config.base import Sampling
from ziprc.config.load import Config
from ziprc.engines import start
from ziprc.engines.base import EngineSettings, Request, gaps, own_dtype, stop_token_ids, unknown_rows
from ziprc.engines.hf import filtered, gumbel_noise, sample
from ziprc.engines.recording import Recording, Wanted
from ziprc.engines.taps import ReadJoint, ReadStates, TextRows, taps_of
from ziprc.engines.workers import share_out
from ziprc.errors import UserError
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import save_checkpoint
from ziprc.joint.head import JointHead
from ziprc.joint.readout import TokenPair, read_joint
from ziprc.joint.vocabulary import derive_layout
from ziprc.stages import rollouts
from ziprc.store.digests import digest_file
from ziprc.store.layout import Layout, manifest_of
from ziprc.store.manifest import write_manifest
from ziprc.tables.pieces import Pieces
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS, FinishReason

GRID = BinGrid((0.0, 1.0), (0, 8, 16, 32, 64))
VOCAB_SIZE = 288
PROMPT_COUNT = 7


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the two tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def random_model(eos: int, seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=VOCAB_SIZE, max_position_embeddings=256, initializer_range=0.3,
        tie_word_embeddings=True, eos_token_id=eos, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def make_world(root: Path) -> Layout:
    """A results folder with test prompts, a random base and a `ziprc` checkpoint."""
    layout = Layout(root, "x")
    tokenizer = byte_tokenizer()
    head = JointHead(derive_layout(tokenizer, VOCAB_SIZE, GRID.size), GRID)
    save_checkpoint(layout.checkpoint("base"), random_model(tokenizer.eos_token_id), tokenizer, {})
    save_checkpoint(layout.checkpoint("ziprc"), random_model(tokenizer.eos_token_id, 1), tokenizer, {}, head)
    rows = [
        dict(prompt_id=f"p{i}", task="t", source="t", split="test",
             messages=[{"role": "user", "content": "?" * (i + 1)}], answer="1", difficulty="d", extra="{}")
        for i in range(PROMPT_COUNT)
    ]  # fmt: skip
    for split in ("train", "test"):
        PROMPTS.write(layout.table("prompts", split), PROMPTS.make(rows))
        write_manifest(layout.table("prompts", split), {}, {})
    return layout


def make_config(**runtime: int) -> Config:
    own = dict(engine="hf", max_model_len=128, max_new_tokens=24, test_samples=3, pool_samples=3,
               thinking_samples=2, non_thinking_samples=1, many_prompts=2, many_samples=5)  # fmt: skip
    return Config.model_validate({"rollouts": own, "runtime": {"shard_prompts": 2, **runtime}})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return make_world(tmp_path_factory.mktemp("results"))


@pytest.fixture
def settings(world: Layout) -> EngineSettings:
    folder = world.checkpoint("ziprc")
    tokenizer = byte_tokenizer()
    return EngineSettings(
        folder, Sampling(), stop_token_ids(folder, tokenizer), unknown_rows(folder, tokenizer), max_model_len=128
    )


def some_requests(count: int, cap: int = 24) -> list[Request]:
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 250, rng.integers(2, 20)).tolist()) for _ in range(count)]
    return [Request(str(i), prompt, 1000 + i, cap) for i, prompt in enumerate(prompts)]


# --- the sampler ----------------------------------------------------------------------------------------------------


def test_draws_follow_the_softmax() -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(20_000)]
    settings = [Sampling(min_p=0.0)] * 20_000
    counts = np.bincount(sample(logits.expand(20_000, -1), settings, generators), minlength=12)
    # standard error of a frequency is at most 0.0035; 4 of them
    assert np.abs(counts / 20_000 - logits.softmax(-1)[0].numpy()).max() < 0.014


def test_gumbel_noise_has_the_moments_of_a_gumbel_and_no_shifted_copies() -> None:
    noise = gumbel_noise(range(200), 500)
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert noise.var() == pytest.approx(np.pi**2 / 6, abs=0.05)
    assert abs(np.corrcoef(noise[0, 1:], noise[1, :-1])[0, 1]) < 0.2


def test_filters_keep_what_their_definitions_say() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def kept(**options: float) -> list[int]:
        return torch.isfinite(filtered(logits, Sampling(**{"min_p": 0.0, **options}))[0]).nonzero().flatten().tolist()

    assert kept() == [0, 1, 2, 3]
    assert kept(min_p=0.4) == [0, 1]
    assert kept(top_k=3) == [0, 1, 2]
    assert kept(top_p=0.7) == [0, 1]
    assert kept(top_p=0.01) == [0]


def test_temperature_zero_is_the_argmax() -> None:
    logits = torch.randn(5, 9)
    assert torch.equal(sample(logits, [Sampling(temperature=0.0)] * 5, []), logits.argmax(-1))


def test_every_row_is_drawn_with_its_own_settings() -> None:
    logits, greedy, sampled = torch.randn(40, 9), Sampling(temperature=0.0), Sampling(temperature=3.0, min_p=0.0)

    def drawn(rows: range, settings: list[Sampling]) -> list[int]:
        generators = [torch.Generator().manual_seed(i) for i in rows]
        return sample(logits[list(rows)], settings, generators).tolist()

    mixed = drawn(range(40), [greedy, sampled] * 20)
    assert mixed[::2] == logits[::2].argmax(-1).tolist()
    assert mixed[1::2] == drawn(range(1, 40, 2), [sampled] * 20) != logits[1::2].argmax(-1).tolist()


# --- what an engine is told about a checkpoint ----------------------------------------------------------------------


def test_gaps_are_the_rows_without_a_token() -> None:
    assert gaps([0, 1, 3, 7], 10) == ((2, 3), (4, 7), (8, 10))
    assert gaps(range(10), 10) == ()


def test_every_end_token_stops(world: Layout, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert stop_token_ids(tmp_path, tokenizer) == (3, tokenizer.eos_token_id)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    assert stop_token_ids(tmp_path, tokenizer) == (4, 5, tokenizer.eos_token_id)


@pytest.mark.parametrize(
    ("checkpoint", "on_cpu", "native", "dtype"),
    [("float32", True, False, "float32"), ("float16", True, False, "float16"), ("bfloat16", True, True, "bfloat16"),
     ("bfloat16", False, False, "bfloat16"), ("bfloat16", True, False, "float32")],
)  # fmt: skip
def test_dtype_auto_is_that_of_the_checkpoint_unless_the_processor_would_emulate_it(
    settings: EngineSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    checkpoint: str, on_cpu: bool, native: bool, dtype: str,
) -> None:  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"dtype": checkpoint}))
    monkeypatch.setattr("ziprc.engines.base.native_bfloat16", lambda: native)
    own = replace(settings, model=tmp_path, dtype="auto")
    assert own_dtype(own, on_cpu) == dtype
    assert ("runs in float32" in capsys.readouterr().err) == (dtype != checkpoint)
    assert own_dtype(replace(own, dtype="bfloat16"), on_cpu) == "bfloat16"  # who names it gets it


def test_what_is_known_of_engines_before_one_starts_needs_no_torch() -> None:
    program = "import sys, ziprc.engines.base, ziprc.engines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_an_unknown_engine_is_refused(settings: EngineSettings) -> None:
    with pytest.raises(UserError, match="did you mean 'vllm'"):
        start("vlm", settings)


def test_a_context_longer_than_the_model_is_refused(settings: EngineSettings) -> None:
    with pytest.raises(UserError, match="has 256 positions"):
        start("hf", replace(settings, max_model_len=512))


# --- the reference engine -------------------------------------------------------------------------------------------


def test_a_response_depends_on_its_request_alone(settings: EngineSettings) -> None:
    requests = some_requests(12)
    together = start("hf", settings).generate(requests)
    assert [r.key for r in together] == [r.key for r in requests]
    in_small_batches = start("hf", replace(settings, max_num_seqs=3)).generate(requests[::-1])[::-1]
    assert [r.token_ids for r in together] == [r.token_ids for r in in_small_batches]


def test_finish_reasons_and_stop_tokens(settings: EngineSettings) -> None:
    heard: list[int] = []
    everything_stops = replace(settings, stop_token_ids=tuple(range(0, 256, 8)))
    responses = start("hf", everything_stops).generate(some_requests(40, cap=6), heard.append)
    for response in responses:
        stopped = response.token_ids[-1] % 8 == 0 and response.token_ids[-1] < 256
        assert response.finish_reason == (FinishReason.STOP if stopped else FinishReason.LENGTH)
        assert stopped or len(response.token_ids) == 6
        assert not any(i % 8 == 0 and i < 256 for i in response.token_ids[:-1])
    assert {r.finish_reason for r in responses} == {FinishReason.STOP, FinishReason.LENGTH}
    assert sorted(heard) == sorted(len(r.token_ids) for r in responses)


def test_the_reading_while_sampling_is_the_labelled_state(settings: EngineSettings) -> None:
    from ziprc.joint.checkpoint import load_model
    from ziprc.joint.head import read_joint_head

    head = read_joint_head(settings.model)
    requests = some_requests(6)
    responses = start("hf", replace(settings, joint=head)).generate(requests)
    pairs = [TokenPair(q.prompt_token_ids, r.token_ids) for q, r in zip(requests, responses, strict=True)]
    for i, joint in read_joint(load_model(settings.model), head, pairs):
        np.testing.assert_allclose(responses[i].joint, joint, atol=1e-5)


def test_reserved_rows_are_never_sampled_by_the_reference(settings: EngineSettings) -> None:
    hot = replace(settings, sampling=Sampling(temperature=2.0, min_p=0.0), stop_token_ids=(), max_model_len=250)

    def reserved(one: EngineSettings, count: int) -> tuple[int, int]:
        tokens = [i for r in start("hf", one).generate(some_requests(count, cap=200)) for i in r.token_ids]
        return sum(i >= hot.banned[0][0] for i in tokens), len(tokens)

    found, total = reserved(hot, 500)
    assert (found, total) == (0, 100_000)
    assert reserved(replace(hot, banned=()), 20)[0] > 50  # the same settings do sample them when nothing is banned


def test_a_request_can_have_its_own_settings_and_stop_tokens(settings: EngineSettings) -> None:
    greedy, stops = Sampling(temperature=0.0), tuple(range(0, 256, 8))
    plain = some_requests(12)
    asked = [replace(q, sampling=greedy) if i % 3 == 0 else q for i, q in enumerate(plain)]
    asked = [replace(q, stop=stops) if i % 2 else q for i, q in enumerate(asked)]
    engine = start("hf", settings)
    mixed, usual = engine.generate(asked), engine.generate(plain)
    all_greedy = start("hf", replace(settings, sampling=greedy)).generate(plain)
    ended = 0
    for i, response in enumerate(mixed):
        alone = (all_greedy if i % 3 == 0 else usual)[i].token_ids
        cut = next((j + 1 for j, token in enumerate(alone) if i % 2 and token in stops), len(alone))
        assert response.token_ids == alone[:cut]
        ended += cut < len(alone) and response.finish_reason is FinishReason.STOP
    assert ended


def test_a_session_without_a_head_samples_the_same(settings: EngineSettings) -> None:
    engine, tokens = start("hf", settings), defaultdict(list)
    session, requests = engine.session(), some_requests(5)
    for request in requests:
        session.add(request)
    while (step := session.step()) is not None:
        assert step.joint is None and np.isfinite(step.entropy).all()
        for key, token in zip(step.keys, step.token_ids.tolist(), strict=True):
            tokens[key].append(token)
    assert [tuple(tokens[q.key]) for q in requests] == [r.token_ids for r in engine.generate(requests)]


def watchdogs() -> int:
    return sum(thread.name == "watchdog" for thread in threading.enumerate())


def test_an_engine_that_fails_in_the_middle_of_its_work_is_closed(settings: EngineSettings, tmp_path: Path) -> None:
    before = watchdogs()
    no_token = Wanted("p", True, 0, 1, (VOCAB_SIZE,))  # its row is outside the embedding
    job = Recording(Pieces(tmp_path, ROLLOUTS, "", [0]), "hf", settings, "base", 4)
    with pytest.raises(IndexError):
        job.run("x", [(0, [no_token])])
    assert watchdogs() == before


# --- how readings find their tokens ---------------------------------------------------------------------------------


def test_the_later_reading_of_a_position_counts() -> None:
    def chances(*values: float) -> torch.Tensor:
        return torch.tensor([[value, 1 - value] for value in values]).log()

    reader = ReadJoint(slice(0, 2))
    reader.apply([(0, -3)], chances(0.9), ())  # a part of its prompt
    reader.apply([(0, 0), (1, 0)], chances(0.1, 0.2), ())
    reader.apply([(0, 0)], chances(0.3), ())  # computed again
    reader.apply([(1, 1), (0, 1)], chances(0.4, 0.5), ())
    reader.apply([(0, 2)], chances(0.6), ())  # under way when request 0 stopped
    first, second = reader.by_request([2, 2])
    np.testing.assert_allclose(first[:, 0], [0.3, 0.5], rtol=1e-6)
    np.testing.assert_allclose(second[:, 0], [0.2, 0.4], rtol=1e-6)


def test_a_reading_waits_for_the_tokens_of_its_own_forward_pass() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    allowed = logits[:, [0, 1, 4, 5]].log_softmax(-1)
    reader = ReadStates(slice(2, 4), TextRows([(2, 4)], 6))
    reader.apply([(9, 0)], logits[:1], ())  # a part of a prefill: nothing is drawn
    reader.apply([(7, 3), (9, 0), (8, 1)], logits[1:], ())
    reader.apply([(9, 1)], logits[:1], ())  # already under way
    states = reader.take([(9, 0), (8, 1)], np.array([1, 5], dtype=np.int32))  # request 7 was aborted
    np.testing.assert_allclose(states.log_prob, [allowed[2, 1], allowed[3, 3]], rtol=1e-6)
    np.testing.assert_allclose(states.joint, logits[[2, 3], 2:4].softmax(-1), rtol=1e-6)
    entropy = torch.distributions.Categorical(logits=allowed[[2, 3]]).entropy()
    np.testing.assert_allclose(states.entropy, entropy, rtol=1e-5)
    assert reader.take([(9, 1)], np.array([0], dtype=np.int32)).log_prob[0] == pytest.approx(float(allowed[0, 0]))


def test_what_is_read_is_read_before_it_is_banned(settings: EngineSettings) -> None:
    reader, logits = ReadJoint(slice(*settings.banned[0])), torch.randn(2, VOCAB_SIZE)
    said = logits[:, reader.joint].softmax(-1)
    for tap in taps_of(settings, reader):
        tap.apply([(0, 0), (1, 0)], logits, ())
    np.testing.assert_array_equal(np.concatenate(reader.by_request([1, 1])), said)
    assert torch.isneginf(logits[:, reader.joint]).all() and torch.isfinite(logits[:, : settings.banned[0][0]]).all()


# --- the stage ------------------------------------------------------------------------------------------------------


def test_the_table_holds_what_was_planned(world: Layout) -> None:
    config = make_config()
    line = rollouts.run(World(config, world).context("rollouts", "train"))
    table = ROLLOUTS.read(world.table("rollouts", "train"))
    assert line.startswith(f"wrote {PROMPT_COUNT * 3} rollouts of ")
    assert table["prompt_id"].to_pylist() == [f"p{i}" for i in range(PROMPT_COUNT) for _ in range(3)]
    assert table["thinking"].to_pylist() == [True, True, False] * PROMPT_COUNT
    first, tokenizer = table.slice(0, 1).to_pylist()[0], byte_tokenizer()
    assert tokenizer.decode(first["prompt_token_ids"]) == "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n"
    assert "<think>\n\n</think>" in tokenizer.decode(table["prompt_token_ids"][2].as_py())
    assert max(max(ids) for ids in table["response_token_ids"].to_pylist()) < len(tokenizer)
    assert not (world.home / "rollouts" / ".train.pieces").exists()
    manifest = json.loads(manifest_of(world.table("rollouts", "train")).read_text())
    assert manifest["params"]["rollouts.thinking_samples"] == 2 and set(manifest["parents"]) == {"prompts", "policy"}
    assert table.schema.metadata.keys() >= {b"sampling", b"tokenizer"}


def test_drift_is_paired_and_many_is_many(world: Layout) -> None:
    tables = {}
    for name in ("test", "test-ziprc", "test-many"):
        rollouts.run(World(make_config(), world).context("rollouts", name))
        tables[name] = ROLLOUTS.read(world.table("rollouts", name))
    assert tables["test"]["seed"] == tables["test-ziprc"]["seed"]
    assert tables["test"]["rollout_id"] != tables["test-ziprc"]["rollout_id"]
    assert set(tables["test-ziprc"]["policy"].to_pylist()) == {"ziprc"}
    assert tables["test-many"]["prompt_id"].to_pylist() == ["p0"] * 5 + ["p1"] * 5


def test_an_interrupted_stage_resumes_by_finished_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path)
    context = World(make_config(), world).context("rollouts", "test")
    rollouts.run(context)
    whole = digest_file(world.table("rollouts", "test"))
    world.table("rollouts", "test").unlink()

    made: list[int] = []
    write = Pieces.write

    def watched(self: Pieces, number: int, *rest: object) -> None:
        if len(made) == 2:
            made.append(-1)
            raise KeyboardInterrupt
        made.append(number)
        write(self, number, *rest)

    work = world.home / "rollouts" / ".test.pieces"
    monkeypatch.setattr(Pieces, "write", watched)
    with pytest.raises(KeyboardInterrupt):
        rollouts.run(context)
    (work / "00009-stale.parquet").write_text("from other inputs")
    kept = {path.name: path.stat().st_mtime_ns for path in work.iterdir()}
    assert len(kept) == 5  # two pieces with their manifests

    rollouts.run(context)
    assert made == [0, 1, -1, 2, 3]
    assert digest_file(world.table("rollouts", "test")) == whole and not work.exists()


def test_other_science_uses_other_pieces(world: Layout) -> None:
    names = []
    for config in (make_config(), make_config(max_num_seqs=5), make_config().model_copy(update={"seed": 1})):
        names.append(World(config, world).context("rollouts", "test").pieces(ROLLOUTS, [(0, 2)]).path(0).name)
    assert names[0] == names[1] != names[2]


@pytest.mark.parametrize("runtime", [{"workers": 2}, {"shard_prompts": 3}])
def test_who_makes_the_pieces_and_how_large_they_are_changes_no_byte(world: Layout, runtime: dict[str, int]) -> None:
    digests = []
    for own in ({}, runtime):
        rollouts.run(World(make_config(**own), world).context("rollouts", "test"))
        digests.append(digest_file(world.table("rollouts", "test")))
    assert digests[0] == digests[1]


def test_a_worker_that_dies_fails_the_stage(settings: EngineSettings, tmp_path: Path) -> None:
    pieces = Pieces(tmp_path, ROLLOUTS, "", [0, 1])
    job = Recording(pieces, "hf", replace(settings, model=tmp_path), "base", 4)  # a folder without a model
    with pytest.raises(UserError, match=r"rollouts, worker . of 2 died with exit code 2"):
        share_out("rollouts", job.run, [(0, ()), (1, ())], 2, 1)


def test_prompts_that_do_not_fit_are_refused_with_the_numbers(world: Layout) -> None:
    config = make_config()
    tight = config.model_copy(update={"rollouts": config.rollouts.model_copy(update={"max_model_len": 48})})
    numbers = r"2 of 7 prompts.*prompt p6 has 26 tokens.*24 new tokens.*limit of 48.*at least 50"
    with pytest.raises(UserError, match=numbers):
        rollouts.run(World(tight, world).context("rollouts", "test"))


@pytest.mark.parametrize("name", ["tset", "test-zipcr", "base"])
def test_an_unknown_table_is_refused(world: Layout, name: str) -> None:
    with pytest.raises(UserError, match=f"rollouts has no '{name}'"):
        rollouts.run(World(make_config(), world).context("rollouts", name))


def test_no_disk_space_is_said_before_the_engine_starts(world: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="MiB free"):
        rollouts.run(World(make_config(), world).context("rollouts", "test"))
