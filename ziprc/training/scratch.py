"""A small base model from nothing: its tokenizer, its weights, and its texts.

The tokenizer is byte-level BPE in which digits stand alone, with few merges learned on the task's words, and Qwen3's
conventions: `<|im_end|>` stops, `<|endoftext|>` pads, `<think>` and `</think>` are tokens that stay visible when
decoding. The output matrix has more rows than the tokenizer has tokens; the rest is room for the joint head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ziprc.chat import CHATML_TEMPLATE, THINK_END, prompt_token_ids
from ziprc.config.shared import Architecture
from ziprc.errors import UserError
from ziprc.tasks.base import TeachingTask
from ziprc.training.data import TextData

STOP, PAD, START, THINK = "<|im_end|>", "<|endoftext|>", "<|im_start|>", "<think>"
TRIAL_TRACES = 256  # drawn first, to learn how many traces the token budget needs


def build_tokenizer(corpus: Iterable[str], architecture: Architecture) -> PreTrainedTokenizerFast:
    """The tokenizer; the same corpus gives the same merges. UserError when it leaves no free row."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    size = len(alphabet) + architecture.merges
    core.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, START, STOP)])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in (THINK, THINK_END)])
    if core.get_vocab_size() >= architecture.vocab_size:
        raise UserError(
            f"base.architecture.vocab_size is {architecture.vocab_size}, but the tokenizer has {core.get_vocab_size()} "
            "tokens and the joint head needs free rows above them. Raise vocab_size or lower merges."
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=STOP, pad_token=PAD, chat_template=CHATML_TEMPLATE,
        model_max_length=architecture.max_position_embeddings, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_model(architecture: Architecture, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """A Qwen3 with random weights that depend on the seed alone."""
    shape = architecture.model_dump(exclude={"merges"})
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen3Config(**shape, **ids, tie_word_embeddings=True, dtype="float32")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(**ids)
    return model


def text_data(
    tokenizer: PreTrainedTokenizerFast, task: TeachingTask, settings: Mapping[str, Any], count: int, seed: int
) -> TextData:
    """`count` traces of the task as training sequences: prompt, response, stop token."""
    pairs = list(task.traces(settings, count, seed))
    prompts = [prompt_token_ids(tokenizer, prompt.messages, trace.thinking) for prompt, trace in pairs]
    responses = tokenizer([trace.response + STOP for _, trace in pairs], add_special_tokens=False)["input_ids"]
    whole = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    tokens, lengths = np.fromiter(itertools.chain.from_iterable(whole), np.int32), [0, *map(len, whole)]
    names, prompt_lengths = [prompt.prompt_id for prompt, _ in pairs], np.array([len(p) for p in prompts])
    return TextData(names, tokens, np.cumsum(lengths), prompt_lengths)


def traces_for(
    tokens: int, task: TeachingTask, settings: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, seed: int
) -> TextData:
    """As many traces as fill the token budget once."""
    trial = text_data(tokenizer, task, settings, TRIAL_TRACES, seed)
    count = -(-tokens * len(trial) // int(trial.lengths.sum()))
    return text_data(tokenizer, task, settings, count, seed)
