"""A progress bar with a rate and an ETA; plain lines when the output is not a terminal."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_PLAIN_LINES = 10.0


def progress(total: int, what: str, unit: str = "it", after_s: float = 0.0, done: int = 0) -> tqdm[Any]:
    """A tqdm bar over `total` units; call `.update(n)`, and `.close()` or use it as a context manager.

    `done` of them were done before, by a run that this one goes on from. Nothing is shown before `after_s` seconds have
    passed.
    """
    plain = not sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=f" {unit}",
        mininterval=SECONDS_BETWEEN_PLAIN_LINES if plain else 0.2,
        ascii=plain,
        delay=after_s,
        bar_format="{desc}: {n_fmt}/{total_fmt}{unit} ({rate_fmt}, {remaining} left{postfix})\n" if plain else None,
    )
