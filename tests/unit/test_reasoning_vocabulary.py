"""A reasoning vocabulary as stages of an experiment: expand, warm up, train, test four ways, the record and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.doubles import World, tiny_checkpoint, tiny_tables
from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.evaluation.rl.vocabulary import headline
from ziprc.joint.checkpoint import load_model
from ziprc.joint.head import read_manifest
from ziprc.joint.reasoning import ReasoningVocabulary, read_reasoning
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.pages.reasoning_vocabulary import findings, stretches
from ziprc.plan.stage import Ref
from ziprc.stages import evaluate, expand, grades, report, rollouts, train_online, warm_up
from ziprc.store.files import read_json
from ziprc.store.layout import Layout
from ziprc.store.manifest import require_intact
from ziprc.systems import goals_of
from ziprc.systems.online import check_arms, starts
from ziprc.systems.reasoning_vocabulary import check_models
from ziprc.systems.reasoning_vocabulary import rollouts as tables_of
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.tables.token_map import TOKEN_MAP

SETTINGS: dict[str, Any] = {
    "systems": ["reasoning-vocabulary"],
    "prompts": {"train": 12, "validation": 4, "test": 6},
    "rollouts": {"engine": "hf", "max_model_len": 200, "max_new_tokens": 24, "test_samples": 4, "sampling": {"min_p": 0}},
    "expand": {"models": {
        "copies": {"copies": 2}, "few": {"subset": "frequent", "frequent": 5}, "units": {"adds": "units", "as_many_as": "few"},
    }},
    "warm_up": {"models": {"dialect": {"model": "copies", "tokens": 3000, "batch_tokens": 500},
                           "control": {"tokens": 3000, "batch_tokens": 500}}},
    "train_online": {
        "engine": "hf", "defaults": {"rollouts": 2, "prompts": 2, "samples": 4, "learning_rate": 1e-3},
        "arms": {
            "plain": {}, "wide": {"start": "expanded-units"}, "frozen": {"start": "expanded-copies", "copies_rate": 0},
            "warm": {"start": "warmed-dialect"}, "control": {"start": "warmed-control"},
        },
    },
    "evaluate": {"bootstrap": 60},
}  # fmt: skip
ARMS = ("plain", "wide", "frozen", "warm", "control")
COPIED = ("online-frozen", "online-warm")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(Config.model_validate(SETTINGS), Layout(tmp_path_factory.mktemp("vocabulary"), "tiny"))
    tiny_checkpoint(world.layout.checkpoint("base"), joint=False, thinking=True)
    for split, prompts in (("train", 12), ("validation", 4), ("test", 6)):
        tiny_tables(world.layout, split, prompts=prompts, samples=4)
    for name in ("copies", "few", "units"):
        expand.run(world.context("expand", f"expanded-{name}"))
    for name in ("dialect", "control"):
        warm_up.run(world.context("warm_up", f"warmed-{name}"))
    for name in ARMS:
        train_online.run(world.context("train_online", f"online-{name}"))
    for name in tables_of(world.config):
        rollouts.run(world.context("rollouts", name))
        grades.run(world.context("grades", name))
    evaluate.run(world.context("evaluate", "reasoning-vocabulary"))
    return world


@pytest.fixture
def record(experiment: World) -> dict[str, Any]:
    return read_json(experiment.layout.home / "metrics" / "reasoning-vocabulary.json")


def known(experiment: World, name: str) -> ReasoningVocabulary:
    found = read_reasoning(experiment.layout.checkpoint(name))
    assert found is not None
    return found


def test_copies_last_through_every_stage(experiment: World) -> None:
    for name in ("expanded-copies", "warmed-dialect", *COPIED):
        folder = experiment.layout.checkpoint(name)
        require_intact(folder)
        assert known(experiment, name).size == 512
        assert load_tokenizer(folder).decode([known(experiment, name).start]) == load_tokenizer(folder).decode([0])
    for name in ("expanded-units", "warmed-control", "online-plain", "online-control"):
        assert read_reasoning(experiment.layout.checkpoint(name)) is None
    table = TOKEN_MAP.read(experiment.layout.checkpoint("expanded-copies") / "token_map.parquet").to_pylist()
    assert "token_map.parquet" in read_manifest(experiment.layout.checkpoint("expanded-copies"))["files"]
    assert [row["multiplicity"] for row in table] == [1] * 256 + [2] * 256
    assert [row["source_id"] for row in table] == known(experiment, "expanded-copies").of_row.tolist()


def test_the_most_frequent_are_those_of_the_bases_thoughts(experiment: World) -> None:
    spoken = ROLLOUTS.read(experiment.layout.table("rollouts", "train"))["response_token_ids"].to_pylist()
    counts = np.bincount([i for ids in spoken for i in ids if i < 256])
    assert set(known(experiment, "expanded-few").source_ids) == set(np.argsort(-counts, kind="stable")[:5])
    reads = experiment.context("expand", "expanded-few").reads
    assert set(reads) == {"base", "rollouts"} and set(experiment.context("expand", "expanded-copies").reads) == {"base"}


def test_units_are_as_many_as_the_copies_that_they_stand_beside(experiment: World) -> None:
    base, wide = (load_model(experiment.layout.checkpoint(name)) for name in ("base", "expanded-units"))
    more = wide.num_parameters() - base.num_parameters()
    assert abs(more - 5 * 32) <= 3 * 32 * 2 / 2  # to the nearest unit in each of two layers


def test_a_warm_up_teaches_copies_and_its_control_does_not(experiment: World) -> None:
    own = known(experiment, "warmed-dialect")
    before, after = (load_model(experiment.layout.checkpoint(n)) for n in ("expanded-copies", "warmed-dialect"))
    moved = (after.lm_head.weight - before.lm_head.weight)[own.rows].norm(dim=-1)
    assert float(moved.detach().max()) > 0
    control = load_model(experiment.layout.checkpoint("warmed-control"))
    assert len(control.lm_head.weight) == own.start


def test_every_policy_with_copies_is_tested_four_ways(experiment: World) -> None:
    for name in COPIED:
        own = known(experiment, name)
        tables = {
            what: ROLLOUTS.read(experiment.layout.table("rollouts", f"test-{name}{what}")).to_pylist()
            for what in ("", "-banned", "-kept", "-swapped")
        }
        assert not any(own.is_copy(row["response_token_ids"]).any() for row in tables["-banned"])
        halves = 0
        for plain, kept, swapped in zip(tables[""], tables["-kept"], tables["-swapped"], strict=True):
            ids = np.array(plain["response_token_ids"])
            inside = np.flatnonzero(own.inside([own.at_end(plain["prompt_token_ids"])], ids[None])[0])
            half = int(inside[len(inside) // 2]) if len(inside) else 0
            assert kept["prompt_token_ids"] == plain["prompt_token_ids"]
            assert kept["response_token_ids"][:half] == ids[:half].tolist()
            assert swapped["response_token_ids"][:half] == own.plain(ids[:half]).tolist()
            assert max(len(row["response_token_ids"]) for row in (kept, swapped)) <= 24
            assert (kept["seed"], kept["prompt_id"]) == (swapped["seed"], swapped["prompt_id"])
            halves += half > 0
        assert halves > 10
    assert not {f"test-{name}-kept" for name in ("online-plain", "online-wide")} & set(tables_of(experiment.config))


def test_the_record_pairs_what_it_compares(record: dict[str, Any]) -> None:
    assert set(record["policies"]) == {"base", *(f"online-{name}" for name in ARMS)}
    for name in COPIED:
        of = record["policies"][name]
        tests, effect = of["tests"], of["tests"]["effect"]
        gap = tests["swapped"]["accuracy"]["value"] - tests["kept"]["accuracy"]["value"]
        assert effect["swapped"]["value"] == pytest.approx(gap, abs=1e-6)
        banned = tests["banned"]["accuracy"]["value"] - of["accuracy"]["value"]
        assert effect["banned"]["value"] == pytest.approx(banned, abs=1e-6)
        assert of["copies"]["violations"] == 0 and of["copies"]["rows"] == 512
        assert len(of["series"]["drift_mean"]) == 2 and set(of["difference"]) == {"base", "online-plain"}
    assert record["policies"]["online-frozen"]["copies_rate"] == 0
    assert "copies" not in record["policies"]["online-wide"]
    names = [gate["name"] for gate in record["headline"]]
    assert len(names) == 4 and all(gate["met"] for gate in record["headline"] if "outside" in gate["name"])


def test_a_violation_is_told_first(record: dict[str, Any]) -> None:
    arms = {name.removeprefix("online-"): of for name, of in record["policies"].items() if name != "base"}
    said = list(findings(arms, "plain"))
    assert not any("outside the thinking block" in line for line in said)
    broken = json.loads(json.dumps(arms))
    broken["frozen"]["copies"]["violations"] = 3
    assert "mean nothing" in next(iter(findings(broken, "plain")))
    assert not next(row for row in headline({"online-frozen": broken["frozen"]}) if "outside" in row["name"])["met"]
    carried = json.loads(json.dumps(arms))
    carried["frozen"]["tests"]["effect"]["swapped"] = {"value": -0.2, "low": -0.3, "high": -0.1}
    assert any(
        "carry something that their sources do not" in line and "frozen" in line for line in findings(carried, "plain")
    )
    unfrozen = {name: of for name, of in arms.items() if name != "frozen"}
    assert any("no arm whose copies are frozen" in line for line in findings(unfrozen, "plain"))


def test_the_report_marks_copies_and_says_what_is_not_shown(experiment: World) -> None:
    report.run(experiment.context("report", "report"))
    page = (experiment.layout.home / "report.html").read_text()
    for text in ("What a reasoning vocabulary was worth", "What became of the copies", "Thoughts whose copies are marked",
                 "copies at 0.00 × the rate", "put back", "<mark>"):  # fmt: skip
        assert text in page, text
    thoughts = page[page.index("Thoughts whose copies are marked") :]
    assert thoughts.count("<mark>") == thoughts.count("</mark>") > 10
    cells = re.findall(r'text-align:left">(.*?)</td>', thoughts, re.S)
    assert any(
        re.sub(r"<mark>.*?</mark>", "", cell, flags=re.S).strip() for cell in cells
    )  # what is no copy has no mark
    own, tokenizer = known(experiment, "online-warm"), load_tokenizer(experiment.layout.checkpoint("online-warm"))
    assert stretches([40, own.start + 41, own.start + 42, 43], own, tokenizer) == [
        {"is_copy": False, "text": tokenizer.decode([40])}, {"is_copy": True, "text": tokenizer.decode([41, 42])},
        {"is_copy": False, "text": tokenizer.decode([43])},
    ]  # fmt: skip


def test_the_plan_holds_what_arms_start_from(experiment: World) -> None:
    graph = experiment.context("report", "report").graph
    built = {str(ref) for ref in graph.closure(goals_of(experiment.config))}
    assert {"expand expanded-copies", "warm_up warmed-dialect", "warm_up warmed-control", "grades train"} <= built
    assert "expand expanded-few" not in built  # no arm starts from it
    assert graph.reads(Ref("train_online", "online-warm"))["base"].name == "warmed-dialect"
    assert starts(experiment.config)["warmed-control"].has_copies is False
    params = graph.params(Ref("expand", "expanded-units"))
    assert {"expand.models.units", "expand.models.few"} <= set(params) and "expand.models.copies" not in params


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"train_online": {"arms": {"a": {"start": "expanded-copy"}}}},
            "no checkpoint 'expanded-copy'.*expanded-copies",
        ),
        ({"train_online": {"arms": {"a": {"copies_rate": 0}}}}, "copies_rate is 0, but base has no copies"),
        (
            {"train_online": {"arms": {"a": {"start": "expanded-copies"}}, "engine": "colocate"}},
            "keep to the thinking block",
        ),
        ({"warm_up": {"models": {"a": {"model": "units"}}}}, "warm_up.models.a.model is 'units', which is no model"),
        ({"expand": {"models": {"u": {"adds": "units", "as_many_as": "cops"}, "copies": {}}}}, "did you mean|copies"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_runs(change: dict[str, Any], words: str) -> None:
    config = {**SETTINGS, "warm_up": {}, "train_online": {"engine": "hf"}, **change}
    with pytest.raises(UserError, match=words):
        resolved = Config.model_validate(config)
        check_models(resolved)
        check_arms(resolved)


def test_a_base_that_is_never_right_cannot_be_warmed_up(experiment: World, tmp_path: Path) -> None:
    other = World(experiment.config, Layout(tmp_path, "tiny"))
    tiny_checkpoint(other.layout.checkpoint("base"), joint=False)
    for split, prompts in (("train", 12), ("validation", 4), ("test", 6)):
        tiny_tables(other.layout, split, prompts=prompts, samples=2, unfinished=1.0 if split == "train" else 0.05)
    with pytest.raises(UserError, match=r"no response with a thought and a score of 0\.5 or more"):
        warm_up.run(other.context("warm_up", "warmed-control"))
