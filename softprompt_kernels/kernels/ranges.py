"""Names for profilers: a range around each call of a backend, and one around each kernel in it.

    softprompt::<op>.<pass>[<backend>]                         a call of a backend: one pass of one op
    softprompt::<op>.<pass>.<kernel>[<backend> <tile>]         one kernel of that call

`kernel` is the name of its function in the source, which profilers of machine code show too. `tile` is what a block of
work has, such as 64x128 rows and keys, or the sizes of a GEMM, rows x columns x depth. All kernels and their tiles are
in `softprompt_kernels/profiling/names.py`.

A range is made only while somebody looks: a profiler of PyTorch (`torch.profiler`, `emit_nvtx`, `emit_itt`) in any
thread, or `nvtx_ranges`, for profilers outside the process. Otherwise a call costs one test, about 0.05 µs.
"""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.autograd import profiler
from torch.profiler import record_function

PREFIX = "softprompt::"

_NOTHING = nullcontext()
_nvtx = False  # ranges go to NVTX
_call = threading.local()  # .name, .backend: of the call that this thread is in


def observed() -> bool:
    """Whether ranges are made."""
    return _nvtx or profiler._is_profiler_enabled


def call_range(name: str, backend: str) -> AbstractContextManager[None]:
    """The range of a call of a backend; `name` is the op and the pass, as "kl_div.forward". Nothing if not observed."""
    return _call_range(name, backend) if observed() else _NOTHING


def kernel_range(kernel: str, *tile: int) -> AbstractContextManager[None]:
    """The range of one kernel, named after the call that this thread is in. Nothing if not observed."""
    return named_range(kernel_name(kernel, *tile)) if observed() else _NOTHING


def kernel_name(kernel: str, *tile: int) -> str:
    """The name of one kernel's range, in the call that this thread is in."""
    name, backend = getattr(_call, "name", None), getattr(_call, "backend", None)
    where = " ".join(part for part in (backend, "x".join(map(str, tile))) if part)
    return f"{PREFIX}{f'{name}.' if name else ''}{kernel}[{where}]"


@contextmanager
def nvtx_ranges() -> Iterator[None]:
    """Within it, ranges go to NVTX, where nsys and ncu read them, and not to a profiler of PyTorch."""
    global _nvtx
    before, _nvtx = _nvtx, True
    try:
        yield
    finally:
        _nvtx = before


@contextmanager
def named_range(name: str) -> Iterator[None]:
    """A range with any name."""
    if not _nvtx:
        with record_function(name):
            yield
        return
    torch.cuda.nvtx.range_push(name)
    try:
        yield
    finally:
        torch.cuda.nvtx.range_pop()


@contextmanager
def _call_range(name: str, backend: str) -> Iterator[None]:
    before = getattr(_call, "name", None), getattr(_call, "backend", None)
    _call.name, _call.backend = name, backend
    try:
        with named_range(f"{PREFIX}{name}[{backend}]"):
            yield
    finally:
        _call.name, _call.backend = before
