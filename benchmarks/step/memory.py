"""Peak memory of a side: how far the resident memory of a fresh process grows above the loaded model.

"Loaded" means that one token has been through the model, so that its weights are resident and the libraries have been
set up. What comes after counts: the prompt, the optimiser, activations, logits, gradients, and the pages of
memory-mapped moments that are read.
"""

from __future__ import annotations

import peft  # noqa: F401  imported before memory is looked at: all sides have it loaded
import torch

from benchmarks.harness.memory import PeakResident, give_back_freed, in_fresh_process
from benchmarks.step.implementations import SIDES
from benchmarks.step.problem import Problem

STEPS = 2  # the second one finds the optimiser's state


def peak_of(side: str, problem: Problem) -> int:
    """Bytes above the loaded model that `side` needs, measured in a process of its own.

    Raises:
        concurrent.futures.process.BrokenProcessPool: that process was killed, as by a system without memory left.
    """
    return in_fresh_process(_peak_here, side, problem)


def _peak_here(side: str, problem: Problem) -> int:
    torch.set_num_threads(problem.threads)
    way = SIDES[side]
    model = way.load(problem.model)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
    give_back_freed()
    with PeakResident() as peak:
        training = way(problem, model)
        for _ in range(STEPS):
            training.step()
    return peak.growth
