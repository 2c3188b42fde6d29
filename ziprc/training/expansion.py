"""What a base can be given before it learns: copies of its vocabulary, or, for comparison, wider feed-forward blocks.

Both leave the model as it was: a copy and its source share what the source was worth (joint/reasoning.py), and a new
feed-forward unit adds 0 until it is trained. Both are saved as the same class of model that they were, so Transformers and
vLLM load them without knowing. The published code expands in a constructor, which no longer loads; gives the end-of-turn token
a copy; and decodes copies to nothing.
D hidden, V rows of the matrices, R copies, F feed-forward units.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ziprc.chat import THINK_END, THINK_START, prompt_token_ids
from ziprc.config.vocabulary import Expansion
from ziprc.errors import UserError
from ziprc.joint.reasoning import ReasoningVocabulary, as_ranges, of_config

MARKS = [chr(0xE000 + i) for i in range(64)]  # private use: one that no token has is a copy's mark
SYMBOLS = frozenset("0123456789+-*/=×÷−")
SCALED = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def copied_ids(
    tokenizer: PreTrainedTokenizerBase, own: Expansion, thoughts: Iterable[Sequence[int]]
) -> NDArray[np.int64]:
    """[n] ids that get copies, ascending; never special or added tokens. `thoughts` are tokens, counted for `frequent`."""
    apart = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    allowed = sorted(set(tokenizer.get_vocab().values()) - apart)
    if own.subset == "digits+operators":
        allowed = [i for i in allowed if (text := tokenizer.decode([i]).strip()) and set(text) <= SYMBOLS]
    elif own.subset == "frequent":
        counts = Counter(token for ids in thoughts for token in ids)
        ranked = sorted(allowed, key=lambda i: (-counts[i], i))
        allowed = sorted(ranked[: own.frequent])
    if not allowed:
        raise UserError(f"No token of this model is in the subset '{own.subset}' of expand. Choose another.")
    return np.array(allowed)


def tag(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The id of a thinking tag; UserError where it is not a token of its own."""
    found = tokenizer.get_vocab().get(text)
    if found is None:
        raise UserError(
            f"The tokenizer has no token {text}, so the thinking block cannot be told by ids. A reasoning vocabulary needs a "
            f"model that thinks between {THINK_START} and {THINK_END}, such as Qwen3."
        )
    return found


def turn_marker(tokenizer: PreTrainedTokenizerBase) -> int:
    """The special token that begins the assistant's turn in the chat template."""
    asked = [{"role": "user", "content": "?"}]
    prompt = prompt_token_ids(tokenizer, asked, thinking=True)
    before = list(tokenizer.apply_chat_template(asked, tokenize=True, return_dict=True)["input_ids"])
    begins = prompt[len(before) :] if prompt[: len(before)] == before else []
    special = set(tokenizer.all_special_ids) | {i for i, one in tokenizer.added_tokens_decoder.items() if one.special}
    found = next((i for i in begins if i in special), None)
    if found is None:
        raise UserError(
            "The chat template does not begin the assistant's turn with a special token, so a thinking block cannot be told "
            "from what a user writes. A reasoning vocabulary needs a template such as Qwen3's."
        )
    return found


def add_copies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    own: Expansion,
    thoughts: Iterable[Sequence[int]],
    seed: int,
) -> tuple[ReasoningVocabulary, PreTrainedTokenizerBase]:
    """Append the rows to `model`, in place; what they are, and the tokenizer that knows them. UserError where it cannot be."""
    config, head = model.config, model.get_output_embeddings()
    if of_config(config.to_dict()) is not None:
        raise UserError("The model has a reasoning vocabulary already. Start from one without.")
    if head.bias is not None or (named := [key for key in SCALED if getattr(config, key, None) not in (None, 1.0)]):
        what = "has a bias" if head.bias is not None else f"is scaled ({named[0]})"
        raise UserError(f"The model's output matrix {what}, which a reasoning vocabulary has not been made for.")
    ids, rows = copied_ids(tokenizer, own, thoughts), head.weight.shape[0]
    reasoning = ReasoningVocabulary(
        rows, as_ranges(ids), own.copies, turn_marker(tokenizer), tag(tokenizer, THINK_START), tag(tokenizer, THINK_END),
        own.inside == "reasoning_only", own.corrected,
    )  # fmt: skip
    model.resize_token_embeddings(rows + reasoning.size, mean_resizing=False)
    source = torch.from_numpy(reasoning.of_row)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        matrices = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
        for matrix in {id(one): one for one in matrices}.values():
            matrix[reasoning.rows] = matrix[source]
            if own.init_noise:
                noise = torch.randn(reasoning.size, matrix.shape[1], generator=generator)
                matrix[reasoning.rows] += (noise * own.init_noise * matrix[source].std()).to(matrix.dtype)
    model.config.ziprc = {**(getattr(config, "ziprc", None) or {}), "reasoning": reasoning.to_dict()}
    return reasoning, marked_tokenizer(tokenizer, reasoning)


def marked_tokenizer(tokenizer: PreTrainedTokenizerBase, reasoning: ReasoningVocabulary) -> PreTrainedTokenizerBase:
    """The tokenizer with a token for every copy: its source's behind a mark for each time it is copied.

    No merge makes one, so that no text is read as a copy; the decoder takes marks away before anything else.
    """
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    if core["model"]["type"] != "BPE":
        raise UserError(
            f"The tokenizer is {core['model']['type']}; a reasoning vocabulary needs byte-level or other BPE."
        )
    vocab = core["model"]["vocab"]
    texts = {i: text for text, i in vocab.items()}
    for one in core["added_tokens"]:  # whose ids are found by their text in the model, or begin after its last one
        vocab.setdefault(one["content"], one["id"])
    mark = next(one for one in MARKS if not any(one in text for text in texts.values()))
    for number, source in enumerate(reasoning.of_row.tolist()):
        times = number // len(reasoning.source_ids) + 1
        vocab[mark * times + texts[source]] = reasoning.start + number
    unmark = {"type": "Replace", "pattern": {"String": mark}, "content": ""}
    core["decoder"] = {"type": "Sequence", "decoders": [unmark, *([core["decoder"]] if core["decoder"] else [])]}
    # The general class takes the file as it is; those of model families rebuild it, with a decoder that knows no marks.
    known = ("eos_token", "pad_token", "bos_token", "unk_token", "additional_special_tokens", "model_max_length")
    kept = {name: getattr(tokenizer, name) for name in known if getattr(tokenizer, name, None) is not None}
    found = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False, **kept,
    )  # fmt: skip
    now = found.get_vocab()
    assert all(now[text] == i for text, i in tokenizer.get_vocab().items()), "a token has another id than it had"
    assert len(now) == len(tokenizer.get_vocab()) + reasoning.size, "two copies have one text"
    return found


def widen(model: PreTrainedModel, parameters: int) -> int:
    """Add feed-forward units that change nothing yet, about so many `parameters` in all; how many a layer. In place."""
    layers = [layer.mlp for layer in model.base_model.layers if hasattr(getattr(layer, "mlp", None), "gate_proj")]
    if len(layers) != model.config.num_hidden_layers or layers[0].gate_proj.bias is not None:
        raise UserError(
            "The model's feed-forward blocks are not gated ones without a bias, as Qwen's or Llama's: they cannot be widened."
        )
    hidden, units = model.config.hidden_size, model.config.intermediate_size
    added = max(1, round(parameters / (3 * hidden * len(layers))))
    for mlp in layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(mlp, name).weight
            down = name == "down_proj"
            new = torch.zeros((hidden, units + added) if down else (units + added, hidden), dtype=old.dtype)
            if down:
                new[:, :units] = old.detach()
            else:
                new[:units] = old.detach()
                new[units:] = old.detach()[torch.arange(added) % units]  # of 0 as well no gradient would ever come
            wider = nn.Linear(new.shape[1], new.shape[0], bias=False)
            wider.weight = nn.Parameter(new)
            setattr(mlp, name, wider)
    model.config.intermediate_size = units + added
    return added


def rewritten(
    tokens: Sequence[int], begin: int, reasoning: ReasoningVocabulary, share: float, rng: np.random.Generator
) -> list[int]:
    """A response whose thought uses copies: each of its tokens that has one becomes one, with chance `share`."""
    ids: NDArray[Any] = np.asarray(tokens, dtype=np.int64)
    inside = reasoning.inside([begin], ids[None])[0]
    place = np.full(int(max(reasoning.source_ids.max(), ids.max())) + 1, -1)
    place[reasoning.source_ids] = np.arange(len(reasoning.source_ids))
    chosen = inside & (place[ids] >= 0) & (rng.random(len(ids)) < share)
    which = rng.integers(reasoning.copies, size=len(ids)) * len(reasoning.source_ids)
    return np.where(chosen, reasoning.start + which + place[ids], ids).tolist()
