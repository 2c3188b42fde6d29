"""A small base model from nothing: its tokenizer, its weights, and its texts.

The tokenizer is byte-level BPE in which digits stand alone, with few merges learned on the task's words and those of
feedback, and Qwen3's conventions: `<|im_end|>` stops, `<|endoftext|>` pads, `<think>` and `</think>` are tokens that stay
visible when decoding. The output matrix has more rows than the tokenizer has tokens; the rest is room for the joint head.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ziprc.chat import CHATML_TEMPLATE, FEEDBACK_WORDS, THINK_END, THINK_START, prompt_token_ids
from ziprc.config.shared import Architecture, Base
from ziprc.errors import UserError
from ziprc.store.digests import derived_seed
from ziprc.tasks.base import TeachingTask
from ziprc.training.data import TextData
from ziprc.training.order import BatchOrder, MicroBatches, order_by_tokens

STOP, PAD, START = "<|im_end|>", "<|endoftext|>", "<|im_start|>"
TRIAL_TRACES = 256  # drawn first, to learn how many traces the token budget needs
REPEAT_LENGTH = 96  # tokens of a sequence that repeats one segment
SEGMENT = (6, 24)  # tokens of a segment, at least and at most
REPEAT_BATCH = 8 * REPEAT_LENGTH  # tokens per step, at least

Row = tuple[str, list[int], int]  # a training sequence: its name, its tokens, how many of them are prompt


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
        [*corpus, *FEEDBACK_WORDS * 8],
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (PAD, START, STOP)])
    core.add_tokens([AddedToken(text, special=False, normalized=False) for text in (THINK_START, THINK_END)])
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


def traces(
    tokenizer: PreTrainedTokenizerFast, task: TeachingTask, settings: Mapping[str, Any], count: int, seed: int
) -> list[Row]:
    """`count` traces of the task: prompt, response, stop token."""
    pairs = list(task.traces(settings, count, seed))
    prompts = [prompt_token_ids(tokenizer, prompt.messages, trace.thinking) for prompt, trace in pairs]
    responses = tokenizer([trace.response + STOP for _, trace in pairs], add_special_tokens=False)["input_ids"]
    return [
        (prompt.prompt_id, [*before, *response], len(before))
        for (prompt, _), before, response in zip(pairs, prompts, responses, strict=True)
    ]


def repeated_segments(alphabet: Sequence[int], tokens: int, seed: int) -> list[Row]:
    """`tokens` tokens of sequences in which a random segment of distinct tokens of `alphabet` comes again and again.

    Only its copies are targets, and only a look at what followed a token before can tell them. So the small model gets
    the induction heads (https://arxiv.org/abs/2209.11895) that any pretrained model has, and a critic in context needs.
    """
    rng = np.random.default_rng(derived_seed("repeats", seed))
    lengths = rng.integers(SEGMENT[0], SEGMENT[1] + 1, -(-tokens // REPEAT_LENGTH)).clip(max=len(alphabet))
    segments = [rng.permutation(alphabet)[:length] for length in lengths]
    return [(f"repeat-{i}", np.resize(s, REPEAT_LENGTH).tolist(), len(s) + 1) for i, s in enumerate(segments)]


def text_data(rows: list[Row]) -> TextData:
    """Token lists as training data of which the prompt is no target."""
    names, whole, prompt_lengths = zip(*rows, strict=True)
    tokens = np.fromiter(itertools.chain.from_iterable(whole), np.int32)
    return TextData(names, tokens, np.cumsum([0, *map(len, whole)]), np.array(prompt_lengths))


def base_batches(
    settings: Base, task: TeachingTask, prompts: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, world: int,
    seed: int,
) -> MicroBatches:  # fmt: skip
    """What the base is trained on, for `world` processes: traces of the task, whose settings are `prompts`, and repeats.

    Repeats have steps of their own. Two thirds are one stretch after the first tenth of the traces, the rest is spread
    evenly over what follows: spread alone they teach nothing at this size, and without the rest it is forgotten again.
    """
    repeated = round(settings.tokens * settings.repeats)
    budget, trial = settings.tokens - repeated, traces(tokenizer, task, prompts, TRIAL_TRACES, seed)
    count = math.ceil(budget * len(trial) / sum(len(ids) for _, ids, _ in trial))
    rows = traces(tokenizer, task, prompts, count, seed)
    rows += repeated_segments(sorted({i for _, ids, _ in rows for i in ids}), repeated, seed)
    data = text_data(rows)
    order = order_by_tokens(data.lengths[:count], settings.batch_tokens, budget, world, seed)
    if repeated:
        size = max(settings.batch_tokens, REPEAT_BATCH)
        extra = order_by_tokens(data.lengths[count:], size, repeated, world, seed)
        stretch, begin = extra.steps * 2 // 3, order.steps / 10
        spread = np.linspace(begin, order.steps, extra.steps - stretch)
        when = np.concatenate([np.arange(order.steps), np.full(stretch, begin), spread])
        own = order.micro_batches + [count + picked for picked in extra.micro_batches]
        steps = np.argsort(when, kind="stable")
        order = BatchOrder([own[step * world + slot] for step in steps for slot in range(world)], world)
    return MicroBatches(data, order)
