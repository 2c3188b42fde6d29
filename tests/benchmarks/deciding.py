"""What deciding costs on CPU vLLM: the share of a live run's wall-clock that goes into reading signals and choosing.

64 prompts with up to 16 branches each are in flight at once, under zip-rc-plus with 16 branches at a time (its dearest
setting: every sample is read and every one is a candidate) and, for comparison, under majority@16, which decides nothing.
The model is the default small Qwen3 with random weights, so an engine step is as cheap as it ever gets. Policies take turns;
the number is the median over repeats with the quartiles. `tracking` is the bookkeeping of tokens and readings that any live
run has. Run: OMP_NUM_THREADS=1 python tests/benchmarks/deciding.py [--repeats 5]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ziprc.sampling.policies.base import Reader
from ziprc.sampling.policies.fixed import Fixed

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from tests.benchmarks.slice_readout import CELLS, TEXT, VOCAB, random_base
from ziprc.config.base import Sampling
from ziprc.engines import start
from ziprc.engines.base import Engine, EngineSettings
from ziprc.joint.bins import BinGrid
from ziprc.joint.head import JointHead
from ziprc.joint.vocabulary import VocabLayout
from ziprc.sampling.controller import Budget, Controller, Policy
from ziprc.sampling.fitting import Calibration
from ziprc.sampling.live.records import Question, Timing
from ziprc.sampling.live.runner import Runner
from ziprc.sampling.policies.zip_rc_plus import ZipRCPlus
from ziprc.sampling.score import INPUTS, Logistic, Stages
from ziprc.sampling.selection import VoteModel

BRANCHES, PROMPT_TOKENS, STAGES = 16, 26, 8
GRID = BinGrid(tuple(i / 6 for i in range(7)), tuple(range(0, 72, 8)))
STOPS = tuple(range(12, TEXT, 64))  # one token in sixty-four: responses end at all lengths
assert GRID.size == CELLS


def logistic(rng: np.random.Generator) -> Logistic:
    """As large as a fitted one."""
    count = len(INPUTS)
    weight = rng.normal(0, 0.05, count + count * (count + 1) // 2)
    return Logistic((0.0,) * count, (1.0,) * count, tuple(weight.tolist()), 0.0)


def policies() -> dict[str, Policy]:
    rng = np.random.default_rng(0)
    own = Calibration(Stages(tuple(logistic(rng) for _ in range(STAGES))), logistic(rng), VoteModel(), 2.0)
    return {
        "zip-rc-plus": ZipRCPlus(own, GRID, price=1e-9, width=BRANCHES),
        "majority@16": Fixed(Reader(GRID), k=BRANCHES),
    }


def answer_of(prompt: int, token_ids: Sequence[int]) -> int:
    return token_ids[-2] % 4 if len(token_ids) > 1 else 0


def timed(engine: Engine, policy: Policy, questions: Sequence[Question], tokens: int, interval: int) -> Timing:
    session = engine.session()
    runner = Runner(
        session, Controller(policy, Budget(branches=BRANCHES, interval=interval)), questions, answer_of,
        window=1, max_new_tokens=tokens, cells=GRID.size, in_flight=len(questions),
    )  # fmt: skip
    for answer in runner.run():
        assert answer.error is None and len(answer.branches) == BRANCHES
    session.close()
    return runner.timing


def row(name: str, numbers: Sequence[float], form: str = "{:.2%}") -> str:
    low, middle, high = (form.format(x) for x in np.percentile(numbers, [25, 50, 75]))
    return f"  {name:42} {middle} [{low}, {high}]"


def report(name: str, times: Sequence[Timing]) -> None:
    print(name)
    print(row("run, seconds", [t.total_s for t in times], "{:.2f}"))
    for part in ("deciding", "requesting", "tracking", "stepping"):
        print(row(f"{part}, share of wall-clock", [getattr(t, f"{part}_s") / t.total_s for t in times]))
    print(row("one decision for all who are due, ms", [1e3 * t.deciding_s / t.decisions for t in times], "{:.2f}"))
    steps = [(t.deciding_s / t.decisions) / (t.stepping_s / t.steps) for t in times]
    print(row("the same, in engine steps", steps, "{:.3f}"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--interval", type=int, default=8)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    questions = [
        Question(f"q{i}", tuple(rng.integers(0, TEXT, PROMPT_TOKENS).tolist()), i) for i in range(options.prompts)
    ]
    times: dict[str, list[Timing]] = {name: [] for name in policies()}
    with tempfile.TemporaryDirectory() as folder:
        random_base(Path(folder))
        settings = EngineSettings(
            Path(folder), Sampling(), STOPS, ((TEXT, VOCAB),), 512, max_num_seqs=options.prompts * BRANCHES,
            joint=JointHead(VocabLayout(VOCAB, TEXT, TEXT, CELLS), GRID),
        )  # fmt: skip
        engine = start("vllm", settings)
        for repeat in range(options.repeats + 1):
            for name, policy in policies().items():
                found = timed(engine, policy, questions, options.tokens, options.interval)
                if repeat:  # the first warms up
                    times[name].append(found)
        engine.close()
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(
        f"{options.prompts} prompts × {BRANCHES} branches, a decision every {options.interval} tokens, "
        f"{options.repeats} repeats, {threads} thread(s), load {load:.1f}; median [quartiles]"
    )
    for name, runs in times.items():
        report(name, runs)


if __name__ == "__main__":
    main()
