"""frontier: accuracy against tokens of adaptive sampling and all its competitors, by replaying recorded rollouts."""

from __future__ import annotations

from ziprc.evaluation.samplers.pools import read_pool
from ziprc.evaluation.samplers.record import sampling_record
from ziprc.sampling.fitting import read_fitted
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.files import write_json

NUMPY_SEEDS = 2**31


def run(context: Context) -> str:
    """Replay all samplers on the pools and write accuracy against tokens; the closing line."""
    config, target, reads = context.config, context.target, context.reads
    pools = {split: read_pool(reads, split, config.prompts.task) for split in ("validation", "test")}
    fitted = read_fitted(reads["checkpoint"], pools["test"].grid)
    seed = derived_seed(config.seed, "frontier") % NUMPY_SEEDS
    record = sampling_record(config.frontier, fitted, pools["validation"], pools["test"], seed)
    write_json(target, record)
    context.write_manifest()
    return f"{len(record['families'])} families on {len(pools['test'].prompt_ids)} prompts, wrote {target}"


if __name__ == "__main__":
    run_stage("frontier", run)
