"""Dense products of fp32 accuracy, where they are faster than those that PyTorch makes on a CPU.

On the matrix unit of processors that have one (AMX) they take about 0.6 of the time of PyTorch's fp32 products, which
run on vectors, and less than half of it with a right side of 16 bits; an infinity in a row or column makes NaN of its
sums. On vectors (AVX-512) they are faster on processors of other makers than Intel, where MKL leaves them unused:
about half of its time on AMD's Zen 5, the only one tried. A right side of 16 bits is read as it lies, and never copied
to fp32 as a whole. The kernels stand in `csrc/cpu/gemm/gemm_amx.cpp` and `gemm_avx512.cpp`.
"""

import torch
from torch import Tensor
from torch.profiler import record_function

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.host.gemm import TORCH, Gemm
from softprompt_kernels.kernels.problems.tensors import DTYPES


def has_products() -> bool:
    """Whether `product_` can be called here."""
    return not native.missing() and bool(native.module().has_products())


def has_fast_products() -> bool:
    """Whether its products are the fastest here; where not, PyTorch's are."""
    return not native.missing() and bool(native.module().has_fast_products())


def products() -> Gemm:
    """For the losses: the fastest here."""
    if not has_fast_products():
        return TORCH
    on_tiles = native.instruction_set() == "amx"
    # The weight's rows were measured on tiles with whole losses (chunks of 128 tokens and sweeps of 512 take the same
    # time at d = 576), on vectors with 24 to 160 rows of d = 576 and 896.
    return Gemm(
        _multiply,
        mixed=True,
        weight_cost=90 if on_tiles else 25,
        max_columns=2048,
        max_depth=2048,
        copies_result=False,
        workspace=(4 + torch.get_num_threads()) * 2**20,
    )


def _multiply(out: Tensor, left: Tensor, right: Tensor, accumulate: bool) -> None:
    plain = _is_row_major(right) or _is_row_major(right.mT)
    with record_function("softprompt_kernels::product"):
        product_(out, left, right if plain else right.contiguous(), accumulate)


def product_(out: Tensor, left: Tensor, right: Tensor, accumulate: bool = False) -> Tensor:
    """out [n, m] = left [n, k] right [k, m], or with `accumulate`, out += left right.

    `out` and `left` are fp32 with unit last strides; `right` is fp32, bf16 or fp16 with either stride 1: the transpose
    of a row-major matrix is as good as one.

    Raises:
        ValueError: on this machine, or of this dtype or these strides, there is none.
    """
    rows, depth = left.shape
    columns = right.shape[1]
    if right.shape[0] != depth or out.shape != (rows, columns):
        raise ValueError(f"out must be [n, m] for [n, k] and [k, m]; got {out.shape}, {left.shape} and {right.shape}")
    if out.dtype != torch.float32 or left.dtype != torch.float32 or right.dtype not in DTYPES:
        raise ValueError(
            f"out and left must be float32 and right of 16 or 32 bits; got {out.dtype}, {left.dtype}, {right.dtype}"
        )
    transposed = not _is_row_major(right)
    if not (_is_row_major(out) and _is_row_major(left)) or (transposed and not _is_row_major(right.mT)):
        raise ValueError(
            "out and left must have a last stride of 1 and right any stride of 1; got strides "
            f"{out.stride()}, {left.stride()} and {right.stride()}"
        )
    native.module().product(
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
