"""Tiles of the attention kernels: data, by kernel, element size, head size and target.

What bounds the numbers:

- registers: the sums of a program are fp32, BLOCK_M · D numbers forward and for dQ, BLOCK_N · (D + Dv) for dK and dV;
  with scores and weights they must fit 255 registers of 32 · num_warps threads. No configuration spills in the
  examples that the ahead-of-time check compiles, which reach each of them.
- shared memory: num_stages tiles of keys and values (of queries and dO for dK and dV), with what wgmma reads from it.
- wgmma wants 64 rows a warp group, so 4 warps for 64 rows and 8 for 128.
"""

from dataclasses import dataclass

from softprompt_kernels.kernels.triton.launch import Options
from softprompt_kernels.kernels.triton.targets import Target


@dataclass(frozen=True)
class Tiles:
    """BLOCK_M rows by BLOCK_N keys."""

    rows: int
    keys: int
    options: Options


Candidates = tuple[Tiles, ...]  # the shipped one, and then what tuning on the device may choose instead

FORWARD, QUERY_GRADIENT, KEY_GRADIENTS = "forward", "query_gradient", "key_gradients"


def _tiles(rows: int, keys: int, num_warps: int, num_stages: int, maxnreg: int | None = None) -> Tiles:
    return Tiles(rows, keys, Options(num_warps, num_stages, maxnreg))


# Without tensor cores fp32 operands of a product lie in registers, and the assembler, left to itself, spills rather
# than give a thread more of them. Heads above 128 are served in TF32 alone: no tile of theirs fits otherwise.
_FLOAT32: dict[str, dict[int, Candidates]] = {
    FORWARD: {
        64: (_tiles(64, 32, 8, 1, 255),),
        128: (_tiles(32, 16, 8, 1, 255),),
        256: (_tiles(32, 16, 4, 1),),
    },
    QUERY_GRADIENT: {
        64: (_tiles(32, 32, 8, 1, 255),),
        128: (_tiles(16, 16, 8, 1, 255),),
        256: (_tiles(16, 16, 4, 1),),
    },
    KEY_GRADIENTS: {
        64: (_tiles(32, 32, 8, 1, 255),),
        128: (_tiles(32, 32, 8, 1, 255),),
        256: (_tiles(16, 16, 4, 1),),
    },
}

_MMA_SYNC = ("sm_80", "sm_86", "sm_89", "sm_120")  # whose tensor cores take operands from registers

# kernel -> target, or what it multiplies by, or its maker, or "" for every other -> element size -> largest head size
# (up to a power of 2) -> tiles
CONFIGS: dict[str, dict[str, dict[int, dict[int, Candidates]]]] = {
    FORWARD: {
        "": {
            2: {
                64: (_tiles(128, 64, 8, 3), _tiles(64, 64, 4, 3)),
                128: (_tiles(128, 64, 8, 2), _tiles(128, 32, 8, 3)),
                256: (_tiles(64, 32, 8, 2),),
            },
            4: _FLOAT32[FORWARD],
        },
        "sm_90": {
            2: {
                64: (_tiles(128, 64, 4, 3), _tiles(128, 64, 8, 2), _tiles(64, 64, 4, 3)),
                128: (_tiles(128, 64, 8, 2), _tiles(128, 32, 8, 3), _tiles(64, 64, 4, 2)),
                256: (_tiles(64, 32, 8, 2),),
            },
            4: _FLOAT32[FORWARD],
        },
        # mma.sync has a warp's whole tile of keys in registers.
        "mma.sync": {
            2: {
                64: (_tiles(128, 64, 8, 2),),
                128: (_tiles(64, 32, 4, 2), _tiles(64, 32, 8, 2, 255)),
                256: (_tiles(32, 32, 8, 2),),
            },
            4: _FLOAT32[FORWARD],
        },
        "hip": {
            2: {64: (_tiles(128, 64, 4, 1),), 128: (_tiles(64, 64, 4, 1),), 256: (_tiles(64, 32, 4, 1),)},
            4: {64: (_tiles(64, 32, 4, 1),), 128: (_tiles(32, 32, 4, 1),), 256: (_tiles(16, 16, 4, 1),)},
        },
    },
    QUERY_GRADIENT: {
        "": {
            2: {
                64: (_tiles(64, 64, 4, 2), _tiles(128, 64, 8, 2)),
                128: (_tiles(64, 64, 8, 2), _tiles(64, 32, 8, 2)),
                256: (_tiles(32, 32, 8, 1),),
            },
            4: _FLOAT32[QUERY_GRADIENT],
        },
        "sm_100": {
            2: {
                64: (_tiles(64, 64, 4, 2), _tiles(128, 64, 8, 2)),
                128: (_tiles(64, 64, 8, 1),),
                256: (_tiles(32, 32, 8, 1),),
            },
            4: _FLOAT32[QUERY_GRADIENT],
        },
        "mma.sync": {
            2: {64: (_tiles(128, 32, 8, 2),), 128: (_tiles(64, 32, 8, 2),), 256: (_tiles(32, 32, 8, 1),)},
            4: _FLOAT32[QUERY_GRADIENT],
        },
        "hip": {
            2: {64: (_tiles(64, 64, 4, 1),), 128: (_tiles(64, 32, 4, 1),), 256: (_tiles(32, 32, 4, 1),)},
            4: {64: (_tiles(32, 32, 4, 1),), 128: (_tiles(32, 16, 4, 1),), 256: (_tiles(16, 16, 4, 1),)},
        },
    },
    KEY_GRADIENTS: {
        "": {
            2: {64: (_tiles(32, 128, 8, 2),), 128: (_tiles(64, 64, 8, 1),), 256: (_tiles(32, 32, 8, 1),)},
            4: _FLOAT32[KEY_GRADIENTS],
        },
        "sm_90": {
            2: {64: (_tiles(32, 128, 8, 2),), 128: (_tiles(16, 64, 8, 2),), 256: (_tiles(32, 32, 8, 1),)},
            4: _FLOAT32[KEY_GRADIENTS],
        },
        "hip": {
            2: {64: (_tiles(64, 64, 4, 1),), 128: (_tiles(32, 64, 4, 1),), 256: (_tiles(16, 32, 4, 1),)},
            4: {64: (_tiles(32, 32, 4, 1),), 128: (_tiles(16, 32, 4, 1),), 256: (_tiles(16, 16, 4, 1),)},
        },
    },
}


# Of 16-bit numbers on NVIDIA's GPUs, where a sequence has at most MOST_FEW_ROWS rows.
MOST_FEW_ROWS = {FORWARD: 64, QUERY_GRADIENT: 32, KEY_GRADIENTS: 32}
FEW_ROWS: dict[str, dict[int, Candidates]] = {
    FORWARD: {64: (_tiles(32, 64, 4, 2),), 128: (_tiles(32, 64, 4, 2),), 256: (_tiles(32, 32, 4, 1),)},
    QUERY_GRADIENT: {64: (_tiles(32, 32, 4, 2),), 128: (_tiles(32, 32, 8, 1),), 256: (_tiles(16, 32, 4, 1),)},
    KEY_GRADIENTS: {64: (_tiles(32, 64, 8, 1, 255),), 128: (_tiles(32, 64, 8, 1, 255),), 256: (_tiles(16, 32, 8, 1),)},
}


def candidates(kernel: str, target: Target, element_size: int, block_d: int, rows: int) -> Candidates:
    """The tiles of a kernel.

    For a target, numbers of `element_size` bytes, a head size up to a power of 2 and the rows of a sequence.
    """
    block_d = max(64, block_d)
    if element_size == 2 and target.backend == "cuda" and rows <= MOST_FEW_ROWS[kernel]:
        return FEW_ROWS[kernel][block_d]
    by_target = CONFIGS[kernel]
    names = [target.name, "mma.sync"] if target.name in _MMA_SYNC else [target.name, target.backend]
    family = next((name for name in names if name in by_target), "")
    return by_target[family][element_size][block_d]
