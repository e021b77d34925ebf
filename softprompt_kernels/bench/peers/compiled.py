"""torch.compile of the eager losses, and of concatenation + SDPA, for one size at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from softprompt_kernels.bench.peers import eager, sdpa
from softprompt_kernels.bench.peers.peer import Forward, Peer
from softprompt_kernels.testing.case import Case


def compile_for_one_size(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for one size, after a reset: torch.compile stops compiling a function that saw many sizes."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def compiler_missing() -> str | None:
    """Why torch.compile cannot compile for this CPU; None if it can."""
    if sys.platform == "win32":
        return "torch.compile is not tried on Windows"
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "torch.compile finds no C++ compiler"
    return None


def _compiled(forward: Forward) -> Forward:
    return lambda inputs: compile_for_one_size(forward(inputs))


def needs_compiler(case: Case, pass_: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a case cannot be compiled here."""
    return compiler_missing() if device.type == "cpu" else None


COMPILE = Peer(
    "compile",
    "torch.compile of the eager losses and of concatenation + SDPA",
    {op: _compiled(forward) for op, forward in {**eager.FORWARDS, **sdpa.SDPA.forwards}.items()},
    refuses=needs_compiler,
    compiled=True,
)
