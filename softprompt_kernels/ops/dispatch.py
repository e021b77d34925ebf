"""Chooses the backend that serves a call: the first of BACKENDS that can.

A backend is a name and one kernel module per op that it serves. A kernel module has

    unsupported(problem) -> str | None      why it cannot serve this problem, None if it can
    forward(problem) ...                    as the op defines it (and `backward`, where the op has one)

The argument `backend=` of an op, or else the environment variable SOFTPROMPT_BACKEND, names one backend. Then a problem
that it cannot serve is an error. Without a name, the first backend that can serve the problem is chosen.
SOFTPROMPT_LOG=dispatch prints every new choice to stderr. The reference is the last one and serves everything. Two
cases are announced, once per reason: that the reference is chosen because no faster backend can serve the call, and
that a preferred backend was not built or cannot run here.
"""

import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from softprompt_kernels.kernels.composed import attention as composed_attention
from softprompt_kernels.kernels.composed import expectation as composed_expectation
from softprompt_kernels.kernels.composed import kl_div as composed_kl_div
from softprompt_kernels.kernels.composed import linear_kl_div as composed_linear_kl_div
from softprompt_kernels.kernels.cpu import attention as cpu_attention
from softprompt_kernels.kernels.cpu import expectation as cpu_expectation
from softprompt_kernels.kernels.cpu import kl_div as cpu_kl_div
from softprompt_kernels.kernels.cpu import linear_kl_div as cpu_linear_kl_div
from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.cuda import native as cuda_native
from softprompt_kernels.kernels.cuda.attention import Attention
from softprompt_kernels.kernels.cuda.expectation import HeadExpectation
from softprompt_kernels.kernels.cuda.kl_div import KlDiv
from softprompt_kernels.kernels.cuda.linear_kl_div import LinearKlDiv
from softprompt_kernels.kernels.reference import attention as reference_attention
from softprompt_kernels.kernels.reference import expectation as reference_expectation
from softprompt_kernels.kernels.reference import kl_div as reference_kl_div
from softprompt_kernels.kernels.reference import linear_kl_div as reference_linear_kl_div
from softprompt_kernels.kernels.triton import runtime as triton_runtime
from softprompt_kernels.kernels.triton.attention import prompt_attention as triton_attention
from softprompt_kernels.kernels.triton.losses import expectation as triton_expectation
from softprompt_kernels.kernels.triton.losses import kl_div as triton_kl_div
from softprompt_kernels.kernels.triton.losses import linear_kl_div as triton_linear_kl_div

REFERENCE = "reference"


class Kernel(Protocol):
    """What dispatch needs of a kernel module. Its other functions are called by its op."""

    def unsupported(self, problem: Any) -> str | None:
        """Why this kernel cannot serve the problem, naming the argument in the way; None if it can."""


@dataclass(frozen=True)
class Backend:
    """A named family of kernels."""

    name: str
    summary: str
    kernels: Mapping[str, Any]  # op -> Kernel
    missing: Callable[[], str | None] = field(default=lambda: None)  # why it cannot run here, and how to get it
    by_name_only: bool = False  # never chosen for a call that names no backend
    prefers_packed: bool = False  # a packed batch is as fast as a dense one with as many real tokens


@dataclass(frozen=True)
class BackendRecord:
    """One line of `softprompt doctor`."""

    name: str
    ops: tuple[str, ...]
    available: bool
    detail: str


def _cuda_kernels(launcher: cuda_native.Launcher) -> dict[str, Any]:
    return {
        "prompt_attention": Attention(launcher),
        "kl_div": KlDiv(launcher),
        "linear_kl_div": LinearKlDiv(launcher),
        "teacher_moments": HeadExpectation(launcher),
        "linear_kl_div_from_moments": HeadExpectation(launcher),
    }


BACKENDS: tuple[Backend, ...] = (
    Backend(
        "cpu",
        f"CPU: C++ kernels, fp32 arithmetic; {native.instruction_set()}",
        {
            "prompt_attention": cpu_attention,
            "kl_div": cpu_kl_div,
            "linear_kl_div": cpu_linear_kl_div,
            "teacher_moments": cpu_expectation,
            "linear_kl_div_from_moments": cpu_expectation,
        },
        missing=native.missing,
        prefers_packed=True,
    ),
    Backend(
        "composed",
        "CPU: PyTorch's flash attention, and losses from its GEMMs in bounded memory",
        {
            "prompt_attention": composed_attention,
            "kl_div": composed_kl_div,
            "linear_kl_div": composed_linear_kl_div,
            "teacher_moments": composed_expectation,
            "linear_kl_div_from_moments": composed_expectation,
        },
    ),
    Backend(
        "triton",
        "CUDA and ROCm: Triton kernels, fp32 arithmetic (TRITON_INTERPRET=1 runs them on CPU tensors, slowly)",
        {
            "prompt_attention": triton_attention,
            "kl_div": triton_kl_div,
            "linear_kl_div": triton_linear_kl_div,
            "teacher_moments": triton_expectation,
            "linear_kl_div_from_moments": triton_expectation,
        },
        missing=triton_runtime.missing,
        prefers_packed=True,
    ),
    Backend(
        "cuda",
        "CUDA: C++ kernels, fp32 arithmetic, nothing compiled at run time",
        _cuda_kernels(cuda_native.DEVICE),
        missing=cuda_native.DEVICE.missing,
    ),
    Backend(
        "simt",
        "CPU, for tests: the CUDA C++ kernels, run and checked by csrc/simt",
        _cuda_kernels(cuda_native.HOST),
        missing=cuda_native.HOST.missing,
        by_name_only=True,
    ),
    Backend(
        REFERENCE,
        "plain PyTorch, any device and dtype: the definition",
        {
            "prompt_attention": reference_attention,
            "kl_div": reference_kl_div,
            "linear_kl_div": reference_linear_kl_div,
            "teacher_moments": reference_expectation,
            "linear_kl_div_from_moments": reference_expectation,
        },
    ),
)
"""All backends, from most to least preferred."""

_announced: set[str] = set()


def available_backends() -> list[BackendRecord]:
    """Every backend, most preferred first, with what it serves or why it cannot run here."""
    records = []
    for backend in BACKENDS:
        missing = backend.missing()
        records.append(BackendRecord(backend.name, tuple(backend.kernels), missing is None, missing or backend.summary))
    return records


def check_backend(name: str | None) -> None:
    """Raises ValueError for a name that no backend has."""
    if name is None:
        return
    names = [b.name for b in BACKENDS]
    if name not in names:
        raise ValueError(f"backend must be None or one of {', '.join(sorted(names))}; got {name!r}")


def backend_of(kernel: Any) -> str:
    """The name of the backend that a kernel module belongs to; "unknown" for one that is in no backend."""
    return next((b.name for b in BACKENDS if any(each is kernel for each in b.kernels.values())), "unknown")


def prefers_packed(op: str, problem: Any) -> bool:
    """`prefers_packed` of the backend that would serve a problem; False if none would. Logs and warns nothing."""
    requested = os.environ.get("SOFTPROMPT_BACKEND") or None
    for backend in _candidates(requested):
        if op in backend.kernels and backend.missing() is None and backend.kernels[op].unsupported(problem) is None:
            return backend.prefers_packed
    return False


def _candidates(requested: str | None) -> list[Backend]:
    """The backends that may serve a call, most preferred first."""
    if requested is not None:
        return [backend for backend in BACKENDS if backend.name == requested]
    return [backend for backend in BACKENDS if not backend.by_name_only]


def select(op: str, problem: Any, requested: str | None, device: torch.device) -> Any:
    """The kernel module that serves `problem`.

    Raises:
        ValueError: the requested backend does not exist, or cannot serve the problem.
    """
    requested = requested or os.environ.get("SOFTPROMPT_BACKEND") or None
    check_backend(requested)
    refused: list[str] = []
    for backend in _candidates(requested):
        reason = backend.kernels[op].unsupported(problem) if op in backend.kernels else f"it has no {op}"
        missing = backend.missing()
        if reason is None and missing is None:
            if os.environ.get("SOFTPROMPT_LOG") == "dispatch":
                _log(op, backend.name, device, "requested" if requested else "; ".join(refused) or "preferred")
            if backend.name == REFERENCE and requested is None:
                _announce_reference(op, device, refused)
            return backend.kernels[op]
        if reason is None and requested is None:
            _announce_missing(backend.name, device, str(missing))
        refused.append(f"{backend.name}: {missing or reason}")
    alternatives = _alternatives(op, problem, requested)
    raise ValueError(f"backend={requested!r} cannot serve this {op} call: {'; '.join(refused)}. {alternatives}")


def _alternatives(op: str, problem: Any, refused: str | None) -> str:
    """A sentence: which backends can serve a call that one refused, and why the others cannot."""
    able, unable = [], []
    for backend in BACKENDS:
        if backend.name == refused or backend.by_name_only:
            continue
        reason = backend.kernels[op].unsupported(problem) if op in backend.kernels else f"it has no {op}"
        reason = reason or backend.missing()
        if reason is None:
            able.append(backend.name)
        else:
            unable.append(f"{backend.name}: {reason}")
    why = f" ({'; '.join(unable)})" if unable else ""
    return f"Backends that can: {', '.join(able) or 'none'}{why}"


def _log(op: str, name: str, device: torch.device, why: str) -> None:
    if _first_time(f"log {op} {name} {device} {why}"):
        print(f"softprompt dispatch: {op} on {device} -> {name} ({why})", file=sys.stderr)


def _announce_reference(op: str, device: torch.device, refused: list[str]) -> None:
    why = "; ".join(refused) or "there is no other backend"
    if _first_time(f"reference {op} {device.type} {why}"):
        warnings.warn(
            f"{op} on {device.type} runs on the reference backend, which is right but slow ({why}). "
            f"Pass backend='reference' or set SOFTPROMPT_BACKEND=reference to choose it without this warning.",
            stacklevel=2,
        )


def _announce_missing(name: str, device: torch.device, why: str) -> None:
    if _first_time(f"missing {name} {device.type}"):
        warnings.warn(
            f"the {name} backend would serve calls on {device.type}, but {why}. Another one does, more slowly. "
            f"Set SOFTPROMPT_BACKEND to choose one without this warning.",
            stacklevel=2,
        )


def _first_time(message: str) -> bool:
    key = re.sub(r"\d+", "#", message)  # without sizes, which differ between decoding steps
    is_new = key not in _announced
    _announced.add(key)
    return is_new
