"""Small real objects for tests: a random Qwen3 with a byte-level tokenizer, and the tables of a tiny experiment.

`tiny_checkpoint` makes a model folder in a second; `tiny_experiment` writes prompts, rollouts and grades whose success
depends on the prompt and shows in the response, so that predictors have something to find.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ziprc.artifacts import Layout, write_manifest
from ziprc.chat import CHATML_TEMPLATE, prompt_token_ids
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import JointHead, save_checkpoint
from ziprc.joint.vocabulary import derive_layout
from ziprc.schemas import make_table, write_table

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
GRID = BinGrid((0.0, 0.5, 1.0), (0, 8, 16, 32, 64))
ROWS = 320


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


def tiny_checkpoint(folder: Path, joint: bool = True, seed: int = 0, grid: BinGrid = GRID, tied: bool = True) -> Path:
    """A complete checkpoint folder, with or without a joint head; equal seeds give equal weights."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, seed, tied)
    head = JointHead(derive_layout(tokenizer, ROWS, grid.size, model.generation_config), grid) if joint else None
    save_checkpoint(folder, model, tokenizer, {"params": {"seed": seed}, "parents": {}}, head)
    return folder


def _write(layout: Layout, kind: str, name: str, table: pa.Table) -> None:
    target = layout.table(kind, name)
    write_table(target, kind, table)
    write_manifest(target, {}, {})


def _response(rng: np.random.Generator, good: bool, steps: int, answer: int) -> str:
    """More steps for longer; failures use 'x' where successes use '+', at the end only."""
    body = "".join(rng.choice(list(string.ascii_lowercase[:8]), size=int(rng.integers(2, 6)) * steps))
    return f"<think>\n{body}{'+' if good else 'x'}=\n</think>\n\n{answer if good else answer + 1}"


def tiny_tables(
    layout: Layout, split: str, prompts: int, samples: int, seed: int = 0, unfinished: float = 0.05
) -> None:
    """Write rollouts and grades of a split, and its prompts unless it is a variant of one (`test-many`)."""
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
        _write(layout, "prompts", split, make_table("prompts", asked))
    _write(layout, "rollouts", split, make_table("rollouts", rollouts))
    _write(layout, "grades", split, make_table("grades", grades))


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
    tiny_tables(layout, "test-ziprc", prompts=12, samples=8)
