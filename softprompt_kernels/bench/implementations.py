"""What can run a case: the backends of the op, and the peers. One name for each.

cpu, composed, triton, cuda, simt, reference     backends of the ops (`softprompt doctor` lists them)
eager, sdpa, compile, …                          peers (bench/peers)
"""

from __future__ import annotations

from typing import Any

import torch

from softprompt_kernels.bench.peers.registry import PEERS
from softprompt_kernels.ops.dispatch import BACKENDS, REFERENCE
from softprompt_kernels.testing.case import Call, Case

REFERENCE_FLOP = 1e9  # of the largest case that the backend `reference` runs without being named
DEFAULT_BACKENDS = tuple(backend.name for backend in BACKENDS if not backend.by_name_only)


def prepare(case: Case, name: str, inputs: Any, pass_: str) -> Call:
    """A function that runs one pass of a case on a backend, or as a peer does."""
    return PEERS[name].prepare(case, inputs, pass_) if name in PEERS else case.prepare(inputs, name, pass_)


def is_compiled(name: str) -> bool:
    """Whether code is compiled for each size."""
    return name in PEERS and PEERS[name].compiled


def warm_up_case(case: Case, name: str) -> Case:
    """The case that sets up the libraries: a tiny one, or the case itself where code is compiled for each size."""
    return case if is_compiled(name) else case.tiny()


def left_out(case: Case, name: str, pass_: str, dtype: torch.dtype, device: torch.device, named: bool) -> str | None:
    """Why an implementation does not run a pass of a case here; None if it does.

    Args:
        named: the user asked for it. Else what is slow is left out.
    """
    if name in PEERS:
        return PEERS[name].left_out(case, pass_, dtype, device)
    if name == REFERENCE and not named and case.flop() > REFERENCE_FLOP:
        return "it is slow for this size: name it with --backend reference to measure it"
    backend = next(backend for backend in BACKENDS if backend.name == name)
    if missing := backend.missing():
        return missing
    tiny = case.tiny()
    try:
        tiny.run(tiny.inputs(dtype, device), name, pass_)
    except ValueError as error:
        return refusal(name, error)
    return None


def refusal(name: str, error: ValueError) -> str:
    """Why a backend does not serve a call, from the error of the op."""
    return str(error).partition(f": {name}: ")[2].partition(". Backends that can")[0] or str(error)
