"""One launch of one kernel, as data: a driver runs it, the ahead-of-time check compiles it.

A driver builds its launches from a problem and a target. A launch built from tensors on the meta device can be compiled
for any target on any machine, so the check sees exactly what would run.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from contextvars import copy_context
from dataclasses import asdict, dataclass
from typing import Any

import torch

from softprompt_kernels.kernels.ranges import kernel_range, observed


@dataclass(frozen=True)
class Options:
    """Compiler options of a kernel."""

    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers per thread; None: the assembler decides


@dataclass(frozen=True)
class TileConfig:
    """The tile of a program, and how its kernel is compiled."""

    block_m: int  # rows
    block_n: int  # keys, or vocabulary entries
    options: Options


@dataclass(frozen=True)
class Launch:
    """`kernel[grid](**arguments, **constants)`."""

    kernel: Any  # a triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors (or None), sizes, strides, scalars
    constants: dict[str, Any]  # constexpr arguments
    options: Options
    descriptors: bool = False  # the kernel creates tensor descriptors

    def run(self) -> None:
        """Launches the kernel on the current stream; does nothing if the grid is empty."""
        if all(self.grid):
            options = {name: value for name, value in asdict(self.options).items() if value is not None}
            with kernel_range(self.kernel.__name__, *(tile_of(self.constants) if observed() else ())):
                self.kernel[self.grid](**self.arguments, **self.constants, **options)


def tile_of(constants: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns (keys, vocabulary entries) of the block that one program works on at a time."""
    variant = constants.get("VARIANT")
    if variant is not None:
        return variant.block_m, variant.block_n
    return constants["BLOCK_M"], constants["BLOCK_N"] if "BLOCK_N" in constants else constants["BLOCK_D"]


def run_all(launches: Iterable[Launch], device: torch.device) -> None:
    """Runs launches in order on the current stream of `device`, which need not be the current device."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        for launch in launches:
            if launch.descriptors:
                # In a copied context, so that the caller's allocator stays set.
                copy_context().run(_run_with_scratch, launch, device)
            else:
                launch.run()


def _run_with_scratch(launch: Launch, device: torch.device) -> None:
    """Runs a launch with an allocator for the tensor descriptors that the kernel creates."""
    import triton

    def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    triton.set_allocator(scratch)
    launch.run()


def ceil_div(count: int, size: int) -> int:
    """The number of tiles of `size` that cover `count` elements."""
    return -(-count // size)


def next_power_of_2(count: int) -> int:
    """The smallest power of 2 that is at least `count`, and at least 1."""
    return 1 << max(0, count - 1).bit_length()
