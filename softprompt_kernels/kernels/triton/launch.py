"""One launch of one kernel, as data: what a driver runs, and what the ahead-of-time check compiles.

A driver builds its launches from a problem and a target, and a launch built from tensors on the meta device can be
compiled for any target on any machine. So what is checked is what runs.
"""

from collections.abc import Iterable
from contextlib import nullcontext
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

    def run(self) -> None:
        """Launches the kernel on the current stream; nothing for an empty grid."""
        if all(self.grid):
            options = {name: value for name, value in asdict(self.options).items() if value is not None}
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


def run_all(launches: Iterable[Launch], device: torch.device) -> None:
    """Runs launches one after the other on a device's current stream, whichever device is the current one."""
    import triton

    def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        triton.set_allocator(scratch)  # tensor descriptors that a kernel makes lie there
        for launch in launches:
            launch.run()


def ceil_div(count: int, size: int) -> int:
    """Tiles of `size` that cover `count` things."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of 2 that is at least `count`, and at least 1."""
    return 1 << max(0, count - 1).bit_length()
