"""Chat templates: from messages to prompt token ids, and from a response to its visible answer.

Qwen3's convention is used for both kinds of response: with thinking, the model itself opens `<think>`; without, the
prompt already carries an empty think block and the response is the answer alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ziprc.errors import UserError

THINK_START, THINK_END = "<think>", "</think>"

# What a feedback on a response is made of, numbers apart; every small tokenizer learns these words.
FEEDBACK_WORDS = ("Reward: ", "\nLength: ", " tokens")

CHATML_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false -%}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{%- endif -%}"
    "{%- endif -%}"
)


class ChatTokenizer(Protocol):
    chat_template: str | None

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def prompt_token_ids(tokenizer: ChatTokenizer, messages: Sequence[Mapping[str, str]], thinking: bool) -> list[int]:
    """Ids of the templated prompt, ending where the response begins. Special tokens come from the template only."""
    if not tokenizer.chat_template:
        raise UserError(
            "The tokenizer has no chat template, so prompts cannot be formatted. Use a chat model, or add "
            "`chat_template.jinja` to the model folder."
        )
    encoded = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        enable_thinking=thinking,
    )
    return list(encoded["input_ids"])


def visible_answer(response: str) -> str:
    """The text after the last thinking block; the whole response when there is none."""
    return response.rpartition(THINK_END)[2].strip()
