"""The critic in context against what its context says without a network: by hand, and as stages on a tiny experiment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.doubles import World, tiny_checkpoint, tiny_tables
from ziprc.config.load import Config
from ziprc.errors import UserError
from ziprc.evaluation.bootstrap import Resampling
from ziprc.evaluation.critic.record import chosen, expected_scores, known_without_a_network, open_critics, shuffled
from ziprc.evaluation.critic.siblings import UNSEEN, Prior, answer_lookup, sibling_mean, trie_candidates, trie_values
from ziprc.evaluation.critic.students import label_record
from ziprc.evaluation.outcomes import MOMENTS
from ziprc.pages import icl_v
from ziprc.plan.stage import Ref
from ziprc.reading.logits import Candidates
from ziprc.stages import evaluate, report, train_critic
from ziprc.stages.context import Context
from ziprc.store.files import read_json, write_json
from ziprc.store.layout import Layout
from ziprc.systems import graph_of
from ziprc.systems.icl_v import check_packs
from ziprc.tables.grades import GRADES
from ziprc.tables.qvalues import QVALUES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.objectives.joint import JointLabels, slice_cross_entropy, state_losses
from ziprc.training.packs import Graded, graded_rollouts, pack_data
from ziprc.training.trainees import labels_of

PRIOR = Prior(0.25, 2.0)


def rollout(response: list[int], score: float, answer: str = "a") -> Graded:
    return Graded("r", "p", np.array([9], np.int32), np.array(response, np.int32), score, answer, False, True)


def test_the_prior_of_pass_rates_is_found_again_from_counts() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(4000), 8)
    rate = rng.beta(0.3 * 3, 0.7 * 3, 4000)
    found = Prior.fitted(group, rng.random(len(group)) < rate[group])
    assert found.mean == pytest.approx(0.3, abs=0.02) and found.strength == pytest.approx(3, rel=0.1)
    alike = Prior.fitted(group, rng.random(len(group)) < 0.5)
    assert alike.strength > 100, "prompts that do not differ: the prior outweighs any siblings"


def test_mean_and_lookup_by_hand() -> None:
    assert sibling_mean([], PRIOR) == 0.25
    assert sibling_mean([1.0, 1.0], PRIOR) == pytest.approx((2 + 0.5) / 4)
    target = rollout([1], 1.0, "43")
    right, wrong, other = rollout([1], 1.0, "43"), rollout([1], 0.0, "43"), rollout([1], 0.0, "7")
    assert answer_lookup(target, [right, other], PRIOR) == 1.0
    assert answer_lookup(target, [right, wrong, other], PRIOR) == 0.5
    assert answer_lookup(rollout([1], 0.0, "8"), [right, other], PRIOR) == UNSEEN
    assert answer_lookup(rollout([1], 0.0, "8"), [other], PRIOR) == sibling_mean([0.0], PRIOR)
    nothing = rollout([1], 0.0, "")
    assert answer_lookup(nothing, [nothing], PRIOR) == sibling_mean([0.0], PRIOR), "no answer is no answer in common"


def test_the_trie_follows_the_siblings_that_began_alike() -> None:
    siblings = [rollout([1, 2, 3, 4], 1.0), rollout([1, 2, 5], 0.0), rollout([6], 1.0)]
    found = trie_values(rollout([1, 2, 3, 7], 1.0), siblings, PRIOR)
    root = (2 + 0.5) / 5
    first = (1 + 2 * root) / 4  # two siblings begin with 1, one of them is right
    second = (1 + 2 * first) / 4
    third = (1 + 2 * second) / 3
    assert found == pytest.approx([root, first, second, third, third])
    assert trie_values(rollout([1, 2], 0.0), [], PRIOR) == pytest.approx([0.25] * 3)


def test_the_trie_values_every_candidate_by_the_siblings_that_went_on_so() -> None:
    siblings = [rollout([1, 2, 3], 1.0), rollout([1, 5], 0.0), rollout([1, 5, 6], 1.0), rollout([4], 0.0)]
    target = rollout([1, 2, 7], 1.0)
    of = Candidates(np.array([0, 3, 5, 7]), np.array([1, 4, 9, 2, 5, 3, 7]), np.zeros(7, np.float32))
    values = trie_values(target, siblings, PRIOR)
    found = trie_candidates(target, siblings, values, of)

    def node(scores: list[float], parent: float) -> float:
        return (sum(scores) + 2 * parent) / (len(scores) + 2)

    expected = [
        values[1], node([0.0], values[0]), values[0],  # taken; one sibling went on so; none did
        values[2], node([0.0, 1.0], values[1]),
        node([1.0], values[2]), values[3],
    ]  # fmt: skip
    assert found == pytest.approx(expected)


def test_one_answer_is_chosen_for_every_prompt() -> None:
    boot = Resampling([0, 0, 0, 1, 1, 1], 20, 0)
    targets = [rollout([1], score, answer) for score, answer in zip((1, 0, 0, 0, 1, 1), "abbcdd", strict=True)]
    alone, read = (
        {"critic": np.array(values, dtype=float)[:, None]}
        for values in ([0.1, 0.9, 0.2, 0.3, 0.2, 0.1], [0.9, 0.1, 0.2, 0.1, 0.1, 0.8])
    )
    found = {name: of["value"] for name, of in chosen(boot, {0: alone, 3: read}, targets, 0.95).items()}
    assert found == {"mean": 0.5, "majority": 0.5, "oracle": 1.0, "critic/0": 0.0, "critic/3": 1.0}


def test_what_labels_say_of_themselves_by_hand() -> None:
    row = {
        "rollout_id": "r", "source": "trie", "siblings": 3, "offsets": [0, 2, 3], "ids": [1, 2, 3],
        "log_prob": np.log([0.6, 0.2, 0.9]), "q": [0.8, 0.4, 0.1], "cells": [], "values": [0.5, 0.8, 0.1],
    }  # fmt: skip
    found = label_record(QVALUES.make([row]))
    assert (found["states"], found["candidates"], found["choice"], found["siblings"]) == (2, 3, 0.5, 3.0)
    assert found["gap"] == pytest.approx(0.7 - 0.5, abs=1e-6) and found["spread"] == pytest.approx(0.4, abs=1e-6)


def test_the_last_rollout_of_every_pack_is_known_from_those_before_it() -> None:
    rollouts = [rollout([1, i], float(i % 2), str(i)) for i in range(3)]
    found = known_without_a_network(rollouts, [[2], [0, 2], [0, 1, 2]], PRIOR)
    assert set(found) == {"mean", "lookup", "trie"}
    assert all(values.shape == (3, len(MOMENTS)) for values in found.values())
    assert found["mean"][:, 0].tolist() == [sibling_mean(scores, PRIOR) for scores in ([], [0.0], [0.0, 1.0])]
    assert found["lookup"][2].tolist() == [found["mean"][2, 0]] * (len(MOMENTS) - 1) + [UNSEEN]
    assert found["trie"][2, -1] == pytest.approx(trie_values(rollouts[2], rollouts[:2], PRIOR)[-1])


def test_a_state_that_weighs_twice_counts_twice_and_so_does_its_gradient() -> None:
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 3, generator=rng, dtype=torch.float64)
    labels = [torch.tensor([0, 1, 1, 0]), torch.tensor([0, 2, 1, 1]), torch.tensor([False, False, True, False])]
    rows = torch.tensor([0, 1, 1, 1, 2, 3, 3])
    one, other = (logits.clone().requires_grad_() for _ in range(2))
    weighted = slice_cross_entropy(one, JointLabels(*labels, weight=torch.bincount(rows)))
    repeated = slice_cross_entropy(other[rows], JointLabels(*(label[rows] for label in labels)))
    weighted.backward(), repeated.backward()
    torch.testing.assert_close(weighted, repeated)
    torch.testing.assert_close(one.grad, other.grad)


SETTINGS = {
    "systems": ["icl-v"],
    "rollouts": {"thinking_samples": 4},
    "train_critic": {"length_edges": [0, 8, 16, 32, 64], "pack_rollouts": 4, "batch_size": 8, "learning_rate": 1e-3},
    "evaluate": {"bootstrap": 40},
}


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two critics, trained for a moment."""
    world = World(Config.model_validate(SETTINGS), Layout(tmp_path_factory.mktemp("critic"), "tiny"))
    tiny_checkpoint(world.layout.checkpoint("base"), joint=False)
    tiny_tables(world.layout, "train", prompts=12, samples=4)
    tiny_tables(world.layout, "test", prompts=8, samples=5)
    for name in ("critic-fold0", "critic-fold1"):
        train_critic.run(world.context("train_critic", name))
    return world


def test_the_record_has_the_curve_of_the_critic_beside_all_rivals(experiment: World) -> None:
    said = evaluate.run(experiment.context("evaluate", "icl-v"))
    assert "5 headline numbers on 8 held-out prompts" in said
    found = read_json(experiment.layout.home / "metrics/icl-v.json")
    assert found["counts"]["rollouts"] == {"test": 16, "ungraded": 0} and found["counts"]["critics"] == 2
    assert found["counts"]["packs"] == 16 * 3
    for name in ("critic", "mean", "lookup", "trie"):
        assert set(found["curve"][name]) == set(MOMENTS)
        assert all(set(by_k) == {"0", "1", "3"} for by_k in found["curve"][name].values())
    assert {tuple(by_k) for by_k in found["curve"]["permuted"].values()} == {("3",)}
    start = found["curve"]["mean"]["start"]["0"]
    assert start["auroc"]["value"] == 0.5, "without siblings every prompt is alike to the mean"
    within = found["curve"]["mean"]["start"]["3"]["within_prompt_auroc"]["value"]
    assert within == 0.5, "with the same siblings all rollouts of a prompt are alike to it too"
    assert set(found["difference"]["alone"]["end"]) == {"1", "3"}
    lone = [
        found["curve"]["critic"]["end"][k]["brier"]["value"] - found["curve"]["critic"]["end"]["0"]["brier"]["value"]
        for k in ("1", "3")
    ]
    gaps = [found["difference"]["alone"]["end"][k]["brier"]["value"] for k in ("1", "3")]
    assert gaps == pytest.approx(lone, abs=2e-6), "alone is the critic without siblings, whatever it is compared with"
    gap, own, rival = (
        record["end"]["3"]["brier"]["value"]
        for record in (found["difference"]["trie"], found["curve"]["critic"], found["curve"]["trie"])
    )
    assert gap == pytest.approx(own - rival, abs=2e-6)
    assert set(found["joint_nll"]) == {"0", "1", "3"} and all(0 < nats < 10 for nats in found["joint_nll"].values())


def test_what_a_critic_expects_is_read_at_the_states_of_the_last_rollout(experiment: World) -> None:
    config, layout = experiment.config, experiment.layout
    readers, tokenizer = open_critics(config, Context(graph_of(config, layout), Ref("evaluate", "icl-v")).reads)
    rollouts, _ = graded_rollouts(
        *(schema.read(layout.table(schema.name, "test")) for schema in (ROLLOUTS, GRADES)), where="grades"
    )
    packs = [[0, 1, 2, 4], [0, 4], [3], [0, 1, 3], [1, 0, 2], [5, 8]]  # some begin alike
    data = pack_data(rollouts, packs, tokenizer, config.train_critic, readers[0].joint.grid)
    together, _ = expected_scores(readers, data, 10_000, "both")
    _, nats = expected_scores(readers[:1], data, 10_000, "one")
    alone = [expected_scores([reader], data, 200, "one")[0] for reader in readers]
    assert np.abs(alone[0] - alone[1]).max() > 1e-4
    np.testing.assert_allclose(together, np.mean(alone, 0), atol=1e-6)
    for number, reader in enumerate(readers):
        for row, pack in enumerate(packs):
            ids = torch.tensor(data.tokens[data.offsets[row] : data.offsets[row + 1]])[None].long()
            with torch.inference_mode():
                logits = reader.model(ids).logits[0, :, reader.joint.layout.joint_slice]
            right = logits.softmax(-1).unflatten(-1, (2, -1)).sum(-1)[:, 1].numpy()
            m = len(rollouts[pack[-1]].response)
            states = [len(right) - 1 - m + int(m * share) for share in MOMENTS.values()]
            if not number:
                losses = state_losses(
                    logits.unflatten(-1, (2, -1))[-m - 1 :], _last(labels_of(data.batch(np.array([row]))), m)
                )
                assert nats[row] == pytest.approx(losses.mean().item(), rel=1e-5)
            np.testing.assert_allclose(alone[number][row], right[states], atol=1e-5)


def _last(labels: JointLabels, m: int) -> JointLabels:
    """Those of the last m + 1 states."""
    return JointLabels(*(of[-m - 1 :] for of in (labels.reward_bin, labels.length_bin, labels.censored)))


def test_shuffled_scores_stay_among_the_siblings() -> None:
    rollouts = [rollout([1], score) for score in (1.0, 0.0, 0.25, 0.5)]
    found = [shuffled(rollouts, [[0, 1, 2, 3], [0, 1, 2, 0]], np.random.default_rng(seed)) for seed in range(20)]
    for own, other in found:
        assert sorted(own[:-1]) == [0.0, 0.25, 1.0] and own[-1] == 0.5 and other == [*own[:-1], 1.0]
    assert len({tuple(own) for own, _ in found}) > 3


def test_the_page_shows_the_curve_and_what_did_not_work(experiment: World) -> None:
    evaluate.run(experiment.context("evaluate", "icl-v"))
    report.run(experiment.context("report", "report"))
    text = (experiment.layout.home / "report.html").read_text()
    for part in (
        icl_v.QUESTION,
        "critic in context",
        "answer lookup (no network)",
        "at test time nobody knows these scores",
    ):
        assert part in text
    path = experiment.layout.home / "metrics/icl-v.json"
    kept = read_json(path)
    gap = {metric: {"value": 0.1, "low": 0.05, "high": 0.2} for metric in ("brier", "log_loss", "within_prompt_auroc")}
    worse = {name: {moment: {"3": gap} for moment in MOMENTS} for name in ("alone", "mean", "trie")}
    said = list(icl_v.findings(kept | {"difference": worse}, judged=False))
    assert said[1].startswith("The sibling mean (no network) beats the critic in Brier score at start")
    assert not any("trie" in line for line in said), "a higher AUROC is better, a higher Brier score is not"
    missed = list(icl_v.findings(kept | {"difference": worse}, judged=True))
    assert any(line.startswith("AUROC within a prompt at the end: ") for line in missed)
    write_json(path, kept)


def test_too_few_rollouts_are_refused_before_anything_runs(experiment: World) -> None:
    few = Config.model_validate(SETTINGS | {"rollouts": {"thinking_samples": 1}})
    with pytest.raises(UserError, match="give 1 response a training prompt; a critic in context learns from several"):
        check_packs(few)
    with pytest.raises(UserError, match=r"test_samples is 4; .* more than train_critic.pack_rollouts=4"):
        check_packs(Config.model_validate(SETTINGS | {"rollouts": {"thinking_samples": 2, "test_samples": 4}}))
    check_packs(experiment.config)


def test_a_critic_of_other_packs_is_not_read(experiment: World) -> None:
    other = experiment.config.train_critic.model_copy(update={"feedback": "full"})
    config = experiment.config.model_copy(update={"train_critic": other})
    with pytest.raises(UserError, match="trained on packs of another kind: feedback 'answer', here 'full'"):
        evaluate.run(World(config, experiment.layout).context("evaluate", "icl-v"))
