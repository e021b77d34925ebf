"""Row work of the losses as launches: which kernel, over which tiles, with which arguments.

It works with tensors on the meta device too. Configurations are at the end.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from softprompt_kernels.kernels.device.rows import Gradient, Logits, Parts
from softprompt_kernels.kernels.problems.loss import Divergence, ExpectationState
from softprompt_kernels.kernels.triton.launch import Launch, Options, ceil_div, next_power_of_2, run_all
from softprompt_kernels.kernels.triton.runtime import interpreting
from softprompt_kernels.kernels.triton.targets import Target


@dataclass(frozen=True)
class TritonRows:
    """For one target."""

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
        tile = _divergence_tile(rows, vocab, self.target)
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
        products: Tensor,  # [n, columns] fp32
        bias: Tensor | None,  # [columns] fp32
        scale: float,  # logits are scale · (products + bias)
        first: int,  # the tile's first word
        weights: Tensor | None,  # [n]
        state: ExpectationState,
        parts: Parts,
    ) -> Launch:
        """See `device.rows.RowKernels`."""
        from softprompt_kernels.kernels.triton.losses.expectation_rows import exponentials_kernel

        rows, columns = products.shape
        mean = state.mean
        tile = _exponentials_tile(rows, columns, self.target)
        arguments = {
            "products": products,
            "bias": bias,
            "weights": weights,
            "labels": state.labels,
            "largest": state.row_max,
            "total": state.row_sum,
            "bias_total": state.bias_sum,
            "label_logit": state.label_logit,
            "mean": mean,
            "high": parts.high,
            "low": parts.low,
            "rows": rows,
            "columns": columns,
            "size": 0 if mean is None else mean.shape[1],
            "products_stride": products.stride(0),
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


@dataclass(frozen=True)
class Tile:
    """Rows and words of a program's tile."""

    block_m: int
    block_n: int
    options: Options


# Counted in the machine code for sm_80 to sm_120 and gfx942, none of which spills; not yet timed. The first sweep of a
# divergence keeps 5 sums of each word beside the tile: with 8 words a thread, which is what 16 bytes hold in 16 bits,
# that is 90 to 128 registers (134 once) and two programs of 8 warps a multiprocessor; with 16 it is 140 to 233 and one
# program, with 4 the maxima of a tile cost half as much as its words. More programs at a time would not help the later
# sweeps: what is in flight, two rows of 1 MB a multiprocessor at V = 128256, already is more than the L2 cache holds.
_DIVERGENCE_WORDS = 8
_EXPONENTIAL_WORDS = 16  # 48 to 64 registers, 4 or 5 programs
_WARPS = 8
_REGISTERS = 128  # of a thread, where 8 warps are two programs
_STAGES = 3  # tiles on their way to each program; 16 to 64 KiB of shared memory
_INTERPRETED_ROWS = 64


def _divergence_tile(rows: int, vocab: int, target: Target) -> Tile:
    return _tile(rows, vocab, target, _DIVERGENCE_WORDS)


def _exponentials_tile(rows: int, columns: int, target: Target) -> Tile:
    return _tile(rows, columns, target, _EXPONENTIAL_WORDS)


def _tile(rows: int, words: int, target: Target, each: int) -> Tile:
    warps = _WARPS
    # One program a multiprocessor needs all the memory traffic it can make; of twice the threads each has half the
    # registers, 128 with 32 threads a warp, which 16 words would not fit, and with 64 not even 8.
    if rows <= target.multiprocessors and target.warp_size == 32:
        warps, each = 2 * warps, min(each, 8)
    elements = warps * target.warp_size * each
    block_n = min(elements, max(16, next_power_of_2(words)))
    block_m = 1
    if 4 * block_n <= elements:
        # Rows so short that several fit: as many as leave a program for each multiprocessor, in half the registers,
        # since rows have sums and masks of their own.
        most = max(1, rows // target.multiprocessors)
        block_m = min(elements // 2 // block_n, next_power_of_2(most + 1) // 2)
    if interpreting():  # an operation takes as long there for 64 rows as for one
        block_m = min(_INTERPRETED_ROWS, next_power_of_2(rows))
    # No more threads than elements: several would hold the same one, and one might read what another has overwritten.
    warps = max(1, min(warps, block_m * block_n // target.warp_size))
    if target.shared_memory > 128 * 1024:
        return Tile(block_m, block_n, Options(warps, _STAGES))
    # Less is on its way, and the assembler of sm_86 and sm_89 would rather spill than give up a third program for it.
    registers = _REGISTERS if target.backend == "cuda" and warps == _WARPS else None
    return Tile(block_m, block_n, Options(warps, _STAGES - 1, registers))
