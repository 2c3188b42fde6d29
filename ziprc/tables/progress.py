"""How on-policy training went: one row a rollout, and one before the first.

Counts, shares and means are over all responses of the rollout and all processes. `score` and what is called right are the
grader's, unshaped; `reward` is what the optimiser saw. A share over nothing is null. Ratios are trainer over sampler for
`mismatch_*` (before any update), and new over old policy for the others. The same run gives the same table, so times are not
in it: they lie in `seconds/<name>.json`, which belongs to no artifact.

Where there is a reasoning vocabulary: `copies_share` of the tokens of thoughts, `copies_by_quarter` of a thought, how many
different ones (`copies_used`), `violations` outside the block (none may be); `logit_gap`, copy minus source, mean over states
and pairs; `copy_kl`, nats between the laws after a copy and after its source; `drift` of copies from their sources, in norms of
the source, in the output matrix (and in the input matrix); `entropy` in nats a token, in the block and outside.

Where the work is graded by a rubric: responses whose grade was `asked` for, questions `saved` because an equal one was,
grades that a failed server left `unscored` or that were `unreadable` (or their questions too long); mean `rubric_score`;
suspected hacking, the share of graded wrong answers with a score above .8, and suspected false positives, of graded right
answers with a score below .95. What the task's program says, and no optimiser sees: the share of right answers that is
`unsound`, of all that is right and sound (`verified`), and the mean distance of the grader's score from the program's
(`grader_gap`).
"""

from __future__ import annotations

import pyarrow as pa

from ziprc.tables.check import TEXT, TableSchema, column, columns

COUNTS = (
    "step", "window", "next_window", "prompts", "responses", "ungraded", "tokens_prompt", "tokens_response", "tokens_total",
    "held_out_tokens", "copies_used", "violations", "asked", "saved", "unscored", "unreadable",
)  # fmt: skip
MEASURES = (
    "success", "success_finished", "truncated", "score", "reward", "reward_std", "reward_total", "zero_variance",
    "length_mean", "length_max", "right_length_mean", "right_length_q50", "right_length_q95",
    "entropy", "kl", "clip_fraction", "grad_norm", "learning_rate",
    "ratio_mean", "ratio_std", "ratio_p95", "log_ratio_mean", "log_ratio_std", "ratio_outside", "mismatch_kl", "mismatch_max",
    "held_out", "copies_share", "logit_gap", "copy_kl", "drift_mean", "drift_max", "drift_input",
    "entropy_inside", "entropy_outside",
    "rubric_score", "unsound", "verified", "suspected_hacking", "suspected_false", "grader_gap",
)  # fmt: skip

PROGRESS = TableSchema(
    "progress",
    pa.schema(
        [
            column("rollout", pa.int64()),
            *columns(pa.int64(), *COUNTS, null=True),
            *columns(pa.float64(), *MEASURES, null=True),
            column("probe", pa.bool_(), null=True),
            column("decision", TEXT, null=True),  # why the next window is what it is
            *columns(TEXT, "by_difficulty", "by_reason", null=True),  # JSON: responses and right ones; responses
            *columns(TEXT, "copies_by_quarter", "most_moved", null=True),  # JSON: shares; id of a copy, its distance
            column(
                "held_out_scores", pa.large_list(pa.float64()), null=True
            ),  # mean score of every judged prompt, in order
        ]
    ),
    key=("rollout",),
    unit_range=("success", "success_finished", "truncated", "score", "zero_variance", "held_out"),
)
