"""guided: test prompts answered by the base under the guidance of a critic, `test-guided-<mode>` each.

The critic has read the first `siblings` test rollouts of the prompt with their true scores (oracle-assisted: at test time
nobody has these), or with those of their own vote (`scores: vote`), or none at all; the last two need no answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ziprc.config.icl_v import Guide
from ziprc.engines.base import Response, stop_token_ids
from ziprc.engines.recording import Wanted, rollout_table
from ziprc.errors import UserError
from ziprc.joint.reasoning import text_rows
from ziprc.joint.tilt import Tilt, log_weight
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.progress import progress
from ziprc.reading.states import JointReader, load_for_reading
from ziprc.sampling.guided import Guided
from ziprc.stages.context import Context, run_stage
from ziprc.store.digests import derived_seed
from ziprc.tables.grades import GRADES
from ziprc.tables.guided import GUIDED
from ziprc.tables.pieces import cut
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.packs import Graded, Turns, by_prompt_of, fitted, graded_rollouts, pack_kind, require_kind

PIECE_PROMPTS = 16


def shown_scores(siblings: Sequence[Graded], scores: str) -> list[float]:
    """What the critic is told of its siblings: their scores, or whether each gave their commonest answer."""
    if scores == "true":
        return [s.score for s in siblings]
    votes = Counter(s.answer for s in siblings if s.answer)
    winner = votes.most_common(1)[0][0] if votes else None
    return [float(s.answer == winner) if winner else 0.0 for s in siblings]


def contexts(
    rollouts: Sequence[Graded], groups: Sequence[Sequence[int]], guide: Guide, context: Context, turns: Turns
) -> list[NDArray[np.int32]]:
    """For every prompt what the critic reads: its siblings with feedback, up to where a response begins."""
    rollouts = [turns.fitting(r) for r in rollouts]
    packs = [[*own[: guide.siblings], own[0]] for own in groups]  # the last one stands for the response to come
    told = [[*shown_scores([rollouts[i] for i in pack[:-1]], guide.scores), 0.0] for pack in packs]
    kept, before = fitted(turns, rollouts, packs, context.config.train_critic, told)
    found = []
    for pack, gaps in zip(kept, before, strict=True):
        responses = [rollouts[i].response for i in pack[:-1]]
        parts = [of for pair in zip(gaps, responses, strict=False) for of in pair]
        found.append(np.concatenate([*parts, gaps[-1]]))
    return found


def run(context: Context) -> str:
    """Answer test prompts with reference and critic side by side and write the responses; the closing line."""
    config, reads, own = context.config, context.reads, context.config.guided
    guide, asked = own.modes[context.variant.mode], config.rollouts
    grades = GRADES.read(reads["grades"])
    rollouts, _ = graded_rollouts(ROLLOUTS.read(reads["rollouts"]), grades, str(reads["grades"]))
    groups = [of for of in by_prompt_of(rollouts).values() if len(of) > guide.siblings][: own.prompts]
    if not groups:
        raise UserError(
            f"{reads['rollouts']}: no prompt has more than {guide.siblings} graded rollouts. Lower `siblings`."
        )
    tokenizer, reference = load_tokenizer(reads["base"]), load_for_reading(reads["base"])
    require_kind(reads["critic"], pack_kind(config.train_critic, tokenizer))
    critic = JointReader.open(reads["critic"])
    text = text_rows(tokenizer, reference)
    stops = frozenset(stop_token_ids(reads["base"], tokenizer))
    grid, tilt = critic.joint.grid, Tilt(guide.tilt)

    def weigh(q: NDArray[np.float64], cells: NDArray[np.float32]) -> NDArray[np.float64]:
        return log_weight(tilt, q, guide.eta, guide.price, cells, grid)

    decoder = Guided(reference, critic, text, asked.sampling, stops, weigh)
    read = contexts(rollouts, groups, guide, context, Turns(tokenizer, config.train_critic.layout))
    pieces = context.pieces(GUIDED, cut(len(groups), PIECE_PROMPTS))
    missing = {number: range(*pieces.parts[number]) for number in pieces.missing()}
    longest = max(map(len, read)) + own.samples * asked.max_new_tokens  # places of one prompt's row
    together = max(1, config.runtime.forward_tokens // longest)

    def answered(prompts: Sequence[int]) -> pa.Table:
        """Rows of these prompts, which are answered at once."""
        firsts = [rollouts[groups[p][0]] for p in prompts]
        seeds = [[derived_seed(config.seed, "guided", of.prompt_id, n) for n in range(own.samples)] for of in firsts]
        asked_for = [of.prompt.tolist() for of in firsts]
        made = decoder.respond(asked_for, [read[p].tolist() for p in prompts], seeds, asked.max_new_tokens)
        wanted = [
            Wanted(of.prompt_id, of.thinking, n, seed, tuple(ids))
            for of, ids, drawn in zip(firsts, asked_for, seeds, strict=True) for n, seed in enumerate(drawn)
        ]  # fmt: skip
        responses = [response for of in made for response in of]
        answers = [Response("", response.token_ids, response.finish_reason) for response in responses]
        kl = pa.array([response.kl for response in responses], pa.float32())
        return rollout_table(wanted, answers, context.name, tokenizer).append_column(GUIDED.columns.field("kl"), kl)

    with progress(sum(map(len, missing.values())), f"guided {context.name}", "prompts") as bar:
        for number, part in missing.items():
            tables = []
            for start, end in cut(len(part), together):
                tables.append(answered(part[start:end]))
                bar.update(end - start)
            pieces.write(number, pa.concat_tables(tables))
    rows = pieces.merge(context.target)
    context.write_manifest()
    pieces.remove()
    kl = pc.mean(GUIDED.read(context.target)["kl"]).as_py()
    assisted = " (oracle-assisted)" if guide.siblings and guide.scores == "true" else ""
    return f"wrote {rows} rollouts of {len(groups)} prompts{assisted}, {kl:.2f} nats each from the base, to {context.target}"


if __name__ == "__main__":
    run_stage("guided", run)
