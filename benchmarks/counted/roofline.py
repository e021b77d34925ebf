"""The roofline bound: from counts to the time that no kernel with these counts can beat on a chip. Nothing is measured.

    bound = max(bytes / bandwidth, FLOP / GEMM rate of the dtype, exponentials / rate of the special function units)

Rates are dense peaks that the maker published. Real kernels reach 60 to 90 % of such a bound.

| chip | bytes and FLOP per second from |
|---|---|
| A100 SXM, 80 GB | NVIDIA A100 Tensor Core GPU datasheet, column "A100 80GB SXM" |
| H100 SXM | NVIDIA H100 Tensor Core GPU datasheet, column "H100 SXM"; half of its rates with sparsity |
| H200 SXM | NVIDIA H200 Tensor Core GPU datasheet, column "H200 SXM"; half of its rates with sparsity |
| B200 | NVIDIA DGX B200 datasheet: an eighth of the system's rates, and half where they are with sparsity |
| MI300X | AMD Instinct MI300X data sheet, without sparsity |

The datasheets do not tell the exponentials: 16 a clock and multiprocessor (NVIDIA, CUDA C++ Programming Guide, table of
arithmetic throughput) or compute unit (AMD, a quarter of its 64 lanes), times the clock of the fp32 rate: that rate
over 128 (A100) or 256 FLOP a clock and multiprocessor.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Published peak rates, per second."""

    bandwidth: float  # bytes
    flop: dict[str, float]  # by dtype of the operands
    exponentials: float


GPUS = {
    "A100": Gpu(2.039e12, {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12}, 108 * 16 * 1.41e9),
    "H100": Gpu(3.35e12, {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}, 132 * 16 * 1.98e9),
    "H200": Gpu(4.8e12, {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}, 132 * 16 * 1.98e9),
    "B200": Gpu(8.0e12, {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1125e12, "fp32": 75e12}, 148 * 16 * 1.98e9),
    "MI300X": Gpu(5.3e12, {"bf16": 1307.4e12, "fp16": 1307.4e12, "tf32": 653.7e12, "fp32": 163.4e12}, 304 * 16 * 2.1e9),
}


@dataclass(frozen=True)
class Bound:
    """A lower bound of the time, and the resource that sets it."""

    seconds: float
    by: str  # memory, GEMM or exponentials


def bound(gpu: str, dtype: str, *, bytes_moved: float, flop: float, exponentials: float = 0.0) -> Bound:
    """The bound on a GPU of `GPUS`, for GEMMs of `dtype` (bf16, fp16, tf32, fp32)."""

    peaks = GPUS[gpu]
    needs = {
        "memory": bytes_moved / peaks.bandwidth,
        "GEMM": flop / peaks.flop[dtype],
        "exponentials": exponentials / peaks.exponentials,
    }
    by = max(needs, key=lambda name: needs[name])
    return Bound(needs[by], by)
