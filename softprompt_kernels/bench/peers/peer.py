"""A peer: another implementation of some of the ops, called the way its own users call it.

A peer takes the inputs of a case (softprompt_kernels.testing) and returns a function that gives the same result as the
op, with a graph where gradients are on. What can be cached (masks, a teacher's probabilities) is made before and counts
as input. Packages are imported when a peer is used. None of their code is copied.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from softprompt_kernels.testing.case import Call, Case, as_pass

Forward = Callable[[Any], Callable[[], Any]]  # inputs of a case -> a function that runs the op once
NEEDS_GPU = "its kernels are written in Triton, which needs a GPU"


def serves_all(case: Case, pass_: str, dtype: torch.dtype, device: torch.device) -> None:
    """Says that a peer runs every case of its ops."""


def needs_gpu(case: Case, pass_: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a peer of Triton kernels cannot run here."""
    return NEEDS_GPU if device.type == "cpu" else None


@dataclass(frozen=True)
class Peer:
    """One implementation.

    Args:
        name: as `softprompt bench --peer` takes it.
        summary: what it is, in a line.
        forwards: by op.
        package: the package to import; None: PyTorch alone.
        install: what to give pip.
        refuses: says why a case cannot run here; None if it can.
        compiled: it is compiled for each size.
    """

    name: str
    summary: str
    forwards: Mapping[str, Forward]
    package: str | None = None
    install: str = ""
    refuses: Callable[[Case, str, torch.dtype, torch.device], str | None] = serves_all
    compiled: bool = False

    def left_out(self, case: Case, pass_: str, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it does not run a pass of a case; None if it does."""
        if case.op not in self.forwards:
            return f"it has no {case.op}"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install {self.install}"
        return self.refuses(case, pass_, dtype, device)

    def prepare(self, case: Case, inputs: Any, pass_: str) -> Call:
        """A function that runs one pass, as `Case.prepare`."""
        return as_pass(self.forwards[case.op](inputs), case.sources(inputs), case.grad_out(inputs), pass_)
