"""What every plausible next token is worth, state by state: one row per rollout, its lists side by side.

A rollout of m tokens has the states 0 … m. State t < m has the candidates offsets[t] … offsets[t + 1] − 1 of `ids`, ascending,
the token taken among them; `log_prob` is the reference's for each, over all text rows, `q` the expected score once it stands
there, `cells` the whole joint behind it (R·L numbers a candidate; none where the source has no joint). `values` are the
expected scores of the states 0 … m. `source` says who expects it, a critic's name or `trie`, after `siblings` other rollouts
of the prompt. The footer says what it takes to read them: `kind` (candidates, or taken alone), `min_p`, `grid`, `pack`, parents.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ziprc.tables.check import TEXT, TOKENS, TableSchema, column, columns

REALS = pa.large_list(pa.float32())


def _consistent(table: pa.Table) -> tuple[str, pa.Array, str]:
    """Lists that belong together are as long as each other, values lie in [0, 1], log-probabilities are at most 0."""
    n = {
        name: pc.list_value_length(table[name]).combine_chunks()
        for name in ("offsets", "ids", "log_prob", "q", "values")
    }
    last = _last(table["offsets"])
    for name in ("ids", "log_prob", "q"):
        if pc.any(bad := pc.not_equal(n[name], last)).as_py():
            return name, bad, "as many numbers as the last offset says"
    bad = pc.not_equal(n["values"], n["offsets"])
    if pc.any(bad).as_py():
        return "values", bad, "one value for every state, so as many as offsets"
    for name, low, high in (("q", 0.0, 1.0), ("values", 0.0, 1.0), ("log_prob", -np.inf, 0.0)):
        flat = pc.list_flatten(table[name]).to_numpy()
        wrong = ~((flat >= low) & (flat <= high) & np.isfinite(flat))
        if wrong.any():
            row = pc.list_parent_indices(table[name]).to_numpy()[wrong]
            found = np.isin(np.arange(table.num_rows), row)
            return name, pa.array(found), f"numbers have to lie between {low:g} and {high:g}"
    return "q", pa.array(np.zeros(table.num_rows, dtype=bool)), ""


def _last(lists: pa.ChunkedArray) -> pa.Array:
    """The last element of every list."""
    flat = pc.list_flatten(lists).to_numpy()
    ends = np.cumsum(pc.list_value_length(lists).to_numpy())
    return pa.array(flat[ends - 1].astype(np.int64))


QVALUES = TableSchema(
    "qvalues",
    pa.schema(
        [
            *columns(TEXT, "rollout_id", "source"),
            column("siblings", pa.int32()),
            *columns(TOKENS, "offsets", "ids"),
            *columns(REALS, "log_prob", "q"),
            column("cells", pa.large_list(pa.float16())),
            column("values", REALS),
        ]
    ),
    key=("rollout_id",),
    rule=_consistent,
)
