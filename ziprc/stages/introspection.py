"""introspection: the joint of one checkpoint (`ziprc`, `lite`) at every labelled state of the test rollouts."""

from __future__ import annotations

from ziprc.artifacts import output_lock, require_space, write_manifest
from ziprc.config import params_of
from ziprc.evaluation.outcomes import response_lengths
from ziprc.evaluation.states import JointReader, write_states
from ziprc.schemas import read_table
from ziprc.stages.context import Context, run_stage


def run(context: Context) -> str:
    config, layout = context.config, context.layout
    target = layout.table("introspection", context.name)
    source, checkpoint = layout.table("rollouts", "test"), layout.checkpoint(context.name)
    rollouts = read_table(source, "rollouts")
    reader = JointReader.open(checkpoint, config.introspection.dtype)
    require_space(target.parent, int(response_lengths(rollouts).sum()) * reader.joint.grid.size * 2)
    with output_lock(target):
        states = write_states(target, rollouts, reader, config.runtime.forward_tokens)
        write_manifest(
            target, params_of(config, "introspection", context.name), {"rollouts": source, "checkpoint": checkpoint}
        )
    return f"wrote {states} states of {rollouts.num_rows} rollouts to {target}"


if __name__ == "__main__":
    run_stage("introspection", run)
