"""calibration: what samplers need besides the checkpoint, fitted on validation prompts and stored beside its weights.

The fused score, the vote model and the strength of the difficulty prior (sampling/fitting.py), the two numbers of the
calibrated joint, and the log-probability logistic of the baselines.
"""

from __future__ import annotations

from ziprc.evaluation.samplers.pools import read_pool
from ziprc.sampling.fitting import Fitted
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.files import write_json

NUMPY_SEEDS = 2**32


def run(context: Context) -> str:
    """Fit what samplers need on the validation pool and write it beside the head; the closing line."""
    config = context.config
    recorded = read_pool(context.reads, "validation", config.prompts.task)
    fitted = Fitted.fit(recorded.pool, recorded.grid, derived_seed(config.seed, "calibration") % NUMPY_SEEDS)
    write_json(context.target, fitted.to_dict())
    context.write_manifest()
    count, prompts = recorded.pool.length.size, len(recorded.prompt_ids)
    return f"fitted on {count} rollouts of {prompts} prompts, wrote {context.target}"


if __name__ == "__main__":
    run_stage("calibration", run)
