"""calibration: what samplers need besides the checkpoint, fitted on validation prompts and stored beside its weights.

The fused score, the vote model and the strength of the difficulty prior (sampling/calibration.py), the two numbers of the
calibrated joint, and the log-probability logistic of the baselines.
"""

from __future__ import annotations

from ziprc.evaluation.samplers.pools import read_pool
from ziprc.sampling.fitting import Fitted
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.store.files import write_json
from ziprc.systems.artifacts import calibration_file

NUMPY_SEEDS = 2**32


def run(context: Context) -> str:
    """Write calibration.json of the head that the stage is named after."""
    config, layout = context.config, context.layout
    recorded = read_pool(config, layout, f"validation-{context.name}")
    fitted = Fitted.fit(recorded.pool, recorded.grid, derived_seed(config.seed, "calibration") % NUMPY_SEEDS)
    target = calibration_file(layout.checkpoint(context.name))
    write_json(target, fitted.to_dict())
    context.write_manifest("calibration")
    return f"fitted on {recorded.pool.length.size} rollouts of {len(recorded.prompt_ids)} prompts, wrote {target}"


if __name__ == "__main__":
    run_stage("calibration", run)
