"""The exact KL in chunks against the naive one: time and memory, at a real vocabulary, as ratios of one run.

Each form runs in a process of its own, in turn, so that the peak memory is its own and slow minutes hit both alike.

    OMP_NUM_THREADS=1 python tests/benchmarks/chunked_kl.py --states 512 --pairs 5
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch

from ziprc.training.objectives.joint import KLForm, Reference, reference_kl

VOCABULARY, HIDDEN, SLICE = 151_936, 256, 56  # Qwen3's rows, a narrow body: the cost is in the rows
CHUNK = 64


def naive(states: torch.Tensor, weight: torch.Tensor, reference: Reference, rows: slice) -> torch.Tensor:
    """The same number by autograd over full logits."""
    outside = torch.ones(len(weight), dtype=torch.bool)
    outside[rows.start : rows.stop] = False
    log_q = (states @ weight.T)[:, outside].log_softmax(-1)
    log_p = (reference.states @ reference.weight.T)[:, outside].log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def one_run(form: str, count: int) -> dict[str, float]:
    """Seconds of forward and backward, and the growth of peak memory in MiB."""
    torch.manual_seed(0)
    weight = (torch.randn(VOCABULARY, HIDDEN) * 0.02).requires_grad_()
    states = torch.randn(count, HIDDEN, requires_grad=True)
    reference = Reference(states.detach() + 0.1 * torch.randn(count, HIDDEN), weight.detach())
    rows = slice(VOCABULARY - 300, VOCABULARY - 300 + SLICE)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if form == "chunked":
        loss = reference_kl(states, weight, reference, rows, KLForm.EXACT, 0, CHUNK)
    else:
        loss = naive(states, weight, reference, rows)
    loss.backward()
    seconds = time.process_time() - start
    return {"seconds": seconds, "mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--form", choices=("chunked", "naive"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.form:
        print(json.dumps(one_run(options.form, options.states)))
        return
    ratios = []
    for pair in range(options.pairs):
        found = {}
        for form in ("chunked", "naive") if pair % 2 else ("naive", "chunked"):
            command = [sys.executable, __file__, "--form", form, "--states", str(options.states)]
            found[form] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        ratios.append([found["chunked"][key] / found["naive"][key] for key in ("seconds", "mib")])
    for name, values in zip(("CPU time", "extra peak memory"), np.array(ratios).T, strict=True):
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        print(
            f"{name}: chunked / naive = {middle:.2f} [{low:.2f}, {high:.2f}], {options.pairs} pairs, {options.states} states"
        )


if __name__ == "__main__":
    main()
