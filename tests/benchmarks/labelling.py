"""Labelling every candidate: two passes over rotated packs against the loop over tokens, on the same rollouts; CPU time.

The loop is the published form: the siblings' keys and values are kept, at every state the candidates go through as a batch
against them, then the token taken goes on; one rollout at a time. Both are given the same packs and candidates, and the largest
difference of a value is printed with the ratio. Run, where the experiment's critic and rollouts exist:

    OMP_NUM_THREADS=1 python -m tests.benchmarks.labelling toy-icl-v --critic critic-fold0 --prompts 8
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from ziprc.config.load import load
from ziprc.evaluation.critic.labels import critic_labels
from ziprc.joint.distribution import JointDistribution
from ziprc.joint.readout import TokenPair, slice_weight
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.joint.vocabulary import derive_layout
from ziprc.reading.logits import Candidates, candidates
from ziprc.reading.states import JointReader, load_for_reading
from ziprc.store.layout import Layout
from ziprc.tables.grades import GRADES
from ziprc.tables.rollouts import ROLLOUTS
from ziprc.training.packs import Graded, by_prompt_of, graded_rollouts, pack_data, rotated_packs


@torch.inference_mode()
def loop(reader: JointReader, prefix: np.ndarray, rollout: Graded, of: Candidates) -> tuple[np.ndarray, int]:
    """Values [n] of the candidates, and the forward passes that they took."""
    body, weight = reader.model.base_model, slice_weight(reader.model, reader.joint).float()
    cache = DynamicCache(config=reader.model.config)
    body(torch.from_numpy(prefix.astype(np.int64))[None], past_key_values=cache, use_cache=True)
    joints, passes = [], 1
    for t, token in enumerate(rollout.response.tolist()):
        ids = torch.from_numpy(of.ids[of.offsets[t] : of.offsets[t + 1]])[:, None]
        cache.batch_repeat_interleave(len(ids))
        states = body(ids, past_key_values=cache, use_cache=True).last_hidden_state[:, 0]
        joints.append((states.float() @ weight.T).softmax(-1).numpy())
        cache.crop(-1)
        cache.batch_select_indices(torch.tensor([0]))
        body(torch.tensor([[token]]), past_key_values=cache, use_cache=True)
        passes += 2
    return JointDistribution(reader.joint.grid, np.concatenate(joints)).expected_reward(), passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--critic", default="critic-fold0")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    layout, config = Layout(options.results, options.experiment), load(Path("config.yaml"), options.experiment)
    tokenizer, base = load_tokenizer(layout.checkpoint("base")), load_for_reading(layout.checkpoint("base"))
    reader, own = JointReader.open(layout.checkpoint(options.critic)), config.train_critic
    tables = [schema.read(layout.table(schema.name, "train")) for schema in (ROLLOUTS, GRADES)]
    every, _ = graded_rollouts(*tables, "grades")
    rollouts = [every[i] for numbers in list(by_prompt_of(every).values())[: options.prompts] for i in numbers]
    pairs = [TokenPair(r.prompt, r.response) for r in rollouts]
    text = derive_layout(tokenizer, base.get_output_embeddings().weight.shape[0], 0).text_size
    plausible = dict(
        enumerate(candidates(base, text, pairs, config.runtime.forward_tokens, 1024, config.qvalues.min_p))
    )

    start = time.process_time()
    fast = dict(critic_labels(reader, tokenizer, rollouts, plausible, own, 0, config.runtime.forward_tokens))
    two_passes = time.process_time() - start

    packs, last = rotated_packs(rollouts, own.pack_rollouts, 0)
    data = pack_data(rollouts, packs, tokenizer, own, reader.joint.grid)
    start, passes, gap = time.process_time(), 0, 0.0
    for pack, count in enumerate(last):
        for k in range(data.segments[pack + 1] - count, data.segments[pack + 1]):
            i = int(data.members[k])
            q, own_passes = loop(reader, data.tokens[data.offsets[pack] : data.first[k] + 1], rollouts[i], plausible[i])
            passes, gap = passes + own_passes, max(gap, float(np.abs(q - fast[i].q).max()))
    naive = time.process_time() - start

    states = sum(len(r.response) for r in rollouts)
    tried = sum(len(of.ids) for of in plausible.values())
    print(f"{len(rollouts)} rollouts, {states} states, {tried} candidates, {data.offsets[-1]} tokens of packs")
    print(f"two passes: {two_passes:.2f} CPU-s, {tried / two_passes:.0f} candidates/s")
    print(f"loop: {passes} forward passes, {naive:.2f} CPU-s, {tried / naive:.0f} candidates/s")
    print(f"ratio {naive / two_passes:.1f}; largest difference of a value {gap:.1e}")


if __name__ == "__main__":
    main()
