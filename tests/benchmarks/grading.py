"""Grading by a served grader: our small server, vLLM's, and the engine called directly, on the questions of an experiment.

Seconds of the clock and CPU seconds of this process and the server's, the fastest of some repeats, per question, and their
ratios to the engine's; besides, what asking equal questions once has saved while arms trained. Every way answers the same
distinct questions, and the totals must be the same. Run, where the experiment has been built:

    OMP_NUM_THREADS=1 python -m tests.benchmarks.grading smoke-rubric --questions 256 --kinds engine hf vllm
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from ziprc.chat import prompt_token_ids
from ziprc.config.base import GREEDY
from ziprc.config.load import load
from ziprc.engines import start
from ziprc.engines.base import EngineSettings, Request, settings_for
from ziprc.engines.server import Server
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.base import Grade
from ziprc.rewards.rubric import read_total, render
from ziprc.rewards.served import Scorer
from ziprc.store.layout import Layout
from ziprc.tables.progress import PROGRESS
from ziprc.tables.prompts import PROMPTS
from ziprc.training.graders import GOLDEN, accepts


def cpu_seconds(server: Server | None) -> float:
    """Of this process and of all of the server's, so far."""
    found = [psutil.Process()]
    if server is not None and server.process is not None:
        found += [psutil.Process(server.process.pid), *psutil.Process(server.process.pid).children(recursive=True)]
    return sum(sum(one.cpu_times()[:2]) for one in found)


def timed(
    ask: Callable[[], list[Grade]], server: Server | None, repeats: int
) -> tuple[float, float, list[float | None]]:
    """Least seconds and CPU seconds of a few calls, and the scores."""
    walls, cpus, scores = [], [], []
    for _ in range(repeats):
        before, began = cpu_seconds(server), time.perf_counter()
        scores = [grade.score for grade in ask()]
        walls.append(time.perf_counter() - began)
        cpus.append(cpu_seconds(server) - before)
    return min(walls), min(cpus), scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("--results", type=Path, default=Path("results"))
    parser.add_argument("--grader", default="grader-main")
    parser.add_argument("--questions", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["engine", "hf"], choices=["engine", "hf", "vllm"])
    options = parser.parse_args()
    config, layout = load(Path("config.yaml"), options.experiment), Layout(options.results, options.experiment)
    own, folder = config.gradings, layout.checkpoint(options.grader)
    tokenizer = load_tokenizer(folder)
    settings = settings_for(folder, tokenizer, own, GREEDY, config.runtime, 1)
    rows = PROMPTS.read(layout.home / "gradings" / "test.parquet").to_pylist()
    questions = [row["messages"] for row in rows][: options.questions]
    found = {kind: measured(kind, settings, questions, own.max_new_tokens, options.repeats) for kind in options.kinds}
    first = next(iter(found.values()))
    print(
        f"{len(questions)} distinct questions of {options.experiment}, {options.grader}; it starts until a golden answer is in"
    )
    print(f"{'way':<8}{'start s':>9}{'questions/s':>13}{'CPU ms each':>13}{'CPU, ratio':>12}{'same totals':>13}")
    for kind, (starts, wall, cpu, scores) in found.items():
        same = sum(a == b for a, b in zip(scores, first[3], strict=True)) / len(scores)
        rate, each = len(questions) / wall, 1000 * cpu / len(questions)
        print(f"{kind:<8}{starts:>9.1f}{rate:>13.1f}{each:>13.2f}{cpu / first[2]:>12.2f}{same:>13.1%}")
    for path in sorted(layout.home.glob("checkpoints/online-*/progress.parquet")):
        rows = PROGRESS.read(path).to_pylist()
        asked, saved = (sum(row[name] or 0 for row in rows) for name in ("asked", "saved"))
        if asked and any(row["saved"] is not None for row in rows):
            print(f"{path.parent.name}: {asked} grades, {saved / asked:.0%} of them by an equal question")


def measured(
    kind: str, settings: EngineSettings, questions: list[list[dict[str, str]]], cap: int, repeats: int
) -> tuple[float, float, float, list[float | None]]:
    """Seconds to start; least seconds, CPU seconds and scores of all questions."""
    began = time.perf_counter()
    tokenizer = load_tokenizer(settings.model)
    with contextlib.ExitStack() as stack:
        if kind == "engine":
            engine = stack.enter_context(contextlib.closing(start("hf", settings)))
            ids = [tuple(prompt_token_ids(tokenizer, messages, thinking=False)) for messages in questions]

            def direct() -> list[Grade]:
                found = engine.generate([Request(str(i), one, 0, cap) for i, one in enumerate(ids)])
                texts = [tokenizer.decode(one.token_ids, skip_special_tokens=True) for one in found]
                return [read_total(t, one.finish_reason == "stop") for t, one in zip(texts, found, strict=True)]

            starts = time.perf_counter() - began
            return starts, *timed(direct, None, repeats)
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "grader.log"
        server = stack.enter_context(Server(kind, settings, log, render(*GOLDEN), accepts, cap))  # type: ignore[arg-type]
        starts = time.perf_counter() - began

        def over_http() -> list[Grade]:
            with Scorer(server, read_total, cap) as scorer:
                return scorer.grade(questions)

        return starts, *timed(over_http, server, repeats)


if __name__ == "__main__":
    main()
