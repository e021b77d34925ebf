"""Matrix products of a head on a GPU: operands in the head's dtype, results in fp32.

Tensor cores multiply 16-bit operands into an fp32 accumulator. `out_dtype` of torch.mm hands that accumulator out as it
is, so logits are never rounded to 16 bits, and no copy of the weight is made. Builds of torch without it (before 2.8,
some for ROCm, and the CPU, where kernels are tested) multiply fp32 copies of parts of the weight instead: the same
results, more slowly. fp32 operands follow torch's setting for TF32.

    head_logits   out = h Wᵀ          pull_back   g W, or out += g W          add_outer   out += gᵀ h
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

_COPY = 64 * 2**20  # bytes of an fp32 copy of a part
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def head_logits(out: Tensor, hidden: Tensor, weight: Tensor) -> None:
    """out [n, V] fp32 = hidden [n, d] Wᵀ."""
    if _direct(hidden, weight):
        _multiply(hidden, weight.mT, out)
        return
    wide = hidden.float()
    for rows in _parts(weight.shape[0], weight.shape[1]):
        torch.mm(wide, weight[rows].float().mT, out=out[:, rows])


def pull_back(gradient: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """gradient [n, V] W -> [n, d] fp32, or added to `out`."""
    if _direct(gradient, weight):
        if out is not None:
            return _add(out, gradient, weight)
        return _multiply(gradient, weight, gradient.new_empty(gradient.shape[0], weight.shape[1], dtype=torch.float32))
    if out is None:
        out = gradient.new_zeros(gradient.shape[0], weight.shape[1], dtype=torch.float32)
    for rows in _parts(weight.shape[0], weight.shape[1]):
        out.addmm_(gradient[:, rows].float(), weight[rows].float())
    return out


def add_outer(out: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """out [V, d] fp32 += gradient [n, V]ᵀ hidden [n, d], both of the same dtype."""
    if _direct(gradient, hidden):
        _add(out, gradient.mT, hidden)
        return
    wide = hidden.float()
    for rows in _parts(out.shape[0], gradient.shape[0]):
        out[rows].addmm_(gradient[:, rows].float().mT, wide)


def split(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """fp32 as a sum of two parts in 16 bits, with 16 bits of mantissa together (bf16)."""
    high = tensor.to(dtype)
    return high, (tensor - high.float()).to(dtype)


def _direct(left: Tensor, right: Tensor) -> bool:
    """Whether the operands can be multiplied as they are."""
    if left.dtype != right.dtype:
        return False
    return left.dtype == torch.float32 or (left.dtype in SIXTEEN_BITS and _accumulators(left.device) != "none")


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    if left.dtype == torch.float32:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=torch.float32, out=out)


def _add(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    if left.dtype == torch.float32:
        return out.addmm_(left, right)
    if _accumulators(out.device) == "added":
        return torch.addmm(out, left, right, out_dtype=torch.float32, out=out)
    # In parts of the result, so that what is added is small.
    for rows in _parts(out.shape[0], out.shape[1]):
        out[rows] += torch.mm(left[rows], right, out_dtype=torch.float32)
    return out


@cache
def _accumulators(device: torch.device) -> str:
    """What torch does with fp32 results of 16-bit operands on a device: "none", "given" out, or "added" to fp32 too.

    Asked by trying: what is refused is refused before anything is launched.
    """
    if device.type == "meta":
        return "added"
    operand = torch.zeros(16, 16, dtype=torch.bfloat16, device=device)
    result = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        torch.mm(operand, operand, out_dtype=torch.float32, out=result)
    except (RuntimeError, TypeError):
        return "none"
    try:
        torch.addmm(result, operand, operand, out_dtype=torch.float32, out=result)
    except (RuntimeError, TypeError):
        return "given"
    return "added"


def _parts(rows: int, columns: int) -> Iterator[slice]:
    """Rows whose copies in fp32 stay within bounds."""
    step = max(1, _COPY // (4 * max(1, columns)))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
