"""What guided decoding gains: every mode on the same held-out prompts as the base's own responses.

    guided   {mode: {accuracy, majority, tokens, kl, difference: {accuracy, majority, tokens}, siblings, scores, oracle, prompts}}

The base answers with test rollouts that no critic has read. `majority` is the vote of the siblings and the guided responses
together, against that of the siblings and as many of the base: equal numbers of responses, so nearly equal tokens. `oracle`
modes have read the true scores of their siblings, which nobody has at test time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from ziprc.config.load import Config
from ziprc.evaluation.accuracy import majority_scores
from ziprc.evaluation.bootstrap import Estimate, Resampling, quotient
from ziprc.tables.grades import GRADES
from ziprc.tables.guided import GUIDED
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.packs import Graded, by_prompt_of, graded_rollouts


def _estimates(
    config: Config, answers: Mapping[str, Sequence[Graded]], siblings: Mapping[str, Sequence[Graded]]
) -> dict[str, Estimate]:
    """Means over prompts, in the order of `answers`; every response counts."""
    group = np.repeat(np.arange(len(answers)), [len(of) for of in answers.values()])
    every = [one for of in answers.values() for one in of]
    boot = Resampling(group, config.evaluate.bootstrap, config.seed, len(answers))
    voters = [[*siblings[prompt], *of] for prompt, of in answers.items()]
    flat = [one for of in voters for one in of]
    voter: NDArray[np.int64] = np.repeat(np.arange(len(voters)), [len(of) for of in voters])
    votes = majority_scores(
        voter, [one.answer or None for one in flat], np.array([one.score for one in flat]), len(voters)
    )
    return {
        "accuracy": boot.ratio([one.score for one in every]),
        "majority": quotient(*boot.prompt_totals(votes, np.ones(len(voters)))),
        "tokens": boot.ratio([len(one.response) for one in every]),
    }


def guided_record(config: Config, reads: Mapping[str, Path]) -> dict[str, Any]:
    """The record `guided`; empty where the experiment has no mode."""
    own, samples, found = config.evaluate, config.guided.samples, {}
    if not config.guided.modes:
        return {"guided": found}
    plain, _ = graded_rollouts(
        ROLLOUTS.read(reads["rollouts/test"]), GRADES.read(reads["grades/test"]), str(reads["grades/test"])
    )
    known = {prompt: [plain[i] for i in numbers] for prompt, numbers in by_prompt_of(plain).items()}
    for name, mode in config.guided.modes.items():
        where = reads[f"grades/test-guided-{name}"]
        table = GUIDED.read(reads[f"guided/test-guided-{name}"])
        made, ungraded = graded_rollouts(table, GRADES.read(where), str(where))
        guided = {prompt: [made[i] for i in numbers] for prompt, numbers in by_prompt_of(made).items()}
        siblings = {prompt: known[prompt][: mode.siblings] for prompt in guided}
        base = {prompt: known[prompt][mode.siblings :][:samples] for prompt in guided}
        mine, theirs = (_estimates(config, of, siblings) for of in (guided, base))
        group = np.unique(table["prompt_id"].to_pylist(), return_inverse=True)[1]
        kl = Resampling(group, own.bootstrap, config.seed).ratio(table["kl"].to_numpy())
        found[name] = {
            **{key: estimate.interval(own.confidence) for key, estimate in mine.items()},
            "kl": kl.interval(own.confidence), "siblings": mode.siblings, "scores": mode.scores, "ungraded": ungraded,
            "oracle": bool(mode.siblings) and mode.scores == "true", "prompts": pc.count_distinct(table["prompt_id"]).as_py(),
            "base": {key: estimate.interval(own.confidence) for key, estimate in theirs.items()},
            "difference": {key: (mine[key] - theirs[key]).interval(own.confidence) for key in mine},
        }  # fmt: skip
    return {"guided": found}
