"""What reading and banning the joint head costs on CPU vLLM: paired runs, plain sampling against read + mask.

Both engines live in one process and take turns in random order on the same requests; the number is the median over
pairs of CPU time (this process, so that other jobs on the machine disturb it less) and of wall time, with the spread.
`mask` bans the rows without reading. Run: OMP_NUM_THREADS=1 python tests/benchmarks/slice_readout.py [--pairs 15]
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from ziprc.config.base import Sampling
from ziprc.engines import start
from ziprc.engines.base import Engine, EngineSettings, Request
from ziprc.joint.bins import BinGrid
from ziprc.joint.head import JointHead
from ziprc.joint.vocabulary import VocabLayout

TEXT, CELLS, VOCAB = 320, 56, 384  # the default architecture: 7 reward centres × 8 lengths


def random_base(folder: Path) -> None:
    """The default small Qwen3 of `base.architecture`."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=VOCAB, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def timed(engine: Engine, requests: list[Request]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    engine.generate(requests)
    return time.process_time() - cpu, time.perf_counter() - wall


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--responses", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    grid = BinGrid(tuple(i / 6 for i in range(7)), tuple(range(0, 72, 8)))
    head = JointHead(VocabLayout(VOCAB, TEXT, TEXT, CELLS), grid)
    rng = np.random.default_rng(0)
    requests = [
        Request(str(i), tuple(rng.integers(0, TEXT, 26).tolist()), i, options.tokens) for i in range(options.responses)
    ]
    with tempfile.TemporaryDirectory() as folder:
        random_base(Path(folder))
        plain = EngineSettings(Path(folder), Sampling(), (), (), max_model_len=512)
        variants = {
            "plain": plain,
            "mask": replace(plain, banned=((TEXT, VOCAB),)),
            "read+mask": replace(plain, banned=((TEXT, VOCAB),), joint=head),
        }
        engines = {name: start("vllm", settings) for name, settings in variants.items()}
        for engine in engines.values():
            timed(engine, requests)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        shuffle = random.Random(0)
        for _ in range(options.pairs):
            for name in shuffle.sample(sorted(engines), len(engines)):
                seconds[name].append(timed(engines[name], requests))
    total = options.responses * options.tokens
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{total} tokens a run, {options.pairs} pairs, {threads} thread(s), load {load:.1f}")
    base = np.array(seconds["plain"])
    for name, runs in seconds.items():
        ratios = np.array(runs) / base
        low, middle, high = np.percentile(ratios, [25, 50, 75], axis=0)
        rate = total / np.median(np.array(runs)[:, 1])
        print(
            f"{name:10} {rate:8.0f} tok/s   CPU time ratio {middle[0]:.3f} [{low[0]:.3f}, {high[0]:.3f}]   "
            f"wall ratio {middle[1]:.3f} [{low[1]:.3f}, {high[1]:.3f}]"
        )


if __name__ == "__main__":
    main()
