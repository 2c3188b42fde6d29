"""How much wall-clock does adaptive sampling save, live? Against the plain vote of k, alternating on one engine.

Both answer the same test prompts of a built experiment, all in flight together; order alternates, so that whatever else
the machine does hits both. Prints accuracy, tokens and seconds of both and the ratios; the machine is shared, so ratios
within this run are all that means anything.

    OMP_NUM_THREADS=1 python tests/benchmarks/live_wall_clock.py results/toy --prompts 200 --budget 2 --votes 16
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from ziprc.config.load import load
from ziprc.evaluation.samplers.decisions import decision_table, live_record, ungraded_answers, with_grades
from ziprc.joint.head import read_joint_head
from ziprc.joint.tokenizer import load_tokenizer
from ziprc.rewards.grading import VERDICTS, grade_answers, parts_of
from ziprc.sampling.families import PLUS, live_setting
from ziprc.sampling.fitting import read_fitted
from ziprc.sampling.live.bench import open_engine, play, questions_of
from ziprc.store.files import read_json
from ziprc.store.layout import Layout
from ziprc.tables.pieces import Pieces
from ziprc.tables.prompts import PROMPTS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("home", type=Path, help="results/<experiment>, built")
    parser.add_argument("--config-file", type=Path, default=Path("config.yaml"))
    parser.add_argument("--policy", default=PLUS)
    parser.add_argument("--budget", type=float, default=2.0, help="of the policy, in samples")
    parser.add_argument("--votes", type=int, default=16, help="k of the plain vote")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=5)
    options = parser.parse_args()
    layout = Layout(options.home.parent, options.home.name)
    config, folder = load(options.config_file, layout.experiment), layout.checkpoint("ziprc")
    fitted = read_fitted(folder, read_joint_head(folder).grid)
    frontier = read_json(layout.home / "frontier.json")
    settings = {
        "adaptive": live_setting(options.policy, options.budget, frontier, fitted),
        "vote": live_setting("majority", options.votes, frontier, fitted),
    }
    asked = PROMPTS.read(layout.table("prompts", "test")).slice(0, options.prompts).to_pylist()
    prompts = {prompt["prompt_id"]: prompt for prompt in asked}
    tokenizer = load_tokenizer(folder)
    seen: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in settings}
    with open_engine(config, folder, tokenizer) as engine:
        questions = questions_of(list(prompts.values()), tokenizer, config)
        for pair in range(options.pairs):
            for name in sorted(settings, reverse=bool(pair % 2)):
                setting, flights = settings[name], config.samples.in_flight
                run = play(engine, config, tokenizer, questions, setting, flights, f"{pair} {name}")
                table = decision_table(run.answers, run.texts, setting, "live")
                with tempfile.TemporaryDirectory() as folder:
                    pieces = Pieces(Path(folder), VERDICTS, "", parts_of(ungraded_answers(table)))
                    verdicts = grade_answers(config, prompts, pieces)
                record = live_record(with_grades(table, verdicts), {}, 10, 0.95)["live"]
                right, tokens = record["accuracy"]["value"], record["tokens"]
                timing = run.timing
                seen[name].append((right, tokens, timing.total_s, timing.deciding_s / timing.total_s))
    table = {name: np.array(rows) for name, rows in seen.items()}
    for name, rows in table.items():
        right, tokens, seconds, deciding = np.median(rows, 0)
        print(
            f"{settings[name].name}: {right:.3f} right, {tokens:.0f} tokens a prompt, {seconds:.1f} s, {deciding:.1%} deciding"
        )
    ratio = table["adaptive"][:, 1:3] / table["vote"][:, 1:3]
    for label, column in zip(("tokens", "wall-clock"), ratio.T, strict=True):
        low, middle, high = np.quantile(column, [0.25, 0.5, 0.75])
        print(f"{label}: {middle:.3f} [{low:.3f}, {high:.3f}] of the vote's (quartiles of {options.pairs} pairs)")


if __name__ == "__main__":
    main()
