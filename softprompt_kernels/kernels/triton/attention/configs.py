"""Tile configurations of the attention kernels: data, by kernel, target, element size and head size.

What limits the numbers:

- registers: a program's accumulators are fp32, BLOCK_M · D numbers for the forward and dQ, BLOCK_N · (D + Dv) for dK
  and dV. Together with scores and weights they must fit 255 registers of 32 · num_warps threads. The ahead-of-time
  check compiles examples that reach every configuration, and none of them spills.
- shared memory: num_stages tiles of keys and values (of queries and dO for dK and dV), and the operands of wgmma.
- wgmma takes 64 rows per warp group: 4 warps for 64 rows, 8 for 128.
"""

from softprompt_kernels.kernels.triton.launch import Options, TileConfig
from softprompt_kernels.kernels.triton.targets import Target

Candidates = tuple[TileConfig, ...]  # the shipped one first, then those that tuning on the device may choose instead

FORWARD, BACKWARD_DQ, BACKWARD_DKDV = "forward", "backward_dq", "backward_dkdv"


def _tiles(block_m: int, block_n: int, num_warps: int, num_stages: int, maxnreg: int | None = None) -> TileConfig:
    """BLOCK_M rows by BLOCK_N keys."""
    return TileConfig(block_m, block_n, Options(num_warps, num_stages, maxnreg))


# Without tensor cores the fp32 operands of a dot are in registers. Unless maxnreg says otherwise, the assembler spills
# instead of giving a thread more registers. Heads above 128 run in TF32 only: without it no tile of them fits.
_FLOAT32: dict[str, dict[int, Candidates]] = {
    FORWARD: {
        64: (_tiles(64, 32, 8, 1, 255),),
        128: (_tiles(32, 16, 8, 1, 255),),
        256: (_tiles(32, 16, 4, 1),),
    },
    BACKWARD_DQ: {
        64: (_tiles(32, 32, 8, 1, 255),),
        128: (_tiles(16, 16, 8, 1, 255),),
        256: (_tiles(16, 16, 4, 1),),
    },
    BACKWARD_DKDV: {
        64: (_tiles(32, 32, 8, 1, 255),),
        128: (_tiles(32, 32, 8, 1, 255),),
        256: (_tiles(16, 16, 4, 1),),
    },
}

_MMA_SYNC = ("sm_80", "sm_86", "sm_89", "sm_120")  # targets whose tensor cores take operands from registers

# kernel -> target, its matrix instruction or its backend, or "" for all others -> bytes of an element -> head size
# rounded up to a power of 2 -> tiles
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
        # With mma.sync a warp holds its whole key tile in registers.
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
    BACKWARD_DQ: {
        "": {
            2: {
                64: (_tiles(64, 64, 4, 2), _tiles(128, 64, 8, 2)),
                128: (_tiles(64, 64, 8, 2), _tiles(64, 32, 8, 2)),
                256: (_tiles(32, 32, 8, 1),),
            },
            4: _FLOAT32[BACKWARD_DQ],
        },
        "sm_100": {
            2: {
                64: (_tiles(64, 64, 4, 2), _tiles(128, 64, 8, 2)),
                128: (_tiles(64, 64, 8, 1),),
                256: (_tiles(32, 32, 8, 1),),
            },
            4: _FLOAT32[BACKWARD_DQ],
        },
        "mma.sync": {
            2: {64: (_tiles(128, 32, 8, 2),), 128: (_tiles(64, 32, 8, 2),), 256: (_tiles(32, 32, 8, 1),)},
            4: _FLOAT32[BACKWARD_DQ],
        },
        "hip": {
            2: {64: (_tiles(64, 64, 4, 1),), 128: (_tiles(64, 32, 4, 1),), 256: (_tiles(32, 32, 4, 1),)},
            4: {64: (_tiles(32, 32, 4, 1),), 128: (_tiles(32, 16, 4, 1),), 256: (_tiles(16, 16, 4, 1),)},
        },
    },
    BACKWARD_DKDV: {
        "": {
            2: {64: (_tiles(32, 128, 8, 2),), 128: (_tiles(64, 64, 8, 1),), 256: (_tiles(32, 32, 8, 1),)},
            4: _FLOAT32[BACKWARD_DKDV],
        },
        "sm_90": {
            2: {64: (_tiles(32, 128, 8, 2),), 128: (_tiles(16, 64, 8, 2),), 256: (_tiles(32, 32, 8, 1),)},
            4: _FLOAT32[BACKWARD_DKDV],
        },
        "hip": {
            2: {64: (_tiles(64, 64, 4, 1),), 128: (_tiles(32, 64, 4, 1),), 256: (_tiles(16, 32, 4, 1),)},
            4: {64: (_tiles(32, 32, 4, 1),), 128: (_tiles(16, 32, 4, 1),), 256: (_tiles(16, 16, 4, 1),)},
        },
    },
}


# For 16-bit dtypes on NVIDIA GPUs, where a sequence has at most FEW_ROWS_LIMIT rows.
FEW_ROWS_LIMIT = {FORWARD: 64, BACKWARD_DQ: 32, BACKWARD_DKDV: 32}
FEW_ROWS: dict[str, dict[int, Candidates]] = {
    FORWARD: {64: (_tiles(32, 64, 4, 2),), 128: (_tiles(32, 64, 4, 2),), 256: (_tiles(32, 32, 4, 1),)},
    BACKWARD_DQ: {64: (_tiles(32, 32, 4, 2),), 128: (_tiles(32, 32, 8, 1),), 256: (_tiles(16, 32, 4, 1),)},
    BACKWARD_DKDV: {64: (_tiles(32, 64, 8, 1, 255),), 128: (_tiles(32, 64, 8, 1, 255),), 256: (_tiles(16, 32, 8, 1),)},
}


def candidates(kernel: str, target: Target, element_size: int, block_d: int, rows: int) -> Candidates:
    """The tile configurations of a kernel on a target, the shipped one first.

    Args:
        kernel: FORWARD, BACKWARD_DQ or BACKWARD_DKDV.
        target: the GPU architecture.
        element_size: bytes of an element of query, key and value.
        block_d: the larger of D and Dv, rounded up to a power of 2.
        rows: rows of a sequence, M · g.
    """
    block_d = max(64, block_d)
    if element_size == 2 and target.backend == "cuda" and rows <= FEW_ROWS_LIMIT[kernel]:
        return FEW_ROWS[kernel][block_d]
    by_target = CONFIGS[kernel]
    names = [target.name, "mma.sync"] if target.name in _MMA_SYNC else [target.name, target.backend]
    family = next((name for name in names if name in by_target), "")
    return by_target[family][element_size][block_d]
