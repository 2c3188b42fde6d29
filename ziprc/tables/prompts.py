"""What is asked: a row is one prompt of one split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import pyarrow as pa

from ziprc.errors import UserError, first_few
from ziprc.tables.check import TEXT, TableSchema, column, columns

MESSAGES = pa.large_list(pa.struct([("role", TEXT), ("content", TEXT)]))

PROMPTS = TableSchema(
    "prompts",
    pa.schema(
        [
            *columns(TEXT, "prompt_id", "task", "source", "split"),
            column("messages", MESSAGES),
            column("answer", TEXT, null=True),
            *columns(TEXT, "difficulty", "extra"),
        ]
    ),
    key=("prompt_id",),
)


def content(messages: Iterable[Mapping[str, str]]) -> str:
    """The words of a conversation, whatever the white space: equal for what is the same question to a reader."""
    return " ".join(" ".join(message["content"] for message in messages).split())


def check_disjoint(tables: Mapping[str, pa.Table]) -> None:
    """UserError when two prompts tables of different splits (split → table) hold the same prompt.

    The same is the same id or the same words under another one, as when a benchmark's problem stands in the training set.
    """
    by_id: dict[str, tuple[str, str]] = {}  # → split and id of the first prompt that has it
    by_content: dict[str, tuple[str, str]] = {}
    for split, table in tables.items():
        shared: dict[str, list[str]] = defaultdict(list)
        for prompt_id, messages in zip(table["prompt_id"].to_pylist(), table["messages"].to_pylist(), strict=True):
            mine = (split, prompt_id)
            for other, found in (by_id.setdefault(prompt_id, mine), by_content.setdefault(content(messages), mine)):
                if other != split:
                    shared[other].append(prompt_id if found == prompt_id else f"{prompt_id}, there {found}")
                    break
        if shared:
            other, names = next(iter(shared.items()))
            raise UserError(
                f"The prompts of '{split}' and '{other}' are not disjoint: {len(names)} of '{split}' are in '{other}' too "
                f"({first_few(names)}), so what is measured on the one was learned or chosen on the "
                "other. Cut the splits apart in prompts.settings, or drop the prompts from the data."
            )
