"""Peak memory of a training step: how far the resident memory of a fresh process grows above the loaded model.

"Loaded" means that one token has been through the model: its weights are resident and the libraries are set up. What
comes after counts: the prompt, the optimiser, activations, logits, gradients, and the pages of memory-mapped moments
that are read.
"""

from __future__ import annotations

import peft  # noqa: F401  imported before memory is measured, so that every implementation has it loaded
import torch

from benchmarks.step.implementations import IMPLEMENTATIONS
from benchmarks.step.problem import Problem
from softprompt_kernels.bench.memory import PeakResident, in_fresh_process, release_freed_memory

STEPS = 2  # in the second step the optimiser's state exists


def peak_of(implementation: str, problem: Problem) -> int:
    """Peak bytes above the loaded model of an implementation, by its name; measured in a process of its own.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process was killed, most likely because memory ran out.
    """
    return in_fresh_process(_peak_in_this_process, implementation, problem)


def _peak_in_this_process(implementation: str, problem: Problem) -> int:
    torch.set_num_threads(problem.threads)
    kind = IMPLEMENTATIONS[implementation]
    model = kind.load(problem.model)
    with torch.no_grad():
        model(input_ids=torch.zeros(1, 1, dtype=torch.int64))
    release_freed_memory()
    with PeakResident() as peak:
        training = kind(problem, model)
        for _ in range(STEPS):
            training.step()
    return peak.growth
