"""The row kernels of the losses as launches: which kernel, with which tiles and arguments.

Nothing here reads the values of a tensor, so planning works with tensors on the meta device. Tile configurations are at
the end.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.device.rows import Gradient, Logits, Parts
from softprompt_kernels.kernels.problems.loss import Divergence, ExpectationState
from softprompt_kernels.kernels.triton.launch import Launch, Options, TileConfig, ceil_div, next_power_of_2, run_all
from softprompt_kernels.kernels.triton.runtime import interpreting
from softprompt_kernels.kernels.triton.targets import Target


@dataclass(frozen=True)
class TritonRows:
    """`device.rows.RowKernels` in Triton, for one target."""

    target: Target

    def divergence(
        self,
        logits: Logits,
        vocab: int,
        divergence: Divergence,
        weights: Tensor | None,
        *,
        loss: Tensor | None = None,
        loss_scale: float = 1.0,
        statistics: Tensor | None = None,
        gradient: Gradient | None = None,
    ) -> Launch:
        """See `device.rows.RowKernels`."""
        from softprompt_kernels.kernels.triton.losses.kl_rows import divergence_kernel

        student, teacher, rows = logits.student, logits.teacher, logits.student.shape[0]
        tile = divergence_tile(rows, vocab, self.target)
        out = None if gradient is None else gradient.out
        arguments = {
            "student": student,
            "teacher": teacher,
            "student_bias": logits.student_bias,
            "teacher_bias": logits.teacher_bias,
            "weights": weights,
            "row_scale": None if gradient is None else gradient.row_scale,
            "statistics": statistics,
            "loss": loss,
            "gradient": out,
            "rows": rows,
            "vocab": vocab,
            "columns": 0 if out is None else out.shape[1],
            "student_stride": student.stride(0),
            "student_column_stride": student.stride(1),
            "teacher_stride": teacher.stride(0),
            "teacher_column_stride": teacher.stride(1),
            "gradient_stride": 0 if out is None else out.stride(0),
            "scale": abs(logits.scale),
            "inner": logits.inner or 0.0,
            "beta": divergence.beta,
            "loss_scale": loss_scale,
            "gradient_scale": 1.0 if gradient is None else gradient.scale,
        }
        constants = {
            "KIND": divergence.kind,
            "MEASURE": loss is not None,
            "WRITE": gradient is not None,
            "CAPPED": logits.inner is not None,
            "NEGATED": logits.scale < 0,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "STAGES": tile.options.num_stages,
        }
        return Launch(divergence_kernel, (ceil_div(rows, tile.block_m),), arguments, constants, tile.options)

    def exponentials(
        self,
        product: Tensor,  # [n, columns] fp32, h Wᵀ
        bias: Tensor | None,  # [columns] fp32
        scale: float,  # logits are scale · (product + bias)
        first: int,  # vocabulary index of the tile's first column
        weights: Tensor | None,  # [n]
        state: ExpectationState,
        parts: Parts,
    ) -> Launch:
        """See `device.rows.RowKernels`."""
        from softprompt_kernels.kernels.triton.losses.expectation_rows import exponentials_kernel

        rows, columns = product.shape
        mean = state.mean
        tile = exponentials_tile(rows, columns, self.target)
        arguments = {
            "raw_logits": product,
            "bias": bias,
            "weights": weights,
            "labels": state.labels,
            "row_max": state.row_max,
            "row_sum": state.row_sum,
            "bias_sum": state.bias_sum,
            "label_logit": state.label_logit,
            "mean": mean,
            "high": parts.high,
            "low": parts.low,
            "rows": rows,
            "columns": columns,
            "size": 0 if mean is None else mean.shape[1],
            "raw_logits_stride": product.stride(0),
            "mean_stride": 0 if mean is None else mean.stride(0),
            "high_stride": 0 if parts.high is None else parts.high.stride(0),
            "low_stride": 0 if parts.low is None else parts.low.stride(0),
            "scale": scale,
            "first": first,
            "part_scale": parts.scale,
        }
        constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
        return Launch(exponentials_kernel, (ceil_div(rows, tile.block_m),), arguments, constants, tile.options)

    def run(self, launches: Iterable[Launch], device: torch.device) -> None:
        """See `device.rows.RowKernels`."""
        run_all(launches, device)


# --- configurations ---------------------------------------------------------------------------------------------------


# The numbers come from the machine code for sm_80 to sm_120 and gfx942, where nothing spills. They are not timed yet.
# Besides the tile, the first pass of a divergence keeps 5 sums per column. With 8 columns a thread (16 bytes of a
# 16-bit dtype) that takes 90 to 128 registers (134 once), and a multiprocessor holds two programs of 8 warps. With 16
# columns it takes 140 to 233 registers, and one program fits. With 4, the maximum over a tile costs half as much as the
# rest of it. More programs at a time would not help the later passes: at V = 128256 the rows in flight, two of 1 MB a
# multiprocessor, are already more than the L2 cache holds.
_DIVERGENCE_COLUMNS = 8  # of a thread
_EXPONENTIALS_COLUMNS = 16  # 48 to 64 registers, 4 or 5 programs
_WARPS = 8
_REGISTERS = 128  # of a thread, where a multiprocessor holds two programs of 8 warps
_STAGES = 3  # tiles in flight per program; 16 to 64 KiB of shared memory
_INTERPRETED_ROWS = 64


def divergence_tile(rows: int, vocab: int, target: Target) -> TileConfig:
    """The tile of `divergence_kernel` for logits [rows, vocab]."""
    return _tile(rows, vocab, target, _DIVERGENCE_COLUMNS)


def exponentials_tile(rows: int, columns: int, target: Target) -> TileConfig:
    """The tile of `exponentials_kernel` for [rows, columns]."""
    return _tile(rows, columns, target, _EXPONENTIALS_COLUMNS)


def _tile(rows: int, columns: int, target: Target, thread_columns: int) -> TileConfig:
    warps = _WARPS
    # With one program per multiprocessor, the program must have as many loads in flight as it can, so it gets twice the
    # threads. Each thread then has half the registers: 128 with warps of 32 threads, too few for 16 columns. With warps
    # of 64 threads even 8 columns would not fit.
    if rows <= target.multiprocessors and target.warp_size == 32:
        warps, thread_columns = 2 * warps, min(thread_columns, 8)
    elements = warps * target.warp_size * thread_columns
    block_n = min(elements, max(16, next_power_of_2(columns)))
    block_m = 1
    if 4 * block_n <= elements:
        # Several short rows fit in one program: as many as still leave a program for each multiprocessor. They get half
        # the elements, because every row needs registers for its own sums and masks.
        rows_per_multiprocessor = max(1, rows // target.multiprocessors)
        block_m = min(elements // 2 // block_n, next_power_of_2(rows_per_multiprocessor + 1) // 2)
    if interpreting():  # where an operation on 64 rows takes as long as one on a single row
        block_m = min(_INTERPRETED_ROWS, next_power_of_2(rows))
    # Never more threads than elements: two threads would hold the same element, and one could read it after the other
    # has overwritten it.
    warps = max(1, min(warps, block_m * block_n // target.warp_size))
    if target.shared_memory > 128 * 1024:
        return TileConfig(block_m, block_n, Options(warps, _STAGES))
    # One stage less. Without a register limit the assembler spills on sm_86 and sm_89 to make room for a third program.
    registers = _REGISTERS if target.backend == "cuda" and warps == _WARPS else None
    return TileConfig(block_m, block_n, Options(warps, _STAGES - 1, registers))
