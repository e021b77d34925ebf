"""The occupancy of a multiprocessor, against the vendors' tables."""

import pytest

from softprompt_kernels.kernels.triton.compile.occupancy import MULTIPROCESSORS, blocks_at_once
from softprompt_kernels.kernels.triton.targets import TARGETS

KIB = 1024


@pytest.mark.parametrize(
    ("target", "warps", "registers", "shared", "blocks"),
    [
        ("sm_80", 4, 32, 0, 16),  # 64 warps
        ("sm_80", 1, 32, 0, 32),  # block slots
        ("sm_80", 4, 128, 0, 4),  # registers
        ("sm_80", 4, 129, 0, 3),  # registers, in units of 8
        ("sm_80", 8, 255, 0, 1),
        ("sm_80", 4, 179, 0, 2),  # 2 warps a partition
        ("sm_80", 4, 64, 163 * KIB, 1),  # the largest block
        ("sm_80", 4, 64, 81 * KIB, 2),  # the system takes 1 KiB per block
        ("sm_86", 4, 32, 0, 12),  # 48 warps
        ("sm_86", 1, 32, 0, 16),
        ("sm_90", 4, 64, 113 * KIB, 2),
        ("sm_90", 4, 64, 114 * KIB, 1),
        ("sm_90", 4, 64, 228 * KIB, 0),  # does not fit at all
        ("gfx942", 4, 92, 0, 5),  # the compiler reports 5 waves per SIMD
        ("gfx942", 4, 64, 0, 8),
        ("gfx942", 4, 64, 64 * KIB, 1),
    ],
)
def test_the_scarcest_resource_limits(target: str, warps: int, registers: int, shared: int, blocks: int) -> None:
    found = blocks_at_once(MULTIPROCESSORS[target], warps=warps, registers=registers, shared_memory=shared)
    assert found == blocks


def test_tensor_memory_is_a_resource_of_its_own() -> None:
    chip = MULTIPROCESSORS["sm_100"]
    assert blocks_at_once(chip, warps=4, registers=64, shared_memory=0, tensor_columns=256) == 2
    assert blocks_at_once(chip, warps=4, registers=64, shared_memory=0, tensor_columns=512) == 1


def test_every_target_has_a_multiprocessor_that_holds_its_largest_block() -> None:
    assert set(MULTIPROCESSORS) == set(TARGETS)
    for name, target in TARGETS.items():
        chip = MULTIPROCESSORS[name]
        assert chip.warp_size == target.warp_size
        assert blocks_at_once(chip, warps=4, registers=64, shared_memory=target.shared_memory) == 1
