"""Small real objects for tests: a random Qwen3 with a byte-level tokenizer, and the tables of a tiny experiment.

`tiny_checkpoint` makes a model folder in a second; `tiny_experiment` writes prompts, rollouts and grades whose success
depends on the prompt and shows in the response, so that predictors have something to find. `ScriptedSession` is an
engine under live control without a model: what it says is a hash of the text.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ziprc.chat import CHATML_TEMPLATE, prompt_token_ids
from ziprc.config.load import Config, load_yaml
from ziprc.engines.base import Request, Step, check_request
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import save_checkpoint
from ziprc.joint.head import JointHead
from ziprc.joint.vocabulary import derive_layout
from ziprc.plan.stage import Ref
from ziprc.sampling.fitting import Calibration, Fitted
from ziprc.sampling.score import JointCalibration, Logistic, Stages
from ziprc.sampling.selection import VoteModel
from ziprc.stages.context import Context
from ziprc.store.layout import Layout
from ziprc.store.manifest import write_manifest
from ziprc.systems import graph_of
from ziprc.tables.baselines import BASELINES
from ziprc.tables.grades import GRADES
from ziprc.tables.introspection import INTROSPECTION
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS, FinishReason
from ziprc.tables.samples import SAMPLES
from ziprc.tables.values import VALUES
from ziprc.training.objectives.joint import Reference

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
GRID = BinGrid((0.0, 0.5, 1.0), (0, 8, 16, 32, 64))
ROWS = 320


def kl_inputs(
    P: int, V: int, D: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, Reference]:
    """Random states [P, D] and output matrix [V, D], which want gradients, and a reference with its own."""
    rng = torch.Generator().manual_seed(seed)
    h, W, h_ref, W_ref = (scale * torch.randn(n, D, generator=rng, dtype=dtype) for n in (P, V, P, V))
    return h.requires_grad_(), W.requires_grad_(), Reference(h_ref, W_ref)


@dataclass(frozen=True)
class World:
    """An experiment without a configuration file."""

    config: Config
    layout: Layout

    def context(self, stage: str, name: str) -> Context:
        """What a stage is given."""
        return Context(graph_of(self.config, self.layout), Ref(stage, name))


# The experiments of the package; another seed makes no other plan.
OVERLAYS = load_yaml(Path(__file__).parents[1] / "config.yaml")["experiments"]
PLANNED = [name for name, own in OVERLAYS.items() if set(own or {}) != {"extends", "seed"}]
TABLES = {t.name: t for t in (BASELINES, GRADES, INTROSPECTION, PROMPTS, ROLLOUTS, SAMPLES, VALUES)}
TIGHT_BLOCKS = 40  # of 32 tokens


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, no merges, Qwen3's special tokens: 261 ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML_TEMPLATE
    return tokenizer


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0, tied: bool = True) -> Qwen3ForCausalLM:
    """A Qwen3 with random weights and 320 output rows."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=ROWS, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512, tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def thinking_tokenizer() -> PreTrainedTokenizerFast:
    """The same, whose prompts end in an open thinking block: a random model would hardly ever open one."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant\n' }}", "assistant\n<think>\n' }}")
    assert "<think>\n' }}" in tokenizer.chat_template
    return tokenizer


def tiny_checkpoint(
    folder: Path, joint: bool = True, seed: int = 0, grid: BinGrid = GRID, tied: bool = True, thinking: bool = False
) -> Path:
    """A complete checkpoint folder, with or without a joint head; equal seeds give equal weights."""
    tokenizer = thinking_tokenizer() if thinking else tiny_tokenizer()
    model = tiny_model(tokenizer, seed, tied)
    head = JointHead(derive_layout(tokenizer, ROWS, grid.size, model.generation_config), grid) if joint else None
    save_checkpoint(folder, model, tokenizer, {"params": {"seed": seed}, "parents": {}}, head)
    return folder


def servable_checkpoint(folder: Path, joint: bool = False) -> Path:
    """A random model with its tokenizer, whose heads vLLM can run on a CPU; the same weights every time."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=ROWS, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    head = JointHead(derive_layout(tokenizer, ROWS, GRID.size, model.generation_config), GRID) if joint else None
    save_checkpoint(folder, model, tokenizer, {"params": {}, "parents": {}}, head)
    return folder


def even(inputs: int) -> Logistic:
    """P(right) = 0.3, whatever it sees."""
    return Logistic((0.0,) * inputs, (1.0,) * inputs, (0.0,) * (inputs + inputs * (inputs + 1) // 2), -0.85)


def tiny_fitted() -> Fitted:
    """A calibration that finds all branches alike."""
    return Fitted(GRID, Calibration(Stages((even(9),)), even(9), VoteModel(), 2.0), JointCalibration(), even(7))


def small_qwen3(folder: Path, rows: int) -> Path:
    """A random Qwen3 without a tokenizer, with heads that vLLM can run on a CPU; the same weights every time."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, vocab_size=rows, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=True,
        eos_token_id=5, bos_token_id=None,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def tight(engine: type) -> type:
    """An engine class whose KV cache is too small for its batch: requests are preempted and computed again."""

    class Tight(engine):  # type: ignore[misc]
        def _arguments(self) -> dict[str, Any]:
            return {**super()._arguments(), "num_gpu_blocks_override": TIGHT_BLOCKS}

    return Tight


def _write(layout: Layout, kind: str, name: str, table: pa.Table) -> None:
    target = layout.table(kind, name)
    TABLES[kind].write(target, table)
    write_manifest(target, {}, {})


def _response(rng: np.random.Generator, good: bool, steps: int, answer: int) -> str:
    """More steps for longer; failures use 'x' where successes use '+', at the end only."""
    body = "".join(rng.choice(list(string.ascii_lowercase[:8]), size=int(rng.integers(2, 6)) * steps))
    return f"<think>\n{body}{'+' if good else 'x'}=\n</think>\n\n{answer if good else answer + 1}"


def tiny_tables(
    layout: Layout, split: str, prompts: int, samples: int, seed: int = 0, unfinished: float = 0.05
) -> None:
    """Write rollouts and grades of a split, and its prompts unless it is a variant of one (`test-many`, a pool)."""
    rng = np.random.default_rng([seed, len(split), *split.encode()])
    tokenizer = tiny_tokenizer()
    stem = split.partition("-")[0]
    asked, rollouts, grades = [], [], []
    for p in range(prompts):
        hard = p % 2
        prompt: dict[str, Any] = {
            "prompt_id": f"{stem}-{p}", "task": "arithmetic", "source": "arithmetic", "split": stem,
            "messages": [{"role": "user", "content": f"Compute {p}+{hard * 100}"}], "answer": str(p + hard * 100),
            "difficulty": ("2 steps, small", "3 steps, big")[hard], "extra": "{}",
        }  # fmt: skip
        asked.append(prompt)
        ids = prompt_token_ids(tokenizer, prompt["messages"], thinking=True)
        for k in range(samples):
            good, cut = bool(rng.random() < (0.8, 0.3)[hard]), bool(rng.random() < unfinished)
            text = _response(rng, good, 2 + hard, p + hard * 100)
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            tokens = tokens[:20] if cut else [*tokens, tokenizer.eos_token_id]
            name = f"{split}-{p}-{k}"
            rollouts.append(
                {"rollout_id": name, "prompt_id": prompt["prompt_id"], "sample_index": k, "seed": p * 1000 + k,
                 "prompt_token_ids": ids, "response_token_ids": tokens, "response_text": tokenizer.decode(tokens[:-1]),
                 "finish_reason": "length" if cut else "stop", "thinking": True, "policy": "base"}
            )  # fmt: skip
            grades.append(
                {"rollout_id": name, "grader": "exact", "score": None if cut else float(good),
                 "status": "unfinished" if cut else "graded", "extracted_answer": None, "rationale": None}
            )  # fmt: skip
    if stem == split:
        _write(layout, "prompts", split, PROMPTS.make(asked))
    _write(layout, "rollouts", split, ROLLOUTS.make(rollouts))
    _write(layout, "grades", split, GRADES.make(grades))


def tiny_experiment(layout: Layout, folds: int = 2) -> None:
    """Everything that `values`, `introspection`, `baselines`, `evaluate` and `report` read, with random heads."""
    tiny_checkpoint(layout.checkpoint("base"), joint=False)
    binary = BinGrid((0.0, 1.0), GRID.length_edges)
    for i, name in enumerate(["noisy"] if folds == 1 else [f"noisy-fold{i}" for i in range(folds)]):
        tiny_checkpoint(layout.checkpoint(name), seed=10 + i, grid=binary)
    tiny_checkpoint(layout.checkpoint("ziprc"), seed=1)
    tiny_checkpoint(layout.checkpoint("lite"), seed=2)
    tiny_tables(layout, "train", prompts=30, samples=4)
    tiny_tables(layout, "test", prompts=12, samples=8)
    tiny_tables(layout, "test-many", prompts=6, samples=16)
    tiny_tables(layout, "test-ziprc", prompts=12, samples=10)
    tiny_tables(layout, "validation-ziprc", prompts=5, samples=6)


STOP_TOKEN, FIRST_RESPONSE_TOKEN = 1, 1000  # tokens of prompts lie between
CELLS = 8


@dataclass(frozen=True)
class Script:
    """What a scripted engine says.

    Tokens and readings are hashes of the text. Two responses differ because the first token of a response hangs on the
    seed too; with `seeded` every token does, so that a resumed response goes another way. `seats` requests are served at a
    time, each with probability `pace` per step.
    """

    stop: float = 0.05  # chance of the stop token
    seats: int = 1 << 30
    pace: float = 1.0
    seeded: bool = True
    log_prob: float | None = None  # of every token; None: a hash too
    max_model_len: int = 1 << 20
    block: int = 4  # tokens of a prompt that are cached together


@dataclass
class _Scripted:
    """One request in flight; `state` has been fed the text so far."""

    request: Request
    state: Any
    emitted: int = 0
    log_prob: float = 0.0
    cached: int = 0


def _uniforms(state: Any, *salt: int) -> np.ndarray:
    """[16] numbers in (0, 1) that hang on all that `state` has been fed, and on the salt."""
    own = state.copy()
    own.update(np.array(salt, np.int64).tobytes())
    return (np.frombuffer(own.digest(), np.uint32) + 0.5) / 2.0**32


class ScriptedSession:
    """A `Session` without a model, which remembers what it was asked and what it emitted. `fail` is called every step."""

    def __init__(self, script: Script, seed: int = 0, fail: Callable[[ScriptedSession], None] | None = None) -> None:
        self.script, self.fail = script, fail
        self.rng = np.random.default_rng(seed)
        self.rows: dict[str, _Scripted] = {}
        self.requests: dict[str, Request] = {}
        self.emitted: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}  # prompt tokens that were not cached
        self.known: set[tuple[int, ...]] = set()  # texts whose blocks are cached
        self.closed = False

    def add(self, request: Request) -> None:
        assert not self.closed and request.key not in self.requests, "a runner uses each key once"
        check_request(request, self.rows, self.script.max_model_len)
        state = hashlib.blake2b(np.array(request.prompt_token_ids, np.int64).tobytes(), digest_size=64)
        self.rows[request.key] = _Scripted(request, state)
        self.requests[request.key] = request
        self.emitted[request.key] = []

    def abort(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.rows.pop(key, None)

    def close(self) -> None:
        self.rows.clear()
        self.closed = True

    def step(self) -> Step | None:
        assert not self.closed
        if self.fail is not None:
            self.fail(self)
        seated = list(self.rows.values())[: self.script.seats]
        served = [row for row in seated if self.rng.random() < self.script.pace] or seated[:1]
        if not served:
            return None
        rows = [self._emit(row) for row in served]
        token_ids, position, finish, joint, log_prob, entropy, cached = zip(*rows, strict=True)
        return Step(
            keys=[row.request.key for row in served],
            token_ids=np.array(token_ids, np.int32),
            position=np.array(position, np.int32),
            finish=list(finish),
            joint=np.array(joint, np.float32),
            log_prob=np.array(log_prob, np.float32),
            entropy=np.array(entropy, np.float32),
            cached=np.array(cached, np.int32),
        )

    def _emit(self, row: _Scripted) -> tuple[Any, ...]:
        """One row of a step."""
        request, position = row.request, row.emitted
        if position == 0:
            row.cached = self._cached(request.prompt_token_ids)
            self.computed[request.key] = len(request.prompt_token_ids) - row.cached
        said = _uniforms(row.state, 0)
        joint = np.maximum(said[:CELLS], 0.01) ** 3
        first = position == 0 and request.prompt_token_ids[-1] < FIRST_RESPONSE_TOKEN
        drawn = _uniforms(row.state, 1, *((request.seed, position) if first or self.script.seeded else ()))
        stops = drawn[0] < self.script.stop and not first
        token = STOP_TOKEN if stops else FIRST_RESPONSE_TOKEN + int(drawn[1] * 1e6)
        log_prob, row.log_prob = row.log_prob, self._log_prob(row.state, token)
        row.state.update(np.array([token], np.int64).tobytes())
        row.emitted += 1
        self.emitted[request.key].append(token)
        capped = row.emitted >= request.max_new_tokens
        finish = FinishReason.STOP if stops else FinishReason.LENGTH if capped else None
        if finish is not None:
            del self.rows[request.key]
        self.known.add((*request.prompt_token_ids, *self.emitted[request.key]))
        return token, position, finish, joint / joint.sum(), log_prob, 3 * said[CELLS], row.cached

    def _log_prob(self, state: Any, token: int) -> float:
        return float(-3 * _uniforms(state, 2, token)[0] ** 2) if self.script.log_prob is None else self.script.log_prob

    def _cached(self, prompt: tuple[int, ...]) -> int:
        """Whole blocks, and never the last token."""
        return (len(prompt) - 1) // self.script.block * self.script.block if prompt in self.known else 0
