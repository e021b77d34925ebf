"""The row kernels of the losses in CUDA C++: `csrc/cuda/losses/kl_rows.cu` and `expectation_rows.cu`."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.cuda.native import Launcher
from softprompt_kernels.kernels.device.rows import Gradient, Logits, Parts
from softprompt_kernels.kernels.problems.loss import Divergence, ExpectationState
from softprompt_kernels.kernels.problems.tensors import DTYPES
from softprompt_kernels.kernels.ranges import kernel_range


@dataclass(frozen=True)
class CudaLaunch:
    """One kernel, its arguments, and the tensors that it reads and writes."""

    name: str  # of the function in the module
    rows: int
    columns: int
    arguments: dict[str, Any]
    reads: tuple[Tensor | None, ...]
    writes: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class CudaRows:
    """The CUDA C++ row kernels of one module: on a GPU (`_native`) or on the host (`_simt`)."""

    launcher: Launcher

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
    ) -> CudaLaunch:
        """See `device.rows.RowKernels`."""
        student, teacher = logits.student, logits.teacher
        out = None if gradient is None else gradient.out
        row_scale = None if gradient is None else gradient.row_scale
        arguments = {
            "kind": divergence.code,
            "student": _matrix(student),
            "teacher": _matrix(teacher),
            "student_bias": _address(logits.student_bias),
            "teacher_bias": _address(logits.teacher_bias),
            "weights": _address(weights),
            "row_scale": _address(row_scale),
            "statistics": _address(statistics),
            "loss": _address(loss),
            "gradient": None if out is None else _matrix(out),
            "rows": student.shape[0],
            "vocab": vocab,
            "columns": 0 if out is None else out.shape[1],
            "scale": abs(logits.scale),
            "inner": logits.inner or 0.0,
            "capped": logits.inner is not None,
            "negated": logits.scale < 0,
            "beta": divergence.beta,
            "loss_scale": loss_scale,
            "gradient_scale": 1.0 if gradient is None else gradient.scale,
        }
        written = (out, loss, statistics) if loss is not None else (out,)
        reads = (student, teacher, logits.student_bias, logits.teacher_bias, weights, row_scale, statistics)
        return CudaLaunch("divergence_rows", student.shape[0], vocab, arguments, reads, written)

    def exponentials(
        self,
        products: Tensor,
        bias: Tensor | None,
        scale: float,
        first: int,
        weights: Tensor | None,
        state: ExpectationState,
        parts: Parts,
    ) -> CudaLaunch:
        """See `device.rows.RowKernels`."""
        mean, high, low = state.mean, parts.high, parts.low
        arguments = {
            "products": _matrix(products),
            "bias": _address(bias),
            "weights": _address(weights),
            "labels": _address(state.labels),
            "row_max": _address(state.row_max),
            "row_sum": _address(state.row_sum),
            "bias_sum": _address(state.bias_sum),
            "label_logit": _address(state.label_logit),
            "mean": 0 if mean is None else mean.data_ptr(),
            "mean_stride": 0 if mean is None else mean.stride(0),
            "size": 0 if mean is None else mean.shape[1],
            "high": None if high is None else _matrix(high),
            "low": None if low is None else _matrix(low),
            "rows": products.shape[0],
            "columns": products.shape[1],
            "first": first,
            "scale": scale,
            "part_scale": parts.scale,
        }
        written = (state.row_max, state.row_sum, state.bias_sum, state.label_logit, mean, high, low)
        return CudaLaunch(
            "exponential_rows",
            products.shape[0],
            products.shape[1],
            arguments,
            (products, bias, weights, state.labels),
            written,
        )

    def run(self, launches: Iterable[CudaLaunch], device: torch.device) -> None:
        """See `device.rows.RowKernels`."""
        for launch in launches:
            with (
                self.launcher.launching(launch.reads, launch.writes) as module,
                kernel_range(launch.name, launch.rows, launch.columns),
            ):
                getattr(module, launch.name)(**launch.arguments, stream=self.launcher.stream(device))


def _address(tensor: Tensor | None) -> int:
    """The address of a contiguous tensor, 0 for None."""
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor) -> tuple[int, int, int, int]:
    """Address, dtype, and strides of rows and columns."""
    return tensor.data_ptr(), DTYPES[tensor.dtype], tensor.stride(0), tensor.stride(1)
