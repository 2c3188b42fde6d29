"""introspection: the joint of one checkpoint at every labelled state, and how likely the emitted token was there.

`ziprc` and `lite` read rollouts/test with that head, to judge its predictions. `validation-ziprc` and `test-ziprc` read
the pool of that name with the head that sampled it: what an adaptive sampler would have seen, for its replay.
"""

from __future__ import annotations

from ziprc.evaluation.outcomes import response_lengths
from ziprc.reading.states import JointReader, write_states
from ziprc.stages.context import Context, run_stage
from ziprc.store.files import require_space
from ziprc.tables.rollouts import ROLLOUTS

SCALAR_BYTES = 20  # five numbers beside the joint


def run(context: Context) -> str:
    config, target = context.config, context.target
    rollouts = ROLLOUTS.read(context.reads["rollouts"])
    reader = JointReader.open(context.reads["checkpoint"], config.introspection.dtype)
    per_state = 2 * reader.joint.grid.size + SCALAR_BYTES
    require_space(target.parent, int(response_lengths(rollouts).sum()) * per_state)
    states = write_states(target, rollouts, reader, config.runtime.forward_tokens, config.runtime.position_chunk)
    context.write_manifest()
    return f"wrote {states} states of {rollouts.num_rows} rollouts to {target}"


if __name__ == "__main__":
    run_stage("introspection", run)
