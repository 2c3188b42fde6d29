"""The section on adaptive sampling: it says what the record says, leaves out what is missing, and hides no failure."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ziprc.evaluation.bootstrap import Resampling
from ziprc.evaluation.calibration import calibration_metrics, reliability_curve
from ziprc.evaluation.samplers.frontier import Comparison, Family, Outcome
from ziprc.pages.figures import best_rivals, frontier, frontier_figure, in_order
from ziprc.pages.html import fill
from ziprc.pages.samplers import findings, section
from ziprc.pages.summary import summary
from ziprc.store.files import read_json, write_json
from ziprc.store.manifest import write_manifest

PROMPTS, ONE = 200, 40.0
BUDGETS = {"2": 2 * ONE, "4": 4 * ONE, "8": 8 * ONE, "16": 16 * ONE}
EVIL = "<img src=x>&$\\alpha"  # neither HTML nor matplotlib's mathematics


def shown(record: dict[str, Any], live: dict[str, Any] | None = None, judged: bool = True) -> str:
    """The section as HTML."""
    found = section(record, live or {}, judged)
    return fill(found.template, **found.data)


def family(name: str, at: dict[float, float]) -> Family:
    """A family with a setting for each cost (in samples), right on the first `share` of the prompts."""
    where = np.arange(PROMPTS)
    outcomes = [
        Outcome(
            f"{name}@{k:g}", (where < share * PROMPTS).astype(float), np.full(PROMPTS, k * ONE), np.full(PROMPTS, ONE),
            np.full(PROMPTS, k), where, np.linspace(0, 1, PROMPTS), (where < share * PROMPTS).astype(float),
        )
        for k, share in at.items()
    ]  # fmt: skip
    return Family(name, [], outcomes, len(outcomes))


FAMILIES = {
    "zip-rc-plus": {1: 0.5, 2: 0.7, 4: 0.8, 8: 0.85},
    "zip-rc": {1: 0.5, 2: 0.6, 3: 0.65},
    "majority": {1: 0.5, 8: 0.64},
    "sequential-logprob": {1: 0.5, 2: 0.65, 4: 0.8, 8: 0.9},
    EVIL: {5: 0.55, 8: 0.6},  # too expensive for two samples' worth
}


def compact_record() -> dict[str, Any]:
    """What sampling_record would write about the families above."""
    boot = Resampling(np.arange(PROMPTS), 60, 0)
    families = {name: family(name, at) for name, at in FAMILIES.items()}
    plus, *others = families.values()
    field = Comparison(boot, BUDGETS, np.full(PROMPTS, ONE), 0.1, 0.95)
    probability, score = np.linspace(0, 1, PROMPTS), np.repeat([0.0, 1.0], PROMPTS // 2)
    answer = {k: v.interval() for k, v in calibration_metrics(boot, probability, score, 10).items()}
    cell = {"accuracy": 0.5, "tokens": 80.0, "samples": 2.0}
    zero, helps = {"value": 0.0, "low": -0.01, "high": 0.01}, {"value": -0.05, "low": -0.07, "high": -0.03}

    return {
        "budgets": BUDGETS,
        "prompts": {"validation": 100, "test": PROMPTS, "rollouts": 24, "orders": 2},
        "families": {name: field.record(f) for name, f in families.items()},
        "difference": field.difference(plus, others),
        "ablations": {
            "zip-rc-plus: no pause": field.record(plus) | {"difference": dict.fromkeys(BUDGETS, zero)},
            "zip-rc-plus: no vote": field.record(plus) | {"difference": dict.fromkeys(BUDGETS, helps)},
        },
        "oracle": {"1": 0.5, "2": 0.6, "4": 0.75},
        "cells": {
            "<b>hard</b>": {"prompts": 20, "2": {"zip-rc-plus": cell, "majority": cell}, "4": {"majority": cell}}
        },
        "answer": {"2": answer | {"reliability": reliability_curve(boot, probability, score, 10, 0.95)}, "4": None},
        "headline": [
            {"name": "budgets above", "target": 4, "direction": "at least", "result": 2, "met": False},
            {"name": "share of tokens", "target": 1 / 3, "direction": "at most", "result": None, "met": None},
            {"name": "gain", "target": 0.05, "direction": "at least", "result": 0.0625, "met": True},
        ],
        "chosen": {},
    }


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """As the report reads it: from a file, whose keys are sorted as text."""
    path = tmp_path_factory.mktemp("record") / "frontier.json"
    write_json(path, compact_record())
    return read_json(path)


@pytest.fixture(scope="module")
def page(record: dict[str, Any]) -> str:
    return shown(record)


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_sentences_say_what_the_record_says(page: str) -> None:
    assert "At 2 samples&#39; worth of tokens (80 per prompt) zip-rc-plus answers 70.0 % [" in page
    assert "majority 52.0 %" in page
    assert "the best of 2 competitors (sequential-logprob) 65.0 %; paired difference +5.0 points [+" in page


def test_families_are_ordered_by_their_accuracy_at_four_samples_and_the_expensive_one_has_no_point(page: str) -> None:
    grid = page.partition("Every family at every budget")[2].partition("</table>")[0]
    rows = [re.sub("<.*?>", " ", row).split() for row in re.findall("<tr><td>(.*?)</tr>", grid)]
    assert [row[0] for row in rows[:4]] == ["zip-rc-plus", "sequential-logprob", "zip-rc", "majority"]
    assert rows[-1][-4:] == ["–", "–", "60.0", "60.0"]
    assert rows[2][1:] == ["60.0", "65.0", "65.0", "65.0"]  # nothing more to spend on


def test_nothing_right_is_a_number_and_no_missing_one(record: dict[str, Any]) -> None:
    none = copy.deepcopy(record)
    for of in none["families"].values():
        for point in of["points"].values():
            point["accuracy"]["value"] = 0.0
    found = section(none, {}, True).data
    assert found["best"] == [0.0] * len(BUDGETS), "the best of them, though it is 0"
    beyond = [name for name, row in found["accuracies"].items() if row[1] is None]
    assert beyond and list(found["accuracies"])[-len(beyond) :] == beyond, "what has no number comes behind what has 0"


def test_differences_below_zero_are_red_and_undecided_ones_grey(page: str) -> None:
    grid = page.partition("zip-rc-plus minus each family")[2].partition("</table>")[0]
    row = next(row for row in re.findall("<tr><td>(.*?)</tr>", grid) if row.startswith("sequential-logprob"))
    two, four, eight, _ = row.split("</td><td>")[1:]
    assert two.startswith("+5.0<small>")
    assert four.startswith('<span class="tied">+0.0')
    assert eight.startswith('<span class="lost">-5.0')


def test_an_idea_that_helps_is_plain_and_has_its_sentence(page: str) -> None:
    grid = page.partition("What each idea adds")[2].partition("</table>")[0]
    assert "dropped for good instead of waiting" in grid
    assert "<td>-5.0<small>-7.0 … -3.0</small></td>" in grid
    assert '<span class="tied">+0.0' in grid


def test_counts_have_no_decimals_and_verdicts_are_on_the_cards(page: str) -> None:
    assert '<div class="big">2</div>' in page and "at least 4 · missed" in page
    assert "at most 0.333 · undecided" in page and '<div class="big">0.062</div>' in page


def test_the_probability_of_the_answer_is_shown_where_it_is_known(page: str) -> None:
    part = page.partition("Is the probability of the answer honest?")[2]
    assert 'id="reliability-2-samples-' in part and "<th>2 samples</th></tr>" in part


def test_budgets_rise_from_left_to_right_though_files_sort_them_as_text(page: str, record: dict[str, Any]) -> None:
    assert list(record["budgets"]) == ["16", "2", "4", "8"]
    assert "<th>2 (80)</th><th>4 (160)</th><th>8 (320)</th><th>16 (640)</th>" in page
    assert list(best_rivals(in_order(record))) == ["2", "4", "8", "16"]
    assert frontier(record) == frontier(in_order(record))


# --- what did not work ------------------------------------------------------------------------------------------------


def test_findings_name_missed_targets_unbeaten_competitors_and_idle_ideas(record: dict[str, Any]) -> None:
    found = findings(record, judged=True)
    assert "Sampling, budgets above: 2, wanted at least 4." in found
    assert any(line.startswith("Sampling, share of tokens: cannot be said") for line in found)
    assert "With tokens for 8, 16 samples, better than zip-rc-plus: sequential-logprob." in found
    assert "With tokens for 4 samples, not to be told from zip-rc-plus: sequential-logprob." in found
    assert "zip-rc-plus: taking away pausing changes nothing that can be told at any budget." in found
    assert not any("the vote" in line or "gain" in line for line in found)


def test_findings_say_where_one_waits_longer_or_an_idea_harms(record: dict[str, Any]) -> None:
    worse = copy.deepcopy(record)
    worse["families"]["zip-rc-plus"]["points"]["4"]["latency"] = 99.0
    worse["ablations"]["zip-rc-plus: no vote"]["difference"]["2"] = {"value": 0.05, "low": 0.01, "high": 0.09}
    found = findings(worse, judged=True)
    assert (
        "zip-rc-plus makes one wait longer than majority: 99 serial steps against 40 with tokens for 4 samples."
        in found
    )
    assert "zip-rc-plus: taking away the vote makes it better with tokens for 2 samples." in found


def test_without_targets_the_numbers_stand_without_a_verdict(page: str, record: dict[str, Any]) -> None:
    free = shown(record, judged=False)
    assert re.findall('class="big">.*?<', free) == re.findall('class="big">.*?<', page) != []
    assert not re.search("missed|reached|undecided|at least 4", free) and "more is better" in free
    assert findings(record, judged=False) == [
        line for line in findings(record, judged=True) if not line.startswith("Sampling, ")
    ]


# --- what it may not do -----------------------------------------------------------------------------------------------


def test_names_are_escaped_in_tables_and_in_the_figure(page: str, record: dict[str, Any]) -> None:
    assert "<img" not in page and "<b>hard" not in page
    assert "&lt;b&gt;hard&lt;/b&gt;" in page and "&lt;img src=x&gt;&amp;$" in page
    assert "&lt;img src=x&gt;&amp;$\\alpha" in frontier(record)


def test_nothing_is_fetched_nothing_is_nan_and_ids_are_unique(page: str) -> None:
    assert "http" not in page and "<script" not in page
    assert not re.search(r"\b(nan|None|inf)\b", re.sub(r"<[^>]*>", " ", page), re.I)
    ids = re.findall(r'\sid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 0
    assert not any(" " in name for name in ids)


def test_equal_records_give_equal_bytes(page: str, record: dict[str, Any]) -> None:
    assert shown(copy.deepcopy(record)) == page


@pytest.mark.parametrize(
    "part", ["prompts", "difference", "ablations", "oracle", "cells", "answer", "headline", "chosen"]
)
def test_a_missing_part_leaves_out_its_part_of_the_page(record: dict[str, Any], part: str) -> None:
    less = {key: value for key, value in record.items() if key != part}
    assert "Every family at every budget" in shown(less)
    findings(less, judged=True)


def test_undefined_numbers_and_other_budgets_are_shown_as_they_are(record: dict[str, Any]) -> None:
    other = copy.deepcopy(record)
    unknown = {"value": None, "low": None, "high": None}
    other["families"]["majority"]["points"]["4"]["accuracy"] = unknown
    other["difference"]["4"]["majority"] = unknown
    other["oracle"]["2"] = None
    assert "None" not in re.sub(r"<[^>]*>", " ", shown(other))
    one = {"budgets": {"1.5": 60.0}, "families": {"majority": {"points": {}}}}
    assert "At 1.5" not in shown(one)
    assert "zip-rc-plus" not in " ".join(findings(one, judged=True))


# --- live runs --------------------------------------------------------------------------------------------------------


def test_live_runs_are_a_table_with_what_failed_and_what_was_timed(record: dict[str, Any], page: str) -> None:
    assert "Live on the engine" not in page
    full = {
        "accuracy": {"value": 0.74, "low": 0.7, "high": 0.78}, "tokens": 81.0, "prefill": 12.5, "latency": 60.0,
        "samples": 2.5, "prompts": 1000, "failed": 0, "ungraded": 0, "actions": {"start": 2.5, "<pause>": 1},
        "together": {"total_s": 50.0, "deciding_s": 1.0}, "one_by_one": {"total_s": 9.5}, "alone": 16,
    }  # fmt: skip
    untimed = {key: value for key, value in full.items() if key not in ("together", "one_by_one")}
    runs = {"zip-rc-plus": {"2": full}, "majority": {"2": untimed | {"failed": 3, "ungraded": 2}}}
    table = shown(record, runs).partition("Live on the engine")[2]
    assert "<td>50.0 s<small>1,000 prompts</small></td><td>9.5 s<small>16 prompts</small></td><td>2.0</td>" in table
    assert "start 2.50<br>&lt;pause&gt; 1" in table
    assert "3 failed" in table and "2 not graded, left out" in table and "<td>–</td><td>–</td><td>–</td>" in table
    assert table.count("<tr>") == 3  # a head and two runs


# --- figure and summary -----------------------------------------------------------------------------------------------


def test_the_best_competitor_is_chosen_at_each_budget_and_is_none_of_ours(record: dict[str, Any]) -> None:
    assert best_rivals(record) == dict.fromkeys(BUDGETS, "sequential-logprob")


def test_the_figure_names_its_axes_and_lines(record: dict[str, Any]) -> None:
    text = frontier(record)
    for wanted in (
        "zip-rc-plus",
        "majority",
        "oracle: best of k",
        "best competitor",
        "prompts answered right, %",
        "tokens",
    ):
        assert wanted in text


def test_the_figure_for_the_readme_is_a_png(record: dict[str, Any], tmp_path: Path) -> None:
    frontier_figure(tmp_path / "frontier.png", record)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_the_summary_has_the_targets_of_sampling_where_a_run_has_them(record: dict[str, Any], tmp_path: Path) -> None:
    head = {"name": "AUROC", "target": 0.8, "direction": "at least", "met": True, "result": {"value": 0.9, "low": None}}
    for name in ("a", "b"):
        write_json(tmp_path / name / "metrics/zip-rc.json", {"headline": [head]})
        write_manifest(tmp_path / name / "metrics/zip-rc.json", {"evaluate": {"targets": True}}, {})
    write_json(tmp_path / "b" / "frontier.json", record)
    lines = summary([tmp_path / "a", tmp_path / "b"]).splitlines()
    assert lines[2] == "| AUROC | ≥ 0.8 | 0.900 | 0.900 | yes, yes |"
    assert lines[3:] == [
        "| budgets above | ≥ 4 | – | 2 | –, no |",
        "| share of tokens | ≤ 0.333 | – | – | –, cannot be said |",
        "| gain | ≥ 0.05 | – | 0.062 | –, yes |",
    ]


def test_the_summary_judges_only_runs_that_are_judged(record: dict[str, Any], tmp_path: Path) -> None:
    for name, judged in (("toy", True), ("big", False)):
        write_json(tmp_path / name / "metrics/zip-rc.json", {"headline": record["headline"]})
        write_manifest(tmp_path / name / "metrics/zip-rc.json", {"evaluate": {"targets": judged}}, {})
    both = summary([tmp_path / "toy", tmp_path / "big"]).splitlines()
    assert both[0] == "|  | target | toy | big | met |" and both[2] == "| budgets above | ≥ 4 | 2 | 2 | no, – |"
    alone = summary([tmp_path / "big"]).splitlines()
    assert alone[0] == "|  | big |" and alone[2] == "| budgets above | 2 |"
