"""The roofline bound: from counts to the time that no kernel with these counts can beat on a GPU. Nothing is measured.

    bound = max(bytes / bandwidth, FLOP / GEMM rate of the dtype, exponentials / rate of the special function units)

Rates are the vendor's dense peaks (A100 SXM 80 GB, H100 SXM, B200), and 16 exponentials a clock and multiprocessor.
Real kernels reach 60 to 90 % of such a bound.
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
    "H100": Gpu(3.35e12, {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}, 132 * 16 * 1.83e9),
    "B200": Gpu(8.0e12, {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1125e12, "fp32": 75e12}, 148 * 16 * 1.85e9),
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
