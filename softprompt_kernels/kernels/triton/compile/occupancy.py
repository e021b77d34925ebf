"""How many blocks of a kernel one multiprocessor holds at once: the least that any of its resources allows.

    registers   each warp is given them in units of 8 a thread, from one of 4 partitions of the register file
    shared      each block is given it in units, with some more that the system reserves
    slots       of warps, and of blocks
    tensor      memory of sm_100, in columns

Figures are the vendors'. More blocks hide more latency; one block is what a large tile is content with.
"""

from dataclasses import dataclass

_PARTITIONS = 4  # SIMDs of a compute unit, sub-partitions of a multiprocessor
_REGISTER_UNIT = 8  # a thread


@dataclass(frozen=True)
class Multiprocessor:
    """What one multiprocessor (compute unit) has to give to its blocks."""

    registers: int  # of 32 bits
    warps: int
    blocks: int
    shared_memory: int  # bytes
    reserved: int  # bytes of it a block, by the system
    shared_unit: int  # bytes
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
    """Blocks of `warps` warps that fit together, with so many registers a thread and bytes a block; 0: not even one."""
    each = max(1, _round_up(registers, _REGISTER_UNIT)) * chip.warp_size
    by_registers = _PARTITIONS * (chip.registers // _PARTITIONS // each)
    limits = [min(by_registers, chip.warps) // warps, chip.blocks]
    taken = _round_up(shared_memory + chip.reserved, chip.shared_unit)
    if taken:
        limits.append(chip.shared_memory // taken)
    if tensor_columns:
        limits.append(chip.tensor_columns // tensor_columns)
    return min(limits)


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
