"""What profilers learn of a Triton kernel: its name in the machine code, and the work of a launch.

`@profiled(work)` is `triton.jit` with two functions for profilers:

    name in the machine code     nsys, ncu and torch.profiler show it: the kernel's own name and its tile, as
                                 `forward_kernel_64x64`
    launch metadata              Proton shows it: the name of the range (`kernels/ranges.py`), FLOP and bytes. Triton
                                 asks for it only while Proton runs, and not in its interpreter.

FLOP are those of dots. Bytes are those of all tensors of the launch, each once, whatever the caches do. Nothing reads
the values of a tensor.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import triton

from softprompt_kernels.kernels.ranges import kernel_name
from softprompt_kernels.kernels.triton.launch import tile_of

Arguments = Mapping[str, Any]
Work = Callable[[Arguments], tuple[float, int]]  # from the arguments of a launch to FLOP and the bits of an operand


def profiled(work: Work | None = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` for a kernel that launches.

    Args:
        work: FLOP of a launch, and the bits of the operands of its dots; None: it has no dots.
        options: of `triton.jit`.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        name = function.__name__

        def launch_metadata(grid: tuple[int, ...], metadata: Any, arguments: Arguments) -> dict[str, Any]:
            return metadata_of(name, arguments, work)

        def symbol(specialization: Any) -> str:
            return f"{name}_{'x'.join(map(str, tile_of(specialization.constants)))}"

        return triton.jit(repr=symbol, launch_metadata=launch_metadata, **options)(function)

    return decorate


def metadata_of(name: str, arguments: Arguments, work: Work | None) -> dict[str, Any]:
    """Name, bytes and FLOP, under Proton's keys."""
    found: dict[str, Any] = {
        "name": kernel_name(name, *tile_of(arguments)),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in _tensors(arguments.values())),
    }
    if work is not None:
        flop, bits = work(arguments)
        found[f"flops{bits}"] = flop
    return found


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)
