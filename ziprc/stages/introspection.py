"""introspection: the joint of one checkpoint at every labelled state, and how likely the emitted token was there.

`ziprc` and `lite` read rollouts/test with that head, to judge its predictions. `validation-ziprc` and `test-ziprc` read
the pool of that name with the head that sampled it: what an adaptive sampler would have seen, for its replay.
"""

from __future__ import annotations

from ziprc.evaluation.outcomes import response_lengths
from ziprc.progress import progress
from ziprc.reading.states import JointReader, states_table, token_pairs, token_ranges
from ziprc.stages.context import Context, run_stage
from ziprc.store.files import require_space
from ziprc.tables.introspection import INTROSPECTION
from ziprc.tables.rollouts import ROLLOUTS

SCALAR_BYTES = 20  # five numbers beside the joint
COPIES = 2  # the pieces and the table


def run(context: Context) -> str:
    """Read the head at every token of the rollouts and write the table; the closing line."""
    config, target = context.config, context.target
    rollouts = ROLLOUTS.read(context.reads["rollouts"])
    reader = JointReader.open(context.reads["checkpoint"], config.introspection.dtype)
    per_state = 2 * reader.joint.grid.size + SCALAR_BYTES
    require_space(target.parent, COPIES * int(response_lengths(rollouts).sum()) * per_state)
    pieces = context.pieces(INTROSPECTION, token_ranges(rollouts))
    missing = {number: rollouts.slice(a, b - a) for number in pieces.missing() for a, b in [pieces.parts[number]]}
    with progress(sum(map(len, missing.values())), f"introspection {context.name}", "rollouts") as bar:
        for number, part in missing.items():
            readings = reader.readings(token_pairs(part), config.runtime.forward_tokens, config.runtime.position_chunk)
            pieces.write(number, states_table(part["rollout_id"].combine_chunks(), readings, reader.joint.grid))
            bar.update(len(part))
    states = pieces.merge(target)
    context.write_manifest()
    pieces.remove()
    return f"wrote {states} states of {rollouts.num_rows} rollouts to {target}"


if __name__ == "__main__":
    run_stage("introspection", run)
