"""Tiles of the attention kernels: data, by kernel, element size, head size and target.

A row is chosen by the first target family whose name matches. What bounds the numbers:

- registers: the sums of a program are fp32, BLOCK_M · D numbers forward and for dQ, BLOCK_N · (D + Dv) for dK and dV;
  with scores and weights they must fit 255 registers of 32 · num_warps threads. No configuration spills on any target,
  whatever the arguments: the ahead-of-time check compiles them all.
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


FORWARD, QUERY_GRADIENT, KEY_GRADIENTS = "forward", "query_gradient", "key_gradients"


def _tiles(rows: int, keys: int, num_warps: int, num_stages: int) -> Tiles:
    return Tiles(rows, keys, Options(num_warps, num_stages))


# kernel -> target -> element size -> largest head size, up to a power of 2 -> tiles. "" is every other target.
CONFIGS: dict[str, dict[str, dict[int, dict[int, Tiles]]]] = {
    FORWARD: {
        "": {
            2: {64: _tiles(128, 64, 4, 3), 128: _tiles(128, 64, 8, 2), 256: _tiles(64, 32, 4, 2)},
            4: {64: _tiles(64, 32, 4, 2), 128: _tiles(64, 32, 8, 1), 256: _tiles(32, 16, 8, 1)},
        },
    },
    QUERY_GRADIENT: {
        "": {
            2: {64: _tiles(64, 64, 4, 2), 128: _tiles(64, 64, 8, 1), 256: _tiles(32, 32, 8, 1)},
            4: {64: _tiles(64, 32, 8, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(16, 16, 8, 1)},
        },
    },
    KEY_GRADIENTS: {
        "": {
            2: {64: _tiles(64, 64, 4, 2), 128: _tiles(32, 64, 8, 1), 256: _tiles(32, 32, 8, 1)},
            4: {64: _tiles(32, 32, 4, 1), 128: _tiles(32, 32, 8, 1), 256: _tiles(16, 16, 8, 1)},
        },
    },
}


def choose(kernel: str, target: Target, element_size: int, block_d: int) -> Tiles:
    """The tiles of a kernel, for a target, numbers of `element_size` bytes and a head size up to a power of 2."""
    by_target = CONFIGS[kernel]
    family = next((name for name in (target.name, target.backend, "") if name in by_target), "")
    return by_target[family][element_size][max(64, block_d)]
