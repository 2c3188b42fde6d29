"""A long table made in pieces, so that a kill loses at most the piece in the making.

The work is cut into fixed parts. What comes of each is written atomically, with a manifest, under a name that holds the
digest of all that its content follows from: the recipe of the artifact, and the part. So finished pieces survive a kill,
and stale or damaged ones are never read. In the end the pieces are put together one row group after the other: the whole
is never held in memory, and its bytes depend neither on kills nor on how many processes shared the work.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ziprc.errors import UserError
from ziprc.store.digests import digest_json
from ziprc.store.files import atomic_path
from ziprc.store.layout import manifest_of
from ziprc.store.manifest import require_intact, write_manifest
from ziprc.tables.check import GROUP_BYTES, TableSchema

DIGEST_LETTERS = 24


def pieces_folder(target: Path) -> Path:
    """Where the pieces of a table are kept until it is whole."""
    return target.parent / f".{target.stem}.pieces"


def cut(total: int, size: int) -> list[tuple[int, int]]:
    """Half-open ranges of `size` items, the last one with what is left."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


@dataclass(frozen=True)
class Pieces:
    """Pieces of one table. `parts` are JSON values that say what each is made of; `recipe` is what else it follows from."""

    folder: Path
    schema: TableSchema
    recipe: str
    parts: Sequence[Any]

    def path(self, number: int) -> Path:
        return self.folder / f"{number:05d}-{digest_json([self.recipe, self.parts[number]])[:DIGEST_LETTERS]}.parquet"

    def missing(self) -> list[int]:
        """Numbers of the pieces that are yet to be made; what is stale, unfinished or damaged is removed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = {number: self.path(number) for number in range(len(self.parts))}
        whole = {number for number, path in paths.items() if _is_whole(path)}
        kept = {file for number in whole for file in (paths[number], manifest_of(paths[number]))}
        for found in self.folder.iterdir():
            if found.is_file() and found not in kept:
                found.unlink()
        return [number for number in paths if number not in whole]

    def write(self, number: int, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
        """Keep a finished piece; UserError when the table breaks a rule of its schema."""
        self.schema.write(self.path(number), table, metadata)
        write_manifest(self.path(number), {}, {})

    def metadata(self, number: int) -> dict[str, str]:
        """What was written into the footer of a piece."""
        found = pq.read_schema(self.path(number)).metadata or {}
        return {key.decode(): value.decode() for key, value in found.items()}

    def groups(self) -> Iterator[pa.Table]:
        """Every row group of every piece, in order."""
        for number in range(len(self.parts)):
            with pq.ParquetFile(self.path(number), page_checksum_verification=True) as file:
                for group in range(file.num_row_groups):
                    yield file.read_row_group(group)

    def merge(
        self,
        target: Path,
        metadata: Mapping[str, str] | None = None,
        change: Callable[[pa.Table], pa.Table] = lambda table: table,
    ) -> int:
        """Write the table `target` atomically, each row group as `change` makes it; the number of rows.

        Every group is checked against the schema; that keys are unique in the whole is checked by who reads it whole.
        """
        rows, schema = 0, self.schema.columns.with_metadata(metadata)
        options = {"compression": "zstd", "write_page_checksum": True}
        with atomic_path(target) as private, pq.ParquetWriter(private, schema, **options) as writer:
            for table in _grouped(map(change, self.groups())):
                self.schema.check(table, str(target))
                writer.write_table(table.select(schema.names).cast(self.schema.columns))
                rows += table.num_rows
        return rows

    def remove(self) -> None:
        """Once the table and its manifest are there."""
        shutil.rmtree(self.folder)


def _is_whole(path: Path) -> bool:
    if not manifest_of(path).exists():
        return False
    try:
        require_intact(path)
    except UserError:
        print(f"{path} is damaged and is made again", file=sys.stderr, flush=True)
        return False
    return True


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Small tables put together, up to the size of a row group."""
    waiting: list[pa.Table] = []
    for table in tables:
        if waiting and sum(t.nbytes for t in waiting) + table.nbytes > GROUP_BYTES:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting = []
        waiting.append(table)
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()
