"""One launch of one kernel, as data: what a driver runs, and what the ahead-of-time check compiles.

A driver builds its launches from a problem and a target, and a launch built from tensors on the meta device can be
compiled for any target on any machine. So what is checked is what runs.
"""

from collections.abc import Iterable
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Options:
    """How a kernel is compiled, beside its constants."""

    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers of a thread, None: the assembler's choice


@dataclass(frozen=True)
class Launch:
    """`kernel[grid](**arguments, **constants)`."""

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors (None where there is none), sizes, strides, scalars
    constants: dict[str, Any]  # the constexpr ones
    options: Options
    descriptors: bool = False  # the kernel makes tensor descriptors

    def run(self) -> None:
        """Launches the kernel on the current stream; nothing for an empty grid."""
        if all(self.grid):
            options = {name: value for name, value in asdict(self.options).items() if value is not None}
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


def run_all(launches: Iterable[Launch], device: torch.device) -> None:
    """Runs launches one after the other on a device's current stream, whichever device is the current one."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            if launch.descriptors:
                # Within a context of our own, so that what the caller has set stays set.
                copy_context().run(_run_with_scratch, launch, device)
            else:
                launch.run()


def _run_with_scratch(launch: Launch, device: torch.device) -> None:
    """With memory for the tensor descriptors that the kernel makes."""
    import triton

    def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(scratch)
    launch.run()


def ceil_div(count: int, size: int) -> int:
    """Tiles of `size` that cover `count` things."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of 2 that is at least `count`, and at least 1."""
    return 1 << max(0, count - 1).bit_length()
