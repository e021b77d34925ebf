"""GEMM with fp32 accuracy, for the processors on which it is faster than PyTorch's.

- Matrix unit (AMX): it takes about 0.6 of the time of PyTorch's fp32 GEMM, which runs on vectors, and less than half of
  that time with a right matrix of 16 bits. An infinity in a row or column makes NaN of the sums of that row or column.
- AVX-512 on processors that are not Intel's: MKL does not use AVX-512 there. It takes about half of MKL's time on AMD's
  Zen 5, the only such processor that was measured.

A right matrix of 16 bits is read as it is. No fp32 copy of the whole matrix is made. The kernels are in
`csrc/cpu/gemm/gemm_amx.cpp` and `gemm_avx512.cpp`.
"""

import torch
from torch import Tensor

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.host.gemm import TORCH, Gemm
from softprompt_kernels.kernels.problems.tensors import DTYPES
from softprompt_kernels.kernels.ranges import kernel_range


def has_gemm() -> bool:
    """Whether `gemm_` can be called on this machine."""
    return not native.missing() and bool(native.module().has_gemm())


def has_fast_gemm() -> bool:
    """Whether `gemm_` is faster than PyTorch's GEMM on this machine."""
    return not native.missing() and bool(native.module().has_fast_gemm())


def fastest_gemm() -> Gemm:
    """The faster of `gemm_` and PyTorch's GEMM on this machine, for the losses."""
    if not has_fast_gemm():
        return TORCH
    on_matrix_unit = native.instruction_set() == "amx"
    # weight_cost was measured on the matrix unit with whole losses at d = 576: there chunks of 128 tokens that keep
    # their logits take as long as 512 tokens that stream the vocabulary. It was measured on vectors with 24 to 160 rows
    # of d = 576 and 896.
    return Gemm(
        _multiply,
        mixed=True,
        weight_cost=90 if on_matrix_unit else 25,
        max_columns=2048,
        max_depth=2048,
        copies_result=False,
        workspace=(4 + torch.get_num_threads()) * 2**20,
    )


def _multiply(out: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
    readable = _is_row_major(right) or _is_row_major(right.mT)
    with kernel_range("gemm", *out.shape, left.shape[1]):
        gemm_(out, left, right if readable else right.contiguous(), accumulate)


def gemm_(out: Tensor, left: Tensor, right: Tensor, accumulate: bool = False) -> Tensor:
    """out [n, m] = left [n, k] right [k, m]; with `accumulate`, out += left right.

    `out` and `left` are fp32 with a last stride of 1. `right` is fp32, bf16 or fp16 and has a stride of 1 in either
    dimension: it may be row-major, or the transpose of a row-major matrix.

    Raises:
        ValueError: the shapes, dtypes or strides are others, or this machine has neither AMX nor AVX-512.
    """
    rows, depth = left.shape
    columns = right.shape[1]
    if right.shape[0] != depth or out.shape != (rows, columns):
        raise ValueError(f"out must be [n, m] for [n, k] and [k, m]; got {out.shape}, {left.shape} and {right.shape}")
    if out.dtype != torch.float32 or left.dtype != torch.float32 or right.dtype not in DTYPES:
        raise ValueError(
            "out and left must be float32 and right float32, bfloat16 or float16; got "
            f"{out.dtype}, {left.dtype} and {right.dtype}"
        )
    transposed = not _is_row_major(right)
    if not (_is_row_major(out) and _is_row_major(left)) or (transposed and not _is_row_major(right.mT)):
        raise ValueError(
            "out and left must have a last stride of 1 and right a stride of 1 in either dimension; got strides "
            f"{out.stride()}, {left.stride()} and {right.stride()}"
        )
    native.module().gemm(
        out=out.data_ptr(),
        left=left.data_ptr(),
        right=right.data_ptr(),
        rows=rows,
        depth=depth,
        columns=columns,
        out_stride=out.stride(0),
        left_stride=left.stride(0),
        right_stride=right.stride(1 if transposed else 0),
        right_dtype=DTYPES[right.dtype],
        right_transposed=transposed,
        accumulate=accumulate,
        threads=torch.get_num_threads(),
    )
    return out


def _is_row_major(matrix: Tensor) -> bool:
    return matrix.stride(1) == 1 or matrix.shape[1] <= 1
