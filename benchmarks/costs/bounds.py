"""From pieces to the time that no machine with the published rates can beat. Real stages take longer.

    bound of a piece = max(FLOP / GEMM rate, bytes / memory bandwidth, exponentials / their rate, exchange / link)

| link | bytes per second and direction, from |
|---|---|
| within a machine of 8 GPUs | NVLink of an H100: half of 900 GB/s, NVIDIA H100 datasheet |
| between machines | one port of 400 Gb/s for each GPU: 50 GB/s, NVIDIA ConnectX-7 datasheet |

A base whose weights do not fit into one GPU beside the context is sharded over the GPUs of a machine, layer by layer:
every pass over the weights receives what a rank does not hold. A sum over G ranks moves 2(G − 1)/G of its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.costs.stages import Job, Model, Piece, stages
from benchmarks.counted.roofline import GPUS

GPU, MEMORY = "H100", 80e9
NVLINK, NETWORK = 450e9, 50e9
A_MACHINE = 8
FREE_SHARE = 0.8  # of a GPU's memory; the rest is for activations


@dataclass(frozen=True)
class Estimate:
    """The bound of a stage, in seconds, and what sets most of it."""

    seconds: float
    by: str


def sharded(model: Model, context: int, gpus: int) -> bool:
    """Whether the weights have to be sharded, because they do not fit into one GPU beside the context."""
    return gpus > 1 and model.weight_bytes + model.kv_bytes * context > FREE_SHARE * MEMORY


def fits(model: Model, context: int, gpus: int) -> bool:
    """Whether weights, sharded or not, and the keys and values of the whole context fit into each GPU."""
    held = model.weight_bytes / (min(gpus, A_MACHINE) if sharded(model, context, gpus) else 1)
    return held + model.kv_bytes * context <= FREE_SHARE * MEMORY


def estimate(model: Model, job: Job, gpus: int) -> dict[str, Estimate]:
    """The bound of each stage on so many H100."""
    shard = sharded(model, job.context, gpus)
    found = {}
    for name, pieces in stages(model, job, gpus).items():
        needs = [_needs(model, piece, gpus, shard) for piece in pieces]
        largest = [max(need, key=lambda by: need[by]) for need in needs]
        seconds = [need[by] for need, by in zip(needs, largest, strict=True)]
        found[name] = Estimate(sum(seconds), largest[seconds.index(max(seconds))] if seconds else "")
    return found


def _needs(model: Model, piece: Piece, gpus: int, shard: bool) -> dict[str, float]:
    peaks, near = GPUS[GPU], min(gpus, A_MACHINE)
    received = piece.weight_passes * model.layer_bytes * (near - 1) / near if shard else 0.0
    summed = 2 * piece.summed_bytes * (gpus - 1) / gpus
    return {
        "GEMM": piece.flop / peaks.flop[piece.dtype],
        "memory": piece.bytes_moved / peaks.bandwidth,
        "exponentials": piece.exponentials / peaks.exponentials,
        "exchange": received / NVLINK + summed / (NVLINK if gpus <= A_MACHINE else NETWORK),
    }
