"""Runs one case of an op under a profiler: warm-up, then a region of some rounds, in which all that happens is named.

Two kinds of profiler are served, one at a time:

    profile_case    torch.profiler in this process: returns the times of the ranges, and writes a Chrome trace
    expose_case     a profiler around this process, such as nsys or ncu: NVTX ranges, and cudaProfilerStart and
                    cudaProfilerStop around exactly the region

The region is the range `softprompt::profile`, each round in it `softprompt::round`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.kernels.ranges import named_range, nvtx_ranges
from softprompt_kernels.ops.dispatch import check_backend
from softprompt_kernels.output_file import written_when_complete
from softprompt_kernels.profiling.names import REGION, ROUND
from softprompt_kernels.profiling.summary import Summary, summarise
from softprompt_kernels.testing.case import Call
from softprompt_kernels.testing.cases import case

WARM_UP = 3


@dataclass
class Session:
    """What is run, and how often.

    Args:
        op, shape: as `testing.cases.case` takes them.
        backend: its name; None: the op chooses.
        dtype, device: of the inputs.
        pass_: one of the op's passes; None: all that it has.
        rounds: calls in the region.

    Raises:
        SoftPromptError: an argument is not accepted.
    """

    op: str
    shape: str
    backend: str | None = None
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pass_: str | None = None
    rounds: int = 10

    def __post_init__(self) -> None:
        try:
            check_backend(self.backend)
            self.case = case(self.op, self.shape)
            self.pass_ = self.case.check_pass(self.pass_)
        except ValueError as error:
            raise SoftPromptError(str(error)) from error
        if self.rounds < 1:
            raise SoftPromptError(f"rounds must be at least 1; got {self.rounds}")


def profile_case(session: Session, trace: Path | None = None) -> Summary:
    """Run a session under torch.profiler, which records shapes and memory too.

    Args:
        session: what is run.
        trace: file for the Chrome trace, for Perfetto or chrome://tracing; compressed if it ends in .gz. It is written
            under another name and then renamed.

    Returns:
        The time of every range of the package. Times include what the profiler adds, a few µs a range.

    Raises:
        SoftPromptError: the trace cannot be written there, or the backend cannot serve the case. Before anything runs.
    """
    with written_when_complete("trace", trace) as file:
        call = _warm(session)
        activities = [ProfilerActivity.CPU]
        if session.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities):  # starts the profiler's own machinery
            call()
        with profile(activities=activities, record_shapes=True, profile_memory=True) as profiler:
            _region(session, call)
        if file is not None:
            profiler.export_chrome_trace(str(file))
        return summarise(session.case, str(session.pass_), session.dtype, profiler.events() or ())


def expose_case(session: Session) -> None:
    """Run a session for a profiler around this process: `nsys profile -c cudaProfilerApi ...`, `ncu --nvtx ...`.

    Raises:
        SoftPromptError: torch finds no CUDA device, or the backend cannot serve the case. Before anything runs.
    """
    if not torch.cuda.is_available():
        raise SoftPromptError("NVTX ranges and cudaProfilerStart need a CUDA device; torch finds none")
    call = _warm(session)
    with nvtx_ranges(), _cuda_profiler():
        _region(session, call)


def _warm(session: Session) -> Call:
    """The call of a session, after a few runs: kernels are compiled, and memory is allocated."""
    inputs = session.case.inputs(session.dtype, session.device)
    try:
        call = session.case.prepare(inputs, session.backend, session.pass_)
        call()
    except ValueError as error:
        raise SoftPromptError(str(error)) from error
    for _ in range(WARM_UP - 1):
        call()
    _wait(session.device)
    return call


def _region(session: Session, call: Call) -> None:
    with named_range(REGION):
        for _ in range(session.rounds):
            with named_range(ROUND):
                call()
        _wait(session.device)


@contextmanager
def _cuda_profiler() -> Iterator[None]:
    """cudaProfilerStart and cudaProfilerStop, with nothing in flight at either."""
    runtime = torch.cuda.cudart()
    torch.cuda.synchronize()
    runtime.cudaProfilerStart()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        runtime.cudaProfilerStop()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
