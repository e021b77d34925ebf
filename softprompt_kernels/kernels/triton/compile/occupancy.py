"""Occupancy: how many blocks of a kernel one multiprocessor holds at once, limited by its scarcest resource.

    registers       each warp gets them in units of 8 a thread, from one of 4 partitions of the register file
    shared memory   each block gets it in units, and the system reserves some more per block
    slots           for warps, and for blocks
    tensor memory   of sm_100, in columns

The numbers are the vendors'. More blocks hide more latency; for a large tile one block is enough.
"""

from dataclasses import dataclass

_PARTITIONS = 4  # SIMDs of a compute unit, sub-partitions of a multiprocessor
_REGISTER_UNIT = 8  # a thread


@dataclass(frozen=True)
class Multiprocessor:
    """The resources of one multiprocessor (compute unit)."""

    registers: int  # of 32 bits
    warps: int
    blocks: int
    shared_memory: int  # bytes
    reserved: int  # bytes of shared memory that the system takes per block
    shared_unit: int  # bytes, the granularity of shared memory
    warp_size: int = 32
    tensor_columns: int = 0  # 0: no such memory


_KIB = 1024
MULTIPROCESSORS = {
    "sm_80": Multiprocessor(65536, 64, 32, 164 * _KIB, _KIB, 128),
    "sm_86": Multiprocessor(65536, 48, 16, 100 * _KIB, _KIB, 128),
    "sm_89": Multiprocessor(65536, 48, 24, 100 * _KIB, _KIB, 128),
    "sm_90": Multiprocessor(65536, 64, 32, 228 * _KIB, _KIB, 128),
    "sm_100": Multiprocessor(65536, 64, 32, 228 * _KIB, _KIB, 128, tensor_columns=512),
    "sm_120": Multiprocessor(65536, 48, 24, 100 * _KIB, _KIB, 128),
    "gfx942": Multiprocessor(131072, 32, 32, 64 * _KIB, 0, 512, warp_size=64),
}


def blocks_at_once(
    chip: Multiprocessor, *, warps: int, registers: int, shared_memory: int, tensor_columns: int = 0
) -> int:
    """Blocks that fit at the same time; 0: not even one.

    Args:
        chip: the multiprocessor.
        warps: warps of a block.
        registers: registers of a thread.
        shared_memory: bytes of shared memory of a block.
        tensor_columns: columns of tensor memory of a block.
    """
    warp_registers = max(1, _round_up(registers, _REGISTER_UNIT)) * chip.warp_size
    warps_by_registers = _PARTITIONS * (chip.registers // _PARTITIONS // warp_registers)
    limits = [min(warps_by_registers, chip.warps) // warps, chip.blocks]
    block_memory = _round_up(shared_memory + chip.reserved, chip.shared_unit)
    if block_memory:
        limits.append(chip.shared_memory // block_memory)
    if tensor_columns:
        limits.append(chip.tensor_columns // tensor_columns)
    return min(limits)


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
