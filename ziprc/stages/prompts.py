"""prompts: what is asked, for the splits `train`, `validation` and `test`.

The only stage, with `base`, that may touch the network.
"""

from __future__ import annotations

import json

from ziprc.stages.context import Context, run_stage
from ziprc.systems.names import params_of
from ziprc.tables.prompts import PROMPTS
from ziprc.tasks.base import get_task


def run(context: Context) -> str:
    params = params_of(context.config, "prompts", context.name)
    target = context.layout.table("prompts", context.name)
    prompts = get_task(params["task"]).prompts(params["settings"], context.name, params["count"], params["seed"])
    rows = [{**vars(p), "messages": list(p.messages), "extra": json.dumps(p.extra, sort_keys=True)} for p in prompts]
    PROMPTS.write(target, PROMPTS.make(rows))
    context.write_manifest("prompts")
    return f"wrote {len(rows)} prompts to {target}"


if __name__ == "__main__":
    run_stage("prompts", run)
