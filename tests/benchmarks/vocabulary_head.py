"""Memory and time of the log-probabilities that train, at the vocabulary of Qwen3 with a copy of every token: 303,582 rows.

Three ways to score `--tokens` states and to go back to them and to the matrix: one softmax over all rows; TRL's chunked head
over the rows without copies; and ours, with copies in half of the places. Each in a process of its own; peak memory above
what the matrix and its gradient take. Run:

    OMP_NUM_THREADS=2 python -m tests.benchmarks.vocabulary_head --tokens 2048 --hidden 64
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

PLAIN, COPIES = 151936, 151646  # rows of Qwen3's matrices, and the published number of copies
KINDS = ("dense", "plain", "copies")


def measure(kind: str, tokens: int, hidden: int) -> dict[str, float]:
    """Seconds, and MiB above the matrix and its gradient."""
    import torch
    from torch import nn

    from ziprc.joint.reasoning import ReasoningVocabulary
    from ziprc.training.law import add_region_head

    class Body(nn.Module):
        """States that are given, below a real output matrix."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(hidden, PLAIN + COPIES, bias=False)
            self.states = nn.Parameter(torch.randn(1, tokens + 1, hidden))

        def base_model(self, **_: object) -> object:
            return type("Output", (), {"last_hidden_state": self.states})

        def get_output_embeddings(self) -> nn.Linear:
            return self.head

        def forward(self, **_: object) -> None:
            raise AssertionError("scored without places")

    body = Body()
    body.head.weight.grad = torch.zeros_like(body.head.weight)
    ids = torch.randint(0, PLAIN, (1, tokens + 1))
    inside = torch.arange(tokens)[None] % 2 == 0 if kind == "copies" else torch.zeros(1, tokens, dtype=torch.bool)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    if kind == "dense":
        logits = body.states[0, :-1] @ body.head.weight.T
        log_probs = logits.log_softmax(-1).gather(-1, ids[0, 1:, None])
    else:
        add_region_head(body, ReasoningVocabulary(PLAIN, ((0, COPIES),), 1, 151644, 151667, 151668), 1.0)  # type: ignore[arg-type]
        log_probs, _, _ = body(input_ids=ids, attention_mask=torch.ones_like(ids), inside=inside)
    log_probs.sum().backward()
    seconds = time.process_time() - began
    return {"seconds": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--kind", choices=KINDS, help="measure this one alone, and print JSON")
    options = parser.parse_args()
    if options.kind:
        print(json.dumps(measure(options.kind, options.tokens, options.hidden)))
        return
    found = {}
    for kind in KINDS:
        own = ["--tokens", str(options.tokens), "--hidden", str(options.hidden), "--kind", kind]
        done = subprocess.run(
            [sys.executable, "-m", "tests.benchmarks.vocabulary_head", *own], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    for kind, of in found.items():
        share, time_ = of["mib"] / found["dense"]["mib"], of["seconds"] / found["plain"]["seconds"]
        print(f"{kind:<8}{of['mib']:7.0f} MiB ({share:.2f} of dense), {of['seconds']:.1f} CPU-s ({time_:.2f} of plain)")


if __name__ == "__main__":
    main()
