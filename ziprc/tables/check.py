"""What a table is: columns, key, ranges and null rules, checked on every write and every read.

Tables are never edited; a later stage adds a narrow table that joins on `rollout_id`. Facts are stored once (token
ids as int32), views such as label positions and lengths are derived. Each table has a module of its own beside this one, so
that a new table is no change of code for a stage that does not read it. Strings and lists have offsets of 64 bits, since
a run of more than 2³¹ tokens must fit, and row groups are bounded in bytes, since a reader must hold one. A failed check
names file, column and first rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ziprc.errors import UserError, first_few
from ziprc.store.files import atomic_path

TEXT = pa.large_string()
TOKENS = pa.large_list(pa.int32())
GROUP_BYTES = 128 << 20  # of a row group, uncompressed


def column(name: str, kind: pa.DataType, null: bool = False) -> pa.Field:
    """A column of a schema; null only where it says so."""
    return pa.field(name, kind, nullable=null)


def columns(kind: pa.DataType, *names: str, null: bool = False) -> list[pa.Field]:
    """Columns of one type that stand side by side."""
    return [column(name, kind, null) for name in names]


@dataclass(frozen=True)
class TableSchema:
    """Arrow schema plus the rules that Arrow cannot express."""

    name: str
    columns: pa.Schema
    key: tuple[str, ...]
    unit_range: tuple[str, ...] = ()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rule: Callable[[pa.Table], tuple[str, pa.Array, str]] | None = None

    def make(self, rows: Iterable[Mapping[str, Any]] | Mapping[str, Any]) -> pa.Table:
        """A table from rows or from columns."""
        if isinstance(rows, Mapping):
            return pa.table(dict(rows), schema=self.columns)
        return pa.Table.from_pylist([dict(row) for row in rows], schema=self.columns)

    def write(self, path: Path, table: pa.Table, metadata: Mapping[str, str] | None = None) -> None:
        """Check `table` and write it atomically, with `metadata` in the file's footer.

        Raises UserError when a check fails; whatever stood at `path` is then untouched.
        """
        self.check(table, str(path))
        if metadata:
            table = table.replace_schema_metadata({k.encode(): v.encode() for k, v in metadata.items()})
        rows = max(1, GROUP_BYTES * table.num_rows // max(1, table.nbytes))
        with atomic_path(path) as private:
            pq.write_table(table, private, compression="zstd", write_page_checksum=True, row_group_size=rows)

    def read(self, path: Path) -> pa.Table:
        """Read and check a table; UserError for a missing, truncated or wrong file."""
        if not path.exists():
            raise UserError(f"{path} does not exist. Build it first: `make {path}`.")
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
            raise UserError(
                f"{path} cannot be read as parquet ({error}). It is truncated or damaged: delete it and build it "
                f"again with `make {path}`."
            ) from None
        self.check(table, str(path))
        return table

    def check(self, table: pa.Table, where: str) -> None:
        """Raise UserError naming `where`, column and first bad rows unless `table` obeys the rules."""
        for column in self.columns:
            if column.name not in table.column_names:
                raise UserError(
                    f"{where}: column '{column.name}' is missing (found: {', '.join(table.column_names)}). Is it a "
                    f"'{self.name}' table?"
                )
            if table.schema.field(column.name).type != column.type:
                found = table.schema.field(column.name).type
                raise UserError(f"{where}: column '{column.name}' has type {found}, expected {column.type}.")
            if not column.nullable and table[column.name].null_count:
                _fail(where, column.name, _rows_where(pc.is_null(table[column.name])), "null is not allowed here")
        for name in self.unit_range:
            inside = pc.and_(pc.greater_equal(table[name], 0.0), pc.less_equal(table[name], 1.0))  # NaN compares false
            bad = _rows_where(pc.and_(pc.is_valid(table[name]), pc.invert(inside)))
            if bad:
                _fail(where, name, bad, f"found {table[name][bad[0]].as_py()}, expected a number in [0, 1]")
        for name, allowed in self.choices.items():
            known = pc.is_in(table[name], value_set=pa.array(allowed, TEXT))
            bad = _rows_where(pc.and_(pc.is_valid(table[name]), pc.invert(known)))
            if bad:
                _fail(where, name, bad, f"found '{table[name][bad[0]].as_py()}', expected one of {', '.join(allowed)}")
        if self.rule is not None:
            column_name, mask, why = self.rule(table)
            if bad := _rows_where(mask):
                _fail(where, column_name, bad, why)
        grouped = table.select(list(self.key)).group_by(list(self.key)).aggregate([([], "count_all")])
        if grouped.num_rows == table.num_rows:
            return
        twice = grouped.filter(pc.greater(grouped["count_all"], 1)).slice(0, 1).to_pylist()[0]
        twice.pop("count_all")
        raise UserError(f"{where}: column '{', '.join(self.key)}': {twice} occurs more than once; keys must be unique.")


def _fail(where: str, column: str, bad: Sequence[int], why: str) -> None:
    raise UserError(f"{where}: column '{column}', rows {first_few(bad)}: {why}.")


def _rows_where(mask: pa.ChunkedArray | pa.Array) -> list[int]:
    return np.flatnonzero(np.asarray(pc.fill_null(mask, False))).tolist()
