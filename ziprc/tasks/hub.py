"""Prompts of any Hub data set, or of a local parquet or jsonl file, by column mapping; and the named benchmarks.

The stage `prompts` is where an experiment with Hub data touches the network. Splits come either from the data set's
own splits (`splits: {train: train, test: test}`), or, where it has only one, by the hash of the problem text. With
`benchmarks` the test prompts are theirs and the data set is for training. Their golds are final answers (MATH-500's
`answer` column and what follows `####` in GSM8K, where the original systems graded against whole solutions).

Settings:
  benchmarks     names of `BENCHMARKS`: the test prompts
  dataset        Hub id, or path of a .parquet, .jsonl or .json file; config, revision as on the Hub
  split          the data set's split that is cut by hash when `splits` does not name one for the split asked for
  splits         {our split: its split}
  prompt_column, answer_column, difficulty_column, answer_marker (the gold is what follows it)
  instruction    text appended to every problem
  shuffle_seed   order of the rows of each source; the first `count` distinct problems are taken (0: all)
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ziprc.chat import visible_answer
from ziprc.errors import UserError, nearest
from ziprc.tasks.base import Prompt, Settings, check_split, prompt_id, split_of, user_message

BENCHMARKS: dict[str, dict[str, Any]] = {
    "aime2024": {
        "dataset": "Maxwell-Jia/AIME_2024",
        "split": "train",
        "prompt_column": "Problem",
        "answer_column": "Answer",
    },
    "amc2023": {"dataset": "zwhe99/amc23", "split": "test", "prompt_column": "question", "answer_column": "answer"},
    "math500": {
        "dataset": "HuggingFaceH4/MATH-500",
        "split": "test",
        "prompt_column": "problem",
        "answer_column": "answer",
        "difficulty_column": "level",
    },
    "gsm8k": {
        "dataset": "openai/gsm8k",
        "config": "main",
        "split": "test",
        "prompt_column": "question",
        "answer_column": "answer",
        "answer_marker": "####",
    },
}

DEFAULTS: dict[str, Any] = {
    "benchmarks": [],
    "dataset": None,
    "config": None,
    "revision": None,
    "split": "train",
    "splits": {},
    "prompt_column": "problem",
    "answer_column": "answer",
    "difficulty_column": None,
    "answer_marker": None,
    "instruction": "",
    "shuffle_seed": None,
}

SHARES = {"base": 0.0, "train": 0.90, "validation": 0.05, "test": 0.05}

_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
_SHORT = 64  # characters up to which an unboxed answer is taken as it stands


class Hub:
    """See the head of the module."""

    name = "hub"

    def prompts(self, settings: Settings, split: str, count: int, seed: int) -> list[Prompt]:
        """At most `count` distinct problems of a split (all when 0), shuffled by `shuffle_seed` (else by the seed)."""
        check_split(split)
        options = resolve(settings)
        shuffle_seed = options["shuffle_seed"] if options["shuffle_seed"] is not None else seed
        prompts: dict[str, Prompt] = {}
        for source in sources(options, split):
            for prompt in self._source_prompts(source, split, shuffle_seed):
                prompts.setdefault(prompt.prompt_id, prompt)
                if len(prompts) == count:
                    return list(prompts.values())
        return list(prompts.values())

    def canonical_answer(self, response: str) -> str | None:
        """The last boxed answer, else what follows ####, else a short answer as it stands, else the last number."""
        answer = visible_answer(response)
        boxed = last_boxed(answer)
        if boxed is not None:
            return normalise(boxed)
        marked = answer.rpartition("####")
        if marked[1]:
            return normalise(marked[2])
        if len(answer) <= _SHORT and "\n" not in answer:
            return normalise(answer)
        numbers = _NUMBER.findall(answer)
        return normalise(numbers[-1]) if numbers else None

    def _source_prompts(self, options: Settings, split: str, shuffle_seed: int) -> list[Prompt]:
        rows = load_rows(options, options["splits"].get(split, options["split"]))
        check_columns(rows[0] if rows else {}, options)
        random.Random(f"hub {shuffle_seed}").shuffle(rows)
        prompts = [self._prompt(row, options, split) for row in rows if row[options["prompt_column"]]]
        prompts = [prompt for prompt in prompts if belongs(options, prompt, split)]
        if not prompts:
            raise UserError(f"hub: '{options['dataset']}' has no prompt for '{split}' ({len(rows)} rows read).")
        return prompts

    def _prompt(self, row: Mapping[str, Any], options: Settings, split: str) -> Prompt:
        messages = chat_messages(row[options["prompt_column"]], options["instruction"])
        source, column = options["source"], options["difficulty_column"]
        return Prompt(
            prompt_id=prompt_id(self.name, source, canonical_content(messages)),
            task=self.name,
            source=source,
            split=split,
            messages=messages,
            answer=gold(row[options["answer_column"]], options["answer_marker"]),
            difficulty=str(row[column]) if column else source,
            extra={},
        )


def resolve(settings: Settings) -> dict[str, Any]:
    """Settings over the defaults, with names checked."""
    for key in settings:
        if key not in DEFAULTS:
            raise UserError(f"hub: unknown setting '{key}'{nearest(key, DEFAULTS)}.")
    for benchmark in settings.get("benchmarks", []):
        if benchmark not in BENCHMARKS:
            raise UserError(f"hub: unknown benchmark '{benchmark}'{nearest(benchmark, BENCHMARKS)}.")
    return {**DEFAULTS, **settings}


def sources(options: Settings, split: str) -> list[dict[str, Any]]:
    """Options of every data set that the split is read from: the benchmarks for `test`, else the data set."""
    if split == "test" and options["benchmarks"]:
        own = {"instruction": options["instruction"], "splits": {}}
        return [
            {**DEFAULTS, **BENCHMARKS[name], **own, "source": name, "whole": True} for name in options["benchmarks"]
        ]
    if not options["dataset"]:
        raise UserError(
            f"hub: name a `dataset` (Hub id or path of a .parquet or .jsonl file) for the split '{split}'"
            + ("." if options["benchmarks"] else f", or `benchmarks` out of {', '.join(BENCHMARKS)}.")
        )
    whole = split in options["splits"] or bool(options["benchmarks"])
    if split != "train" and whole and split not in options["splits"]:
        raise UserError(f"hub: beside benchmarks '{options['dataset']}' has no split '{split}'; name it in `splits`.")
    return [{**options, "source": options["dataset"], "whole": whole}]


def belongs(options: Settings, prompt: Prompt, split: str) -> bool:
    """Benchmarks and named splits are taken whole; anything else is cut by the hash of the problem."""
    return options["whole"] or split_of(canonical_content(prompt.messages), SHARES) == split


def canonical_content(messages: tuple[dict[str, str], ...]) -> str:
    """The words of the conversation, whatever the white space."""
    return " ".join(" ".join(message["content"] for message in messages).split())


def chat_messages(problem: str | list[Mapping[str, str]], instruction: str) -> tuple[dict[str, str], ...]:
    """A problem text, or a list of messages as some data sets have it, as messages."""
    if isinstance(problem, str):
        return user_message(f"{problem}\n{instruction}" if instruction else problem)
    return tuple({"role": str(message["role"]), "content": str(message["content"])} for message in problem)


def gold(answer: Any, marker: str | None) -> str | None:
    """The answer column as text; with a marker, what follows its last occurrence."""
    if answer is None:
        return None
    text = str(answer)
    return (text.rpartition(marker)[2] if marker else text).strip() or None


def check_columns(row: Mapping[str, Any], options: Settings) -> None:
    wanted = [options["prompt_column"], options["answer_column"], options["difficulty_column"]]
    missing = [column for column in wanted if column and column not in row]
    if missing:
        raise UserError(
            f"hub: '{options['dataset']}' has no column '{missing[0]}'{nearest(missing[0], row)}; it has "
            f"{', '.join(sorted(row)) or 'no rows'}. Set `prompt_column` and `answer_column`."
        )


def load_rows(options: Settings, split: str) -> list[dict[str, Any]]:
    """All rows of a local file, or of a split on the Hub."""
    path = Path(options["dataset"])
    if path.suffix in (".parquet", ".jsonl", ".json"):
        return local_rows(path)
    return hub_rows(options, split)


def local_rows(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise UserError(f"hub: the data set file {path} does not exist.")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path).to_pylist()
        text = path.read_text()
        return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines() if line]
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors; json's too
        raise UserError(f"hub: {path} cannot be read as {path.suffix[1:]}: {error}") from error


def hub_rows(options: Settings, split: str) -> list[dict[str, Any]]:
    """Rows of a Hub split. The boundary to the network: whatever fails there becomes one message."""
    import datasets

    name = options["dataset"]
    try:
        rows = datasets.load_dataset(name, options["config"], split=split, revision=options["revision"])
    except Exception as error:
        raise UserError(
            f"The stage `prompts` needs network to read the data set '{name}' (split '{split}') from the Hugging Face "
            f"Hub, and it could not be read: {type(error).__name__}: {str(error)[:300]}. On a machine with network, "
            "run `make fetch EXPERIMENT=<experiment>`; it fills the cache at HF_HOME, which this machine then reads "
            "offline. Every later stage works without network."
        ) from error
    return [dict(row) for row in rows]


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} with balanced braces."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for position in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[begin:position]
    return None


def normalise(answer: str) -> str | None:
    """One writing for the usual variants of an answer: spaces, dollars, thousands commas, dfrac, a final stop."""
    text = re.sub(r"\\left|\\right|\\!|\\,|\\;|\s|\$|\\%|%", "", answer)
    text = re.sub(r"\\[dt]frac", r"\\frac", text).rstrip(".")
    text = re.sub(r"\\text\{([^{}]*)\}", r"\1", text)
    if _NUMBER.fullmatch(text):
        text = text.replace(",", "")
        text = text.rstrip("0").rstrip(".") if "." in text else str(int(text))
    return text or None
