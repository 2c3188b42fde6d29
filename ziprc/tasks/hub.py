"""Prompts of any Hub data set, or of a local file, by column mapping; and the named benchmarks.

Splits come either from the data set's own (`splits: {train: "train[2000:]", test: test}`, cut as the library `datasets`
cuts; a local file is one split, `train`) or from the hash of the problem text. With `benchmarks` the test prompts are
theirs and the data set is for training; their golds are final answers, where the original systems graded against whole
solutions. No problem is in two splits: `validation` leaves out what is in `test`, and `train` what is in either.
"""

from __future__ import annotations

import csv
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ziprc.chat import visible_answer
from ziprc.config.base import Section
from ziprc.errors import UserError, nearest
from ziprc.tables.prompts import content
from ziprc.tasks.base import Prompt, check_split, prompt_id, split_of, user_message

SHARES = {"base": 0.0, "train": 0.90, "validation": 0.05, "test": 0.05}
HELD_OUT = {"train": ("validation", "test"), "validation": ("test",)}  # what a split must not share
FORMATS = (".parquet", ".jsonl", ".json", ".csv")


class Source(Section):
    """A data set and the meaning of its columns."""

    dataset: str | None = Field(None, description="Hub id, or path of a .parquet, .jsonl, .json or .csv file")
    config: str | None = Field(None, description="of the data set, as on the Hub")
    revision: str | None = Field(None, description="branch, tag or commit on the Hub; empty: the newest")
    split: str = Field("train", description="the data set's split that is cut by hash where `splits` names none")
    prompt_column: str = Field("problem", description="problem as text, or as a list of messages with role and content")
    answer_column: str = Field("answer", description="the right answer")
    difficulty_column: str | None = Field(
        None, description="empty: the source is the difficulty; of a list, its length is"
    )
    answer_marker: str | None = Field(None, description="the right answer is what follows the last one, e.g. '####'")


BENCHMARKS = {
    "aime2024": Source(dataset="Maxwell-Jia/AIME_2024", prompt_column="Problem", answer_column="Answer"),
    "amc2023": Source(dataset="zwhe99/amc23", split="test", prompt_column="question"),
    "math500": Source(dataset="HuggingFaceH4/MATH-500", split="test", difficulty_column="level"),
    "gsm8k": Source(
        dataset="openai/gsm8k", config="main", split="test", prompt_column="question", answer_marker="####"
    ),
}


def _benchmark(name: str) -> str:
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark '{name}'{nearest(name, BENCHMARKS)}")
    return name


class Settings(Source):
    """`prompts.settings` of this task."""

    benchmarks: tuple[Annotated[str, AfterValidator(_benchmark)], ...] = Field(
        (), description=f"the test prompts: {', '.join(BENCHMARKS)}"
    )
    splits: dict[Literal["train", "validation", "test"], str] = Field(
        {}, description="the data set's split, or slice of one, for each of ours"
    )
    instruction: str = Field("", description="text appended to every problem")
    template: str | None = Field(
        None, description="the problem, with columns in braces, where no column holds it: 'Make {target} from {nums}'"
    )
    extra_columns: dict[str, str] = Field({}, description="what graders may want to know, and the column it is in")
    shuffle_seed: int | None = Field(
        None, ge=0, description="order of the rows, of which the first distinct ones are taken; empty: the run's seed"
    )


_NUMBER = re.compile(r"-?[0-9][0-9,]*(?:\.[0-9]+)?")
_SHORT = 64  # characters up to which an unboxed answer is taken as it stands


@dataclass(frozen=True)
class Part:
    """A split of a data set that prompts are taken from: all of them, or those whose hash falls into our split."""

    data: Source
    name: str
    split: str
    whole: bool


class Hub:
    """See the head of the module."""

    name = "hub"

    def prompts(self, settings: Mapping[str, Any], split: str, count: int, seed: int) -> list[Prompt]:
        """At most `count` distinct problems of a split (all when 0), shuffled by `shuffle_seed` (else by the seed).

        UserError when the data cannot be read, or hold no problem for the split.
        """
        check_split(split)
        options = Settings.model_validate(settings)
        held_out = set(self._held_out(options, split))
        shuffle_seed = options.shuffle_seed if options.shuffle_seed is not None else seed
        prompts: dict[str, Prompt] = {}
        for part in parts(options, split):
            rows = load_rows(part.data, part.split)
            random.Random(f"hub {shuffle_seed}").shuffle(rows)
            found = [p for p in self._prompts(part, rows, split, options) if content(p.messages) not in held_out]
            if not found:
                also = f"; what is in {' or '.join(HELD_OUT[split])} too is left out" if held_out else ""
                raise UserError(
                    f"hub: '{part.data.dataset}' has no prompt for '{split}' ({len(rows)} rows of its '{part.split}'{also})."
                )
            for prompt in found:
                prompts.setdefault(prompt.prompt_id, prompt)
            if count and len(prompts) >= count:
                break
        return list(prompts.values())[: count or None]

    def canonical_answer(self, response: str) -> str | None:
        """The last boxed answer, else what follows ####, else a short answer as it stands, else the last number."""
        answer = visible_answer(response)
        if (boxed := last_boxed(answer)) is not None:
            return normalise(boxed)
        if "####" in answer:
            return normalise(answer.rpartition("####")[2])
        if len(answer) <= _SHORT and "\n" not in answer:
            return normalise(answer)
        numbers = _NUMBER.findall(answer)
        return normalise(numbers[-1]) if numbers else None

    def _prompts(self, part: Part, rows: list[dict[str, Any]], split: str, options: Settings) -> Iterator[Prompt]:
        """The rows that are of the split, as prompts; UserError when a column that the settings name is in no row."""
        data = part.data
        columns = {column for row in rows for column in row}
        own = data is options  # a benchmark has columns of its own
        template = options.template if own else None
        extra = options.extra_columns if own else {}
        asked = fields(template) if template else [data.prompt_column, data.answer_column]
        for column in (*asked, data.difficulty_column, *extra.values()):
            if rows and column and column not in columns:
                raise UserError(
                    f"hub: '{data.dataset}' has no column '{column}'{nearest(column, columns)}; it has "
                    f"{', '.join(sorted(columns))}. Set `prompt_column` and `answer_column`."
                )
        for row in rows:
            problem = template.format(**row) if template else row.get(data.prompt_column)
            messages = chat_messages(problem, options.instruction, data) if problem else ()
            if problem and (part.whole or split_of(content(messages), SHARES) == split):
                name = prompt_id(self.name, part.name, content(messages))
                answer = "" if (answer := row.get(data.answer_column)) is None else str(answer)
                gold = (answer.rpartition(data.answer_marker)[2] if data.answer_marker else answer).strip() or None
                level = row.get(data.difficulty_column) if data.difficulty_column else part.name
                difficulty = str(len(level) if isinstance(level, list) else level)
                known = {key: row[column] for key, column in extra.items()}
                yield Prompt(name, self.name, part.name, split, messages, gold, difficulty, known)

    def _held_out(self, options: Settings, split: str) -> Iterator[str]:
        """Contents of the problems that the split must not share. Where the hash cuts both, it cuts by content already."""
        for other in HELD_OUT.get(split, ()):
            named = other in options.splits or (other == "test" and options.benchmarks)
            if named or (split in options.splits and not options.benchmarks):
                for part in parts(options, other):
                    rows = load_rows(part.data, part.split)
                    yield from (content(prompt.messages) for prompt in self._prompts(part, rows, other, options))


TASK = Hub()


def fields(template: str) -> list[str]:
    """The columns that a template names; UserError where it is none."""
    try:
        return [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"hub: the template '{template}' cannot be read: {error}. A brace is written twice.") from None


def parts(options: Settings, split: str) -> list[Part]:
    """What the split is read from: the benchmarks for `test`, else the data set."""
    if split == "test" and options.benchmarks:
        return [Part(BENCHMARKS[name], name, BENCHMARKS[name].split, True) for name in options.benchmarks]
    if not options.dataset:
        raise UserError(
            f"hub: name a `dataset` (Hub id, or path of a {', '.join(FORMATS)} file) for the split '{split}'"
            + ("." if options.benchmarks else f", or `benchmarks` out of {', '.join(BENCHMARKS)}.")
        )
    named = split in options.splits
    if split != "train" and options.benchmarks and not named:
        raise UserError(f"hub: beside benchmarks '{options.dataset}' has no split '{split}'; name it in `splits`.")
    theirs = options.splits.get(split, options.split)
    return [Part(options, options.dataset, theirs, named or bool(options.benchmarks))]


def chat_messages(problem: Any, instruction: str, data: Source) -> tuple[dict[str, str], ...]:
    """A problem text, or a list of messages as some data sets have it, as messages."""
    if isinstance(problem, str):
        return user_message(f"{problem}\n{instruction}" if instruction else problem)
    wanted = {"role", "content"}
    if not isinstance(problem, list) or not all(isinstance(m, Mapping) and wanted <= set(m) for m in problem):
        raise UserError(
            f"hub: '{data.dataset}', column '{data.prompt_column}': expected a text or a list of messages with role and "
            f"content, found {str(problem)[:100]!r}."
        )
    return tuple({"role": str(message["role"]), "content": str(message["content"])} for message in problem)


def load_rows(data: Source, split: str) -> list[dict[str, Any]]:
    """All rows of a split, or of a slice of one, on the Hub or in a local file.

    The boundary to the network: whatever fails there becomes one message.
    """
    path = Path(data.dataset or "")
    if path.suffix in FORMATS:
        return file_rows(path, split)
    if path.is_file():
        raise UserError(f"hub: {path} is in none of the formats that are read: {', '.join(FORMATS)}.")
    import datasets

    try:
        return list(datasets.load_dataset(data.dataset, data.config, split=split, revision=data.revision))
    except Exception as error:
        raise UserError(
            f"The stage `prompts` needs network to read the data set '{data.dataset}' (split '{split}') from the Hugging "
            f"Face Hub, and it could not be read: {type(error).__name__}: {str(error)[:300]}. On a machine with network, "
            "run `make fetch EXPERIMENT=<experiment>`; it fills the cache at HF_HOME, which this machine then reads "
            "offline. Every later stage works without network."
        ) from error


def file_rows(path: Path, split: str) -> list[dict[str, Any]]:
    """Rows of a local file, whose only split is `train`, cut by the library `datasets`.

    It does not read them, for it would guess types: 1 and 2.5 in one column become 1.0 and 2.5, `2020-01-01` a time.
    """
    from datasets import ReadInstruction

    try:
        rows = read_file(path)
        cuts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except FileNotFoundError:
        raise UserError(f"hub: the data set file {path} does not exist.") from None
    except (OSError, ValueError, csv.Error) as error:  # errors of json, pyarrow and datasets are ValueErrors
        raise UserError(
            f"hub: '{split}' of {path} cannot be read: {str(error).rstrip('.')}. The file has to be {path.suffix[1:]} with a "
            "row a problem, and is one split, 'train', of which a slice is written 'train[:100]'."
        ) from error
    return [row for cut in cuts for row in rows[cut.from_ : cut.to]]


def read_file(path: Path) -> list[dict[str, Any]]:
    """Rows of a file in one of FORMATS; ValueError with the line where the format tells one."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8-sig", newline="" if path.suffix == ".csv" else None) as lines:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(lines, strict=True))
        elif path.suffix == ".json":
            rows = json.load(lines)
        else:
            rows = []
            for number, line in enumerate(lines, 1):
                try:
                    rows += [json.loads(line)] if line.strip() else []
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and None not in row for row in rows):
        raise ValueError("expected a list of rows, each with the same named columns")
    return rows


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
