"""The record of metrics/icl-v.json: what the critic expects of a held-out rollout, by how many siblings it has read.

    counts      prompts, rollouts, packs, and what was left out
    curve       {predictor: {moment: {siblings: {auroc, within_prompt_auroc, brier, log_loss, ece}}}}
    difference  {rival: {moment: {siblings: {…}}}}     critic minus rival on the same rollouts and siblings, paired
    joint_nll   {siblings: nats a state}               of the joint, mean over states, then over rollouts
    choosing    {how: accuracy}                        one answer a prompt, of the valued rollouts
    policies, labels · guided                          see students.py · guidance.py
    headline    [{name, target, direction, result, met}]

The first k − 1 rollouts of a test prompt are siblings; all the others are valued, each after none, some and all of these.
Rivals get the same siblings: `mean`, `lookup` and `trie` (siblings.py), `alone` (the critic itself without siblings), and
`permuted` (the critic, where the scores of all k − 1 siblings are shuffled among them; what it knows then comes from how
many were right, and which answers are frequent). At the end the state after the last token is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ziprc.config.load import Config
from ziprc.config.shared import Evaluate
from ziprc.errors import UserError
from ziprc.evaluation import accuracy, calibration
from ziprc.evaluation.bootstrap import Estimate, Resampling, quotient, target_record
from ziprc.evaluation.critic.guidance import guided_record
from ziprc.evaluation.critic.siblings import Prior, answer_lookup, sibling_mean, trie_values
from ziprc.evaluation.critic.students import students_record
from ziprc.evaluation.outcomes import MOMENTS
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.readout import slice_weight
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.progress import progress
from ziprc.reading.leaves import trunk_and_branches
from ziprc.reading.states import JointReader
from ziprc.store.digests import derived_seed
from ziprc.tables.grades import GRADES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.data import within
from ziprc.training.objectives.joint import JointLabels, state_losses
from ziprc.training.packs import (
    Graded,
    PackData,
    by_prompt_of,
    graded_rollouts,
    pack_data,
    pack_kind,
    packs_to_judge,
    require_kind,
)

SHARES = np.array(list(MOMENTS.values()))
COMPARED = ("auroc", "within_prompt_auroc", "brier", "log_loss")
LEAST = 1e-4  # probabilities in a log-loss are at least this
Said = dict[str, NDArray[np.float64]]  # by predictor [n, M]


@torch.inference_mode()
def read_last(
    reader: JointReader, data: PackData, budget: int, name: str
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
    """Of the last rollout of every pack, m tokens long: (pack, cells [m + 1, R·L], loss [m + 1] in nats).

    Packs that begin alike are read at once: what they have read of siblings goes through the model a single time.
    """
    weight, device = slice_weight(reader.model, reader.joint).float(), reader.model.device
    last = data.segments[1:] - 1
    before, lengths = data.first[last] + 1 - data.offsets[:-1], data.lengths[last]

    def ids(start: int, count: int) -> torch.Tensor:
        return torch.from_numpy(data.tokens[start : start + count].astype(np.int64)).to(device)

    with progress(len(data), name, "packs") as bar:
        for packs in sharing(data, before, lengths, budget):
            longest = packs[int(np.argmax(before[packs]))]
            trunk = ids(data.offsets[longest], before[longest])
            branches = [(int(before[i]), ids(data.offsets[i] + before[i], lengths[i])) for i in packs]
            logits = torch.cat(trunk_and_branches(reader.model, trunk, branches)).float() @ weight.T
            counts = lengths[packs] + 1
            remaining = np.repeat(lengths[packs], counts) - within(counts)
            reward, censored = (np.repeat(of[last[packs]], counts) for of in (data.reward_bin, data.censored))
            said = (reward, data.grid.length_bin(remaining), censored)
            labels = JointLabels(*(torch.from_numpy(of).to(device) for of in said))
            loss = state_losses(logits.unflatten(-1, (data.grid.R, data.grid.L)), labels).cpu().numpy()
            cells, ends = logits.softmax(-1).cpu().numpy(), np.cumsum(counts)[:-1]
            yield from zip(packs, np.split(cells, ends), np.split(loss, ends), strict=True)
            bar.update(len(packs))


def sharing(data: PackData, before: NDArray[np.int64], lengths: NDArray[np.int64], budget: int) -> Iterator[list[int]]:
    """Neighbouring packs of which the first `before` tokens of each begin those of the longest; about `budget` tokens."""
    group: list[int] = []
    trunk, tokens = np.zeros(0, np.int32), 0
    for pack in range(len(data)):
        own = data.tokens[data.offsets[pack] : data.offsets[pack] + before[pack]]
        longer, size = max(trunk, own, key=len), min(len(trunk), len(own))
        more = tokens + int(lengths[pack])
        if group and (len(longer) + more > budget or not np.array_equal(trunk[:size], own[:size])):
            yield group
            group, longer, more = [], own, int(lengths[pack])
        group, trunk, tokens = [*group, pack], longer, more
    if group:
        yield group


def expected_scores(
    readers: Sequence[JointReader], data: PackData, budget: int, name: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the last rollout of every pack: [N, M] the score that the critics expect on average, [N] nats a state of the joint."""
    values, nats = np.zeros((len(data), len(SHARES))), np.zeros(len(data))
    for reader in readers:
        for pack, cells, loss in read_last(reader, data, budget, name):
            expected = JointDistribution(data.grid, cells).expected_reward()
            values[pack] += expected[np.floor((len(cells) - 1) * SHARES).astype(np.int64)] / len(readers)
            nats[pack] += loss.mean() / len(readers)
    return values, nats


def known_without_a_network(rollouts: Sequence[Graded], packs: Sequence[Sequence[int]], prior: Prior) -> Said:
    """[N, M] each: what `mean`, `lookup` and `trie` expect of the last rollout of every pack, from those before it."""
    found = {name: np.zeros((len(packs), len(SHARES))) for name in ("mean", "lookup", "trie")}
    for number, pack in enumerate(packs):
        target, siblings = rollouts[pack[-1]], [rollouts[i] for i in pack[:-1]]
        found["mean"][number] = found["lookup"][number] = sibling_mean([s.score for s in siblings], prior)
        found["lookup"][number, -1] = answer_lookup(target, siblings, prior)
        at = np.floor(len(target.response) * SHARES).astype(np.int64)
        found["trie"][number] = trie_values(target, siblings, prior)[at]
    return found


def shuffled(rollouts: Sequence[Graded], packs: Sequence[Sequence[int]], rng: np.random.Generator) -> list[list[float]]:
    """Scores to show in the packs: those of all but the last rollout change places, the last keeps its own.

    The same siblings change places in the same way in every pack.
    """
    told: dict[tuple[int, ...], list[float]] = {}
    for *siblings, _ in packs:
        if tuple(siblings) not in told:
            told[tuple(siblings)] = rng.permutation([rollouts[i].score for i in siblings]).tolist()
    return [[*told[tuple(siblings)], rollouts[target].score] for *siblings, target in packs]


def estimates(
    boot: Resampling, prediction: NDArray[np.float64], score: NDArray[np.float64], bins: int
) -> dict[str, Estimate]:
    """All metrics of one prediction [n]."""
    sure = np.clip(prediction, LEAST, 1 - LEAST)
    return {
        "auroc": accuracy.auroc(boot, prediction, score >= accuracy.SUCCESS),
        "within_prompt_auroc": accuracy.within_prompt_auroc(boot, prediction, score >= accuracy.SUCCESS),
        "log_loss": boot.ratio(-(score * np.log(sure) + (1 - score) * np.log(1 - sure))),
        **calibration.calibration_metrics(boot, prediction, score, bins),
    }


def compare(boot: Resampling, said: Mapping[int, Said], truth: NDArray[np.float64], own: Evaluate) -> tuple[Any, Any]:
    """The records `curve` and `difference`, from what every predictor said after each number of siblings."""
    curve: dict[str, Any] = {}
    gaps: dict[str, Any] = {}
    for m, moment in enumerate(MOMENTS):
        alone: dict[str, Estimate] = {}
        for k, by_name in said.items():
            found = {name: estimates(boot, values[:, m], truth, own.ece_bins) for name, values in by_name.items()}
            for name, by_metric in found.items():
                intervals = {metric: estimate.interval(own.confidence) for metric, estimate in by_metric.items()}
                curve.setdefault(name, {}).setdefault(moment, {})[str(k)] = intervals
            main = found.pop("critic")
            for name, rival in (found | ({"alone": alone} if k else {})).items():
                between = {metric: (main[metric] - rival[metric]).interval(own.confidence) for metric in COMPARED}
                gaps.setdefault(name, {}).setdefault(moment, {})[str(k)] = between
            alone = alone or main
    return curve, gaps


def chosen(
    boot: Resampling, said: Mapping[int, Said], targets: Sequence[Graded], confidence: float
) -> dict[str, Mapping[str, float | None]]:
    """Accuracy when one of the valued rollouts of a prompt is answered with: any, the commonest answer, the highest value.

    `critic/0` has read no sibling, so it could choose at test time; with siblings their true scores help it (an oracle).
    """
    score, prompts = np.array([target.score for target in targets]), boot.prompts
    samples = np.bincount(boot.group, minlength=prompts)
    found = {
        "mean": np.bincount(boot.group, score, prompts) / samples,
        "majority": accuracy.majority_scores(boot.group, [target.answer or None for target in targets], score),
        "oracle": (np.bincount(boot.group, score >= accuracy.SUCCESS, prompts) > 0).astype(float),
    }
    for k in (min(said), max(said)):
        value = said[k]["critic"][:, -1]
        order = np.lexsort((-value, boot.group))
        found[f"critic/{k}"] = score[order[np.searchsorted(boot.group[order], np.arange(prompts))]]
    return {
        name: quotient(*boot.prompt_totals(of, np.ones(prompts))).interval(confidence) for name, of in found.items()
    }


def open_critics(config: Config, reads: Mapping[str, Path]) -> tuple[list[JointReader], PreTrainedTokenizerBase]:
    """The critics, which have to be of the packs that this configuration makes, and their tokenizer."""
    folders = [reads[name] for name in sorted(reads) if name.startswith("critic")]
    tokenizer = load_tokenizer(folders[0])
    for folder in folders:
        require_kind(folder, pack_kind(config.train_critic, tokenizer))
    return [JointReader.open(folder) for folder in folders], tokenizer


def metrics(config: Config, reads: Mapping[str, Path]) -> dict[str, Any]:
    """The whole of metrics/icl-v.json, from tables and checkpoints by role."""
    own, critic, seed = config.evaluate, config.train_critic, derived_seed(config.seed, "evaluate", "icl-v")
    size, budget = critic.pack_rollouts, config.runtime.forward_tokens
    (trained, _), (rollouts, ungraded) = (
        graded_rollouts(ROLLOUTS.read(reads[f"rollouts/{split}"]), GRADES.read(grades), str(grades))
        for split in ("train", "test") for grades in [reads[f"grades/{split}"]]
    )  # fmt: skip
    shown = sorted({k for k in (0, 1, 3, 7, 15, 31, size - 1) if k < size})
    asked = set(list(by_prompt_of(rollouts))[: critic.judged_prompts])
    rollouts = [r for r in rollouts if r.prompt_id in asked]
    packs, fewer = packs_to_judge(rollouts, size, shown)
    if not packs:
        raise UserError(
            f"{reads['rollouts/test']}: no prompt has {size} graded rollouts, as many as a pack of the critic. Raise "
            "rollouts.test_samples or lower train_critic.pack_rollouts."
        )
    readers, tokenizer = open_critics(config, reads)
    data = pack_data(rollouts, packs, tokenizer, critic, readers[0].joint.grid)
    if data.left_out:
        raise UserError(
            f"{data.left_out} rollouts do not fit into train_critic.max_length={critic.max_length}. Raise it."
        )
    scores, nats = expected_scores(readers, data, budget, "critic")
    rng, whole = np.random.default_rng(seed), [pack for pack in packs if len(pack) == size]
    control = pack_data(rollouts, whole, tokenizer, critic, data.grid, shuffled(rollouts, whole, rng))

    prior = Prior.fitted([r.prompt_id for r in trained], [r.score >= accuracy.SUCCESS for r in trained])
    predictors = {"critic": scores, **known_without_a_network(rollouts, packs, prior)}
    siblings = np.array([len(pack) - 1 for pack in packs])
    said = {k: {name: values[siblings == k] for name, values in predictors.items()} for k in shown}
    said[size - 1]["permuted"], _ = expected_scores(readers, control, budget, "critic, scores permuted")
    targets = [rollouts[pack[-1]] for pack in whole]
    group = np.unique([target.prompt_id for target in targets], return_inverse=True)[1]
    boot = Resampling(group, own.bootstrap, seed)
    curve, gaps = compare(boot, said, np.array([target.score for target in targets]), own)
    record = {
        "confidence": own.confidence, "replicates": own.bootstrap, "pack_rollouts": size, "feedback": critic.feedback,
        "prior": {"mean": prior.mean, "strength": prior.strength}, "curve": curve, "difference": gaps,
        "choosing": chosen(boot, said, targets, own.confidence),
        "joint_nll": {str(k): float(nats[siblings == k].mean()) for k in shown},
        "counts": {
            "prompts": {"test": boot.prompts, "with_fewer_rollouts": fewer},
            "rollouts": {"test": len(targets), "ungraded": ungraded}, "packs": len(data), "critics": len(readers),
        },
    }  # fmt: skip
    return record | students_record(config, reads) | guided_record(config, reads) | {"headline": headline(record)}


def headline(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The gates of the `toy` scale: with all siblings read, against what needs no network."""
    last, curve, gaps = str(found["pack_rollouts"] - 1), found["curve"], found["difference"]
    within = "within_prompt_auroc"
    return [
        target_record(
            "Brier score at the start, minus that of the sibling mean", 0.0, gaps["mean"]["start"][last]["brier"], False
        ),
        target_record("AUROC within a prompt at the end", 0.95, curve["critic"]["end"][last][within]),
        target_record("AUROC within a prompt at the end, minus the trie's", 0.0, gaps["trie"]["end"][last][within]),
        target_record("AUROC within a prompt at 75 %, minus the trie's", 0.0, gaps["trie"]["75%"][last][within]),
        target_record(
            "AUROC within a prompt at the end, minus with scores permuted", 0.1, gaps["permuted"]["end"][last][within]
        ),
    ]
