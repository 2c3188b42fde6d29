"""gradings: what a grader is asked, one question a response, and the teacher's score that it should come near.

A table of prompts: so a grader is sampled, trained on-policy and tested by the stages that know nothing of graders. `answer`
is the teacher's score in [0, 1] as text; `extra` has the teacher's words, whether the answer was right, and the prompt. Equal
responses to a prompt are one question. Splits follow those of the prompts.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict

from ziprc.chat import prompt_token_ids
from ziprc.errors import UserError
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.base import RIGHT
from ziprc.rewards.grade import target_of
from ziprc.rewards.judge import control_strings
from ziprc.rewards.rubric import half_an_item, question_of, render
from ziprc.stages.context import Context, run_stage
from ziprc.tables.grades import GRADES
from ziprc.tables.prompts import PROMPTS
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.rubrics import RUBRICS

TASK = "gradings"


def run(context: Context) -> str:
    """Write the questions to graders of a split; the closing line."""
    reads, own = context.reads, context.config.gradings
    longest = own.max_model_len - own.max_new_tokens
    prompts = {row["prompt_id"]: row for row in PROMPTS.read(reads["prompts"]).to_pylist()}
    rubrics = {row["prompt_id"]: row for row in RUBRICS.read(reads["rubrics"]).to_pylist()}
    right, teacher = (
        {row["rollout_id"]: row for row in GRADES.read(reads[name]).to_pylist()} for name in ("grades", "assessments")
    )
    tokenizer = load_tokenizer(reads["base"])
    forbidden = control_strings(tokenizer)
    left_out, taken, seen, rows = Counter[str](), defaultdict[str, int](int), set(), []
    rollouts = ROLLOUTS.read(reads["rollouts"]).select(["rollout_id", "prompt_id", "response_text", "thinking"])
    for row in rollouts.to_pylist():
        prompt, rubric, said = prompts[row["prompt_id"]], rubrics[row["prompt_id"]], teacher[row["rollout_id"]]
        key = row["prompt_id"], row["response_text"]
        if said["score"] is None:
            left_out[said["status"]] += 1
            continue
        if target_of(str(said["score"])) is None:
            raise UserError(
                f"{reads['assessments']}: the teacher's score of rollout {row['rollout_id']} is {said['score']}."
            )
        if key in seen or taken[row["prompt_id"]] >= own.responses:
            left_out["the same again" if key in seen else "more than gradings.responses"] += 1
            continue
        question = render(question_of(prompt["messages"]), rubric["text"], row["response_text"], forbidden)
        if len(prompt_token_ids(tokenizer, question, thinking=False)) > longest:
            left_out["longer than gradings.max_model_len allows"] += 1
            continue
        seen.add(key)
        taken[row["prompt_id"]] += 1
        score = right[row["rollout_id"]]["score"]
        extra = {
            "prompt_id": row["prompt_id"], "assessment": said["rationale"], "right": None if score is None else score >= RIGHT,
            "half_an_item": half_an_item(rubric["rubric"]), "parts": said["parts"],
        }  # fmt: skip
        rows.append(
            {
                "prompt_id": row["rollout_id"], "task": TASK, "source": prompt["source"], "split": context.variant,
                "messages": question, "answer": f"{said['score']:.6g}", "difficulty": prompt["difficulty"], "extra":
                json.dumps(extra, sort_keys=True),
            }
        )  # fmt: skip
    if not rows:
        raise UserError(f"{reads['assessments']} has no score for any response: there is nothing to ask a grader.")
    context.write(PROMPTS, PROMPTS.make(rows))
    return f"wrote {len(rows)} questions to a grader to {context.target}, left out {dict(left_out) or 'none'}"


if __name__ == "__main__":
    run_stage("gradings", run)
