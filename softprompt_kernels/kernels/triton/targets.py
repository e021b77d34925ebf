"""The GPU architectures that kernels are configured and compiled for, with the numbers that planning needs.

The numbers are the vendors'. `multiprocessors` are those of the largest common card.
"""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Target:
    """A GPU architecture."""

    name: str  # sm_90, gfx942
    backend: str  # cuda, hip
    arch: int | str  # in the form of Triton's GPUTarget
    warp_size: int
    shared_memory: int  # bytes of one block
    multiprocessors: int


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 108),  # A100
        Target("sm_86", "cuda", 86, 32, 99 * 1024, 84),  # RTX 3090, A10
        Target("sm_89", "cuda", 89, 32, 99 * 1024, 128),  # RTX 4090, L40S
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 132),  # H100, H200
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 148),  # B200
        Target("sm_120", "cuda", 120, 32, 99 * 1024, 170),  # RTX 5090
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 304),  # MI300X
    )
}


@cache
def target_of(device: torch.device) -> Target:
    """The newest target that is not newer than the device, with the device's own number of multiprocessors.

    sm_80 for CPU and meta tensors, gfx942 for every ROCm device.
    """
    if device.type != "cuda":
        return TARGETS["sm_80"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return TARGETS["gfx942"]
    arch = 10 * properties.major + properties.minor
    known = [t for t in TARGETS.values() if t.backend == "cuda" and int(t.arch) <= arch]
    best = max(known or [TARGETS["sm_80"]], key=lambda t: int(t.arch))
    return Target(
        best.name, best.backend, best.arch, best.warp_size, best.shared_memory, properties.multi_processor_count
    )
