"""prompts: what is asked, for the splits `train`, `validation` and `test`.

The only stage, with `base`, that may touch the network.
"""

from __future__ import annotations

import json
import sys

from ziprc.stages.context import Context, run_stage
from ziprc.tables.prompts import PROMPTS
from ziprc.tasks.base import get_task


def run(context: Context) -> str:
    """Draw or fetch the prompts of a split and write the table; the closing line."""
    config, split = context.config, context.variant
    own, asked = config.prompts, getattr(config.prompts, split)
    prompts = get_task(own.task).prompts(own.settings, split, asked, config.seed)
    rows = [{**vars(p), "messages": list(p.messages), "extra": json.dumps(p.extra, sort_keys=True)} for p in prompts]
    context.write(PROMPTS, PROMPTS.make(rows))
    line = f"wrote {len(rows)} prompts to {context.target}"
    if len(rows) < asked:
        line += f", fewer than prompts.{split} = {asked}: the task has no more for this split"
        print(f"prompts: {line}", file=sys.stderr)
    return line


if __name__ == "__main__":
    run_stage("prompts", run)
