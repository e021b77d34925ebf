"""The GEMMs of a head on a GPU: operands in the head's dtype, results in fp32.

Tensor cores multiply 16-bit operands into an fp32 accumulator. With `out_dtype`, torch.mm returns that accumulator
without rounding, so logits are never rounded to 16 bits, and the weight is not copied. Some builds of torch do not have
it: those before 2.8, some for ROCm, and the CPU, where kernels are tested. There, parts of the weight are copied to
fp32 and multiplied: the same results, more slowly. fp32 operands follow torch's setting for TF32.

    head_logits   out = h Wᵀ          pull_back   g W, or out += g W          add_outer   out += gᵀ h
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from softprompt_kernels.kernels.ranges import kernel_range

_COPY = 64 * 2**20  # bytes of an fp32 copy of a part of the weight
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def head_logits(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out [n, V] fp32 = hidden [n, d] Wᵀ."""
    with kernel_range("head_logits", *out.shape, hidden.shape[1]):
        if _takes_operands(hidden, weight):
            _multiply(hidden, weight.mT, out)
            return
        wide = hidden.float()
        for rows in _parts(weight.shape[0], weight.shape[1]):
            torch.mm(wide, weight[rows].float().mT, out=out[:, rows])


def pull_back(gradient: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """gradient [n, V] W -> [n, d] fp32; with `out`, added to that."""
    with kernel_range("pull_back", gradient.shape[0], weight.shape[1], gradient.shape[1]):
        if _takes_operands(gradient, weight):
            if out is not None:
                return _add(out, gradient, weight)
            return _multiply(
                gradient, weight, gradient.new_empty(gradient.shape[0], weight.shape[1], dtype=torch.float32)
            )
        if out is None:
            out = gradient.new_zeros(gradient.shape[0], weight.shape[1], dtype=torch.float32)
        for rows in _parts(weight.shape[0], weight.shape[1]):
            out.addmm_(gradient[:, rows].float(), weight[rows].float())
        return out


def add_outer(out: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """out [V, d] fp32 += gradient [n, V]ᵀ hidden [n, d], both of the same dtype."""
    with kernel_range("add_outer", *out.shape, hidden.shape[0]):
        if _takes_operands(gradient, hidden):
            _add(out, gradient.mT, hidden)
            return
        wide = hidden.float()
        for rows in _parts(out.shape[0], gradient.shape[0]):
            out[rows].addmm_(gradient[:, rows].float().mT, wide)


def split(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An fp32 tensor as a sum of two 16-bit tensors, which together have 16 bits of mantissa (bf16)."""
    high = tensor.to(dtype)
    return high, (tensor - high.float()).to(dtype)


def _takes_operands(left: Tensor, right: Tensor) -> bool:
    """Whether torch can multiply the operands without copies to fp32."""
    if left.dtype != right.dtype:
        return False
    return left.dtype == torch.float32 or (left.dtype in SIXTEEN_BITS and _fp32_results(left.device) != "none")


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _add(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if left.dtype == torch.float32:
        return out.addmm_(left, right)
    if _fp32_results(out.device) == "accumulate":
        return torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    # In parts of the result, to keep the temporary small.
    for rows in _parts(out.shape[0], out.shape[1]):
        out[rows] += torch.mm(left[rows], right, out_dtype=torch.float32)
    return out


@cache
def _fp32_results(device: torch.device) -> str:
    """Which fp32 results of 16-bit operands torch supports on a device: "none", "write" only, or "accumulate" too.

    Found out by trying. Torch refuses before it launches anything.
    """
    if device.type == "meta":
        return "accumulate"
    operand = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    result = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(operand, operand, out_dtype=torch.float32, out=result)
    except (RuntimeError, TypeError):
        return "none"
    try:
        torch.addmm(result, operand, operand, out_dtype=torch.float32, out=result)
    except (RuntimeError, TypeError):
        return "write"
    return "accumulate"


def _parts(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows whose fp32 copies take at most _COPY bytes."""
    step = max(1, _COPY // (4 * max(1, columns)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
