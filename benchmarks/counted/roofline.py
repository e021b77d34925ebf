"""From counts to a bound: the time that no kernel with these counts can beat on a GPU. Nothing here is measured.

    bound = max(bytes / bandwidth, FLOP / rate of the dtype's products, exponentials / rate of the special functions)

Rates are the vendor's dense peaks (SXM, 80 GB A100; H100; B200), exponentials 16 a clock and multiprocessor. Real
kernels reach 60 to 90 % of such a bound.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Published peaks, a second."""

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
    """Seconds, and which resource sets them."""

    seconds: float
    by: str  # memory, products, exponentials


def bound(gpu: str, dtype: str, *, bytes_moved: float, flop: float, exponentials: float = 0.0) -> Bound:
    """The bound on a GPU of `GPUS`, for products of `dtype` (bf16, fp16, tf32, fp32)."""
    peaks = GPUS[gpu]
    needs = {
        "memory": bytes_moved / peaks.bandwidth,
        "products": flop / peaks.flop[dtype],
        "exponentials": exponentials / peaks.exponentials,
    }
    by = max(needs, key=lambda name: needs[name])
    return Bound(needs[by], by)
