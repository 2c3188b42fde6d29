"""Labels, students and guided decoding as stages, on a tiny experiment with two critics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.doubles import World, tiny_checkpoint, tiny_tables
from ziprc.config.icl_v import Guide
from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.evaluation.critic.guidance import guided_record
from ziprc.evaluation.critic.students import KL_ROLLOUTS
from ziprc.joint.bins import BinGrid
from ziprc.joint.checkpoint import load_model
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.pages.labels import labels_html
from ziprc.plan.stage import Ref
from ziprc.stages import evaluate, grades, guided, qvalues, report, train_critic, train_policy
from ziprc.stages.guided import contexts, shown_scores
from ziprc.store.files import read_json
from ziprc.store.layout import Layout
from ziprc.systems import goals_of, graph_of
from ziprc.systems.icl_v import check_folds, check_guides, check_students
from ziprc.systems.shared import BASE
from ziprc.tables.check import TableSchema
from ziprc.tables.grades import GRADES
from ziprc.tables.guided import GUIDED
from ziprc.tables.qvalues import QVALUES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.data import prompt_fold
from ziprc.training.labelled import labelled_data
from ziprc.training.packs import Graded, Turns, graded_rollouts, pack_data
from ziprc.training.trainees import PolicyTrainee

METHOD_NAMES = ("kl", "rft", "awr", "dpo", "grpo", "ppo")
SETTINGS = {
    "systems": ["icl-v"],
    "rollouts": {"thinking_samples": 4, "test_samples": 6, "student_samples": 4},
    "train_critic": {"length_edges": [0, 8, 16, 32, 64], "pack_rollouts": 4, "batch_size": 8, "learning_rate": 1e-3},
    "qvalues": {"min_p": 0.9},
    "train_policy": {
        "defaults": {"learning_rate": 1e-2, "batch_size": 8, "max_steps": 2, "epochs": 9},
        "students": {**{name: {"method": name} for name in METHOD_NAMES}, "trie": {"labels": "trie"}},
    },
    "guided": {
        "prompts": 3,
        "samples": 2,
        "modes": {"oracle": {"siblings": 2}, "vote": {"siblings": 2, "scores": "vote"}, "alone": {"siblings": 0}},
    },
    "evaluate": {"bootstrap": 40},
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two critics, their labels, and those of the tree."""
    world = World(Config.model_validate(SETTINGS), Layout(tmp_path_factory.mktemp("policies"), "tiny"))
    tiny_checkpoint(world.layout.checkpoint("base"), joint=False)
    tiny_tables(world.layout, "train", prompts=12, samples=4)
    tiny_tables(world.layout, "test", prompts=6, samples=6)
    for name in ("critic-fold0", "critic-fold1"):
        train_critic.run(world.context("train_critic", name))
    for name in ("train", "train-trie"):
        qvalues.run(world.context("qvalues", name))
    return world


def test_every_rollout_is_labelled_by_the_critic_that_has_not_seen_its_prompt(experiment: World) -> None:
    table = QVALUES.read(experiment.layout.table("qvalues", "train"))
    assert table.num_rows == 48
    rollouts = ROLLOUTS.read(experiment.layout.table("rollouts", "train"))
    prompt_of = dict(zip(rollouts["rollout_id"].to_pylist(), rollouts["prompt_id"].to_pylist(), strict=True))
    for rollout, source in zip(table["rollout_id"].to_pylist(), table["source"].to_pylist(), strict=True):
        assert source == f"critic-fold{prompt_fold(prompt_of[rollout], 2)}"
    assert set(table["source"].to_pylist()) == {"critic-fold0", "critic-fold1"}
    said = table.schema.metadata
    assert said[b"kind"] == b'"candidates"' and json.loads(said[b"grid"])["length_edges"] == [0, 8, 16, 32, 64]
    tree = QVALUES.read(experiment.layout.table("qvalues", "train-trie"))
    assert set(tree["source"].to_pylist()) == {"trie"} and set(tree["siblings"].to_pylist()) == {3}
    assert tree["ids"].to_pylist() == table["ids"].to_pylist(), "the same candidates, valued by others"


def test_labels_may_be_of_some_prompts_or_of_the_tokens_taken(
    experiment: World, capsys: pytest.CaptureFixture[str]
) -> None:
    table = experiment.layout.table("qvalues", "train-trie")
    kept = table.read_bytes()

    def labelled(**own: object) -> pa.Table:
        config = experiment.config.model_copy(update={"qvalues": experiment.config.qvalues.model_copy(update=own)})
        qvalues.run(World(config, experiment.layout).context("qvalues", "train-trie"))
        return QVALUES.read(table)

    assert labelled(prompts=5).num_rows == 20 and "7 beyond qvalues.prompts" in capsys.readouterr().err
    some = labelled(folds=1)
    assert 0 < some.num_rows < 48
    mixed = labelled(min_correct_rate=0.25, min_incorrect_rate=0.25)
    assert 0 < mixed.num_rows < 48 and "too often right or wrong" in capsys.readouterr().err
    few = labelled(candidates=False)
    assert few.schema.metadata[b"kind"] == b'"taken"'
    assert [len(of) for of in few["ids"].to_pylist()] == [len(of) - 1 for of in few["offsets"].to_pylist()]
    assert all(x < 0 for of in few["log_prob"].to_pylist() for x in of), "no placeholder"
    with pytest.raises(UserError, match="No prompt is left to label: of 12, left out: 12 too often right or wrong"):
        labelled(min_correct_rate=0.9, min_incorrect_rate=0.9)
    table.write_bytes(kept)


@pytest.mark.parametrize("name", [*METHOD_NAMES, "trie"])
def test_every_student_learns_from_the_labels(experiment: World, name: str) -> None:
    said = train_policy.run(experiment.context("train_policy", f"policy-{name}"))
    folder = experiment.layout.checkpoint(f"policy-{name}")
    assert str(folder) in said and "2 steps" in said
    base, student = (load_model(of) for of in (experiment.layout.checkpoint("base"), folder))
    moved = [not torch.equal(a, b) for a, b in zip(base.parameters(), student.parameters(), strict=True)]
    assert all(moved), "no parameter has a zero gradient"


def test_steps_lower_the_loss_of_every_method(experiment: World) -> None:
    rollouts, _ = graded_rollouts(
        *(s.read(experiment.layout.table(s.name, "train")) for s in (ROLLOUTS, GRADES)), "grades"
    )
    table = QVALUES.read(experiment.layout.table("qvalues", "train"))
    for name in METHOD_NAMES:
        own = experiment.config.train_policy.students[name]
        data = labelled_data(rollouts, table, own, None, "labels")
        trainee = PolicyTrainee(load_model(experiment.layout.checkpoint("base")), own, 261, 64)
        batch = data.batch(np.arange(min(8, len(data))))
        optimizer, losses = torch.optim.AdamW(trainee.parameters(), 1e-3), []
        for _ in range(6):
            loss = trainee.loss(batch).total
            losses.append(loss.item())
            optimizer.zero_grad(), loss.backward(), optimizer.step()
        assert losses[-1] < losses[0] - 1e-3 * abs(losses[0]), name


def test_students_are_compared_with_the_base_on_held_out_prompts(experiment: World) -> None:
    for name in experiment.config.train_policy.students:
        train_policy.run(experiment.context("train_policy", f"policy-{name}"))
        tiny_tables(experiment.layout, f"test-policy-{name}", prompts=6, samples=4)
    for mode in experiment.config.guided.modes:
        guided.run(experiment.context("guided", f"test-guided-{mode}"))
        grades.run(experiment.context("grades", f"test-guided-{mode}"))
    evaluate.run(experiment.context("evaluate", "icl-v"))
    found = read_json(experiment.layout.home / "metrics/icl-v.json")
    assert {mode: of["oracle"] for mode, of in found["guided"].items()} == {
        "oracle": True,
        "vote": False,
        "alone": False,
    }
    assert all(of["prompts"] == 3 and of["kl"]["value"] > 0 for of in found["guided"].values())
    policies = found["policies"]
    assert set(policies) == {"base", *(f"policy-{name}" for name in experiment.config.train_policy.students)}
    assert policies["base"]["rollouts"] == policies["policy-kl"]["rollouts"] == 24, (
        "as many of the base as of a student"
    )
    gap = policies["policy-kl"]["difference"]
    assert set(gap) == {"base", "policy-rft"} and set(policies["policy-rft"]["difference"]) == {"base"}
    value = policies["policy-kl"]["accuracy"]["value"] - policies["base"]["accuracy"]["value"]
    assert gap["base"]["accuracy"]["value"] == pytest.approx(value, abs=2e-6)
    assert all(policies[f"policy-{name}"]["kl"]["value"] > 0 for name in METHOD_NAMES)
    student, base = (load_model(experiment.layout.checkpoint(name)) for name in ("policy-rft", "base"))
    answered = ROLLOUTS.read(experiment.layout.table("rollouts", "test-policy-rft")).to_pylist()
    nats = []
    for row in [row for row in answered if row["sample_index"] < KL_ROLLOUTS]:
        ids = torch.tensor([row["prompt_token_ids"] + row["response_token_ids"][:-1]])
        with torch.inference_mode():
            p, q = (
                of(ids).logits[0, len(row["prompt_token_ids"]) - 1 :, :261].log_softmax(-1) for of in (student, base)
            )
        nats.append((p.exp() * (p - q)).sum().item())
    assert policies["policy-rft"]["kl"]["value"] == pytest.approx(np.mean(nats), rel=1e-4), (
        "of the student from the base"
    )
    own = found["labels"]["train"]
    assert own["states"] < own["candidates"] and 0 < own["choice"] < 1
    assert set(found["choosing"]) == {"mean", "majority", "oracle", "critic/0", "critic/3"}
    assert found["choosing"]["oracle"]["value"] >= found["choosing"]["mean"]["value"]
    report.run(experiment.context("report", "report"))
    text = (experiment.layout.home / "report.html").read_text()
    for part in (
        "Policies made of the labels",
        "The critic as a judge of answers",
        "In accuracy",
        "spread of Q",
        "oracle (oracle-assisted)",
    ):
        assert part in text


def test_what_the_critic_is_told_of_the_siblings() -> None:
    nothing, told = np.zeros(1, np.int32), ((1.0, "3"), (0.0, "4"), (0.0, "4"), (0.0, ""))
    siblings = [Graded("r", "p", nothing, nothing, score, answer, False, True) for score, answer in told]
    assert shown_scores(siblings, "true") == [1.0, 0.0, 0.0, 0.0]
    assert shown_scores(siblings, "vote") == [0.0, 1.0, 1.0, 0.0]
    assert shown_scores(siblings[3:], "vote") == [0.0], "no answer, no winner"


def test_a_guide_reads_siblings_with_feedback_up_to_where_the_response_begins(experiment: World) -> None:
    context = experiment.context("guided", "test-guided-oracle")
    tables = (s.read(experiment.layout.table(s.name, "test")) for s in (ROLLOUTS, GRADES))
    rollouts, _ = graded_rollouts(*tables, "grades")
    tokenizer = load_tokenizer(experiment.layout.checkpoint("base"))
    own = experiment.config.train_critic
    for siblings in (0, 2):
        (read,) = contexts(rollouts, [[0, 1, 2, 3]], Guide(siblings=siblings), context, Turns(tokenizer))
        data = pack_data(rollouts, [[0, 1, 2, 3], [0, 1]], tokenizer, own, BinGrid((0.0, 1.0), tuple(own.length_edges)))
        assert read.tolist() == data.tokens[: data.first[siblings] + 1].tolist()


def test_guidance_is_compared_with_responses_that_no_critic_has_read(tmp_path: Path) -> None:
    def row(name: str, index: int) -> dict[str, object]:
        return {
            "rollout_id": name, "prompt_id": "p", "sample_index": index, "seed": 0, "prompt_token_ids": [1],
            "response_token_ids": [2, 3], "response_text": "", "finish_reason": "stop", "thinking": True, "policy": "base",
        }  # fmt: skip

    def written(schema: TableSchema, name: str, rows: list[dict[str, object]]) -> Path:
        schema.write(tmp_path / name, schema.make(rows))
        return tmp_path / name

    def graded(answers: str, scores: tuple[float, ...], stem: str) -> list[dict[str, object]]:
        known = {"grader": "exact", "status": "graded", "rationale": None}
        pairs = zip(answers, scores, strict=True)
        return [
            {"rollout_id": f"{stem}{n}", "score": s, "extracted_answer": a, **known} for n, (a, s) in enumerate(pairs)
        ]

    modes = {"guided": {"samples": 2, "modes": {"exp": {"siblings": 2}}}, "evaluate": {"bootstrap": 20}}
    reads = {
        "rollouts/test": written(ROLLOUTS, "r.parquet", [row(f"r{n}", n) for n in range(5)]),
        "grades/test": written(GRADES, "g.parquet", graded("aabbc", (1, 1, 0, 0, 1), "r")),
        "guided/test-guided-exp": written(GUIDED, "x.parquet", [row(f"x{n}", n) | {"kl": 0.5 + n} for n in range(2)]),
        "grades/test-guided-exp": written(GRADES, "xg.parquet", graded("ab", (1, 0), "x")),
    }
    found = guided_record(Config.model_validate(modes), reads)["guided"]["exp"]
    assert (found["accuracy"]["value"], found["base"]["accuracy"]["value"]) == (0.5, 0.0), "the third and the fourth"
    assert (found["majority"]["value"], found["base"]["majority"]["value"]) == (1.0, 0.5), "siblings vote on both sides"
    assert found["difference"]["majority"]["value"] == 0.5 and found["kl"]["value"] == 1.0 and found["oracle"]


def test_modes_that_cannot_be_judged_or_read_are_refused() -> None:
    few = SETTINGS | {"guided": {"samples": 5, "modes": {"exp": {"siblings": 2}}}}
    with pytest.raises(
        UserError, match=r"reads 2 test rollouts .* compared with 5 others, but rollouts.test_samples is 6"
    ):
        check_guides(Config.model_validate(few))
    many = SETTINGS | {"guided": {"samples": 1, "modes": {"exp": {"siblings": 4}}}}
    with pytest.raises(UserError, match=r"reads 4 siblings; the critic has been trained with at most 3"):
        check_guides(Config.model_validate(many))
    greedy = SETTINGS | {"rollouts": {**SETTINGS["rollouts"], "sampling": {"temperature": 0}}}
    with pytest.raises(UserError, match="temperature must be above 0"):
        check_guides(Config.model_validate(greedy))


def test_the_page_of_labels_shows_values_and_rivals_and_is_no_code(
    experiment: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = labels_html(experiment.layout.home, "train", 4)
    assert page.name == "inspect-labels-train.html"
    data = json.loads(page.read_text().partition('type="application/json">')[2].partition("</script>")[0])
    assert [of["verdict"] for of in data["rollouts"]] == ["right", "wrong"] * 2
    table = {row["rollout_id"]: row for row in QVALUES.read(experiment.layout.table("qvalues", "train")).to_pylist()}
    for shown in data["rollouts"]:
        own = table[shown["id"]]
        assert shown["start"] == pytest.approx(own["values"][0], abs=1e-3)
        assert len(shown["expected"]) == len(shown["tokens"]) == len(shown["candidates"]) == shown["length"]
        for t, rivals in enumerate(shown["candidates"]):
            (taken,) = [of for of in rivals if of[3]]
            assert taken[0] == shown["tokens"][t] and taken[2] == pytest.approx(shown["expected"][t], abs=2e-3)
            assert [of[2] for of in rivals] == sorted((of[2] for of in rivals), reverse=True)
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda *arguments: "</script><b>")
    text = labels_html(experiment.layout.home, "train", 4).read_text()
    assert "<b>" not in text and text.count("</script>") == 2
    with pytest.raises(UserError, match=r"qvalues/trian.parquet does not exist \(did you mean 'train'\?\)"):
        labels_html(experiment.layout.home, "trian")


def test_students_asked_more_often_than_the_base_are_refused() -> None:
    with pytest.raises(UserError, match=r"student_samples is 7, but the base .* 6 times"):
        check_students(Config.model_validate(SETTINGS | {"rollouts": {"student_samples": 7, "test_samples": 6}}))
    with pytest.raises(UserError, match=r"qvalues.folds is 3, but train_critic.folds cuts the prompts into 2"):
        check_folds(Config.model_validate(SETTINGS | {"qvalues": {"folds": 3}}))


def test_a_student_of_several_rounds_is_labelled_anew_on_what_it_has_become(tmp_path: Path) -> None:
    own = {"rft": {"method": "rft"}, "kl": {"rounds": 3}, "kl-trie": {"labels": "trie", "rounds": 2}}
    config = Config.model_validate(SETTINGS | {"train_policy": {"students": own}})
    graph = graph_of(config, Layout(tmp_path, "tiny"))
    made = {str(ref) for ref in graph.closure(goals_of(config))}
    chain = [Ref("train_policy", "policy-kl")]
    while (start := graph.parents(chain[-1])["base"]) != BASE:
        before = graph.parents(chain[-1])
        assert before["rollouts"] == Ref("rollouts", f"train-{start.name}") == Ref("rollouts", before["grades"].name)
        assert graph.parents(before["rollouts"])["policy"] == start, "sampled by the policy that goes on"
        assert graph.parents(before["qvalues"])["base"] == start, "which is the reference too"
        assert {"critic-fold0", "critic-fold1"} <= set(graph.parents(before["qvalues"]))
        chain.append(start)
    assert [ref.name for ref in chain] == ["policy-kl", "policy-kl-round2", "policy-kl-round1"]
    assert graph.parents(Ref("train_policy", "policy-kl-trie"))["qvalues"].name == "train-policy-kl-trie-round1-trie"
    assert "rollouts test-policy-kl" in made and "rollouts test-policy-kl-round1" not in made, (
        "the last round is compared"
    )
    with pytest.raises(UserError, match="'kl-round2' ends as the name of a round does"):
        check_students(Config.model_validate(SETTINGS | {"train_policy": {"students": {"kl-round2": {}}}}))


def test_a_second_round_starts_from_the_first(experiment: World) -> None:
    students = {"twice": {"rounds": 2, "learning_rate": 1e-2, "batch_size": 8, "max_steps": 2}}
    world = World(Config.model_validate(SETTINGS | {"train_policy": {"students": students}}), experiment.layout)
    train_policy.run(world.context("train_policy", "policy-twice-round1"))
    tiny_tables(experiment.layout, "train-policy-twice-round1", prompts=12, samples=4)
    qvalues.run(world.context("qvalues", "train-policy-twice-round1"))
    train_policy.run(world.context("train_policy", "policy-twice"))
    base, first, second = (
        load_model(experiment.layout.checkpoint(name)).model.layers[0].mlp.up_proj.weight
        for name in ("base", "policy-twice-round1", "policy-twice")
    )
    assert (second - first).norm() < (second - base).norm() and not torch.equal(first, second)
