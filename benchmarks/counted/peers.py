"""Kernels of other packages (peers) for the same losses, called as their own modules call them.

    pip install --no-deps liger-kernel flash-linear-attention fla-core einops

None of them is needed. A package that is missing, or that cannot run in Triton's interpreter, is left out with a
reason. None of their code is copied.

- All are called with a frozen head and a student that needs a gradient.
- On a GPU, Liger multiplies 16-bit hidden states to fp32 logits; elsewhere it makes 16-bit logits first and converts
  them. On tensors without data it is made to take the GPU's path, which needs less memory and moves fewer bytes.
- cut-cross-entropy is not among them: it computes the cross-entropy of labels, without a teacher, and it asks a GPU
  driver for its tile sizes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

LIGER_LOGITS = "Liger JSD (β 0) of log-softmaxes"
LIGER_HIDDEN = "Liger fused_linear_jsd (β 0)"
LIGER_PROBABILITIES = "Liger fused_linear_kl_div (16-bit logits)"
FLA_HIDDEN = "fla fused_kl_div (16-bit logits)"
PACKAGES = {
    LIGER_LOGITS: "liger_kernel",
    LIGER_HIDDEN: "liger_kernel",
    LIGER_PROBABILITIES: "liger_kernel",
    FLA_HIDDEN: "fla",
}
PYPI = {"liger_kernel": "liger-kernel", "fla": "flash-linear-attention fla-core einops"}


def missing(implementation: str) -> str | None:
    """Why the implementation of a peer cannot be run; None if it can, or if it is not a peer's."""
    package = PACKAGES.get(implementation)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed: pip install --no-deps {PYPI[package]}"


def liger_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Liger's JSD of logits `[N, V]`. Its kernel takes log-probabilities, so they are made first."""
    from liger_kernel.transformers.functional import liger_jsd

    return liger_jsd(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), beta=0.0)


def liger_hidden(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """Liger's JSD of hidden states `[N, d]`. Its forward makes both loss and gradient."""
    from liger_kernel.ops import fused_linear_jsd

    project = _project_on_a_gpu if student.device.type == "meta" else fused_linear_jsd._project_to_float32

    def run() -> Any:
        with patch.object(fused_linear_jsd, "_project_to_float32", project):
            return fused_linear_jsd.fused_linear_jsd_forward(
                student, weight, teacher, weight, None, 0.0, -100, has_label=False, temperature=1.0
            )

    return run


def fla_hidden(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """flash-linear-attention's KL of hidden states `[N, d]`. Its forward makes both loss and gradient."""
    from fla.modules.fused_kl_div.ops import fused_kl_div_fwd

    return partial(fused_kl_div_fwd, student, teacher, weight, weight, "batchmean", use_dx=True, use_dw=False)


def liger_probabilities(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """Liger's KL with a cached teacher: its probabilities `[N, V]` of the whole vocabulary, made before the run."""

    from liger_kernel.ops.fused_linear_kl_div import fused_linear_kl_div_forward

    target = student.new_full((len(student), len(weight)), 1 / len(weight))
    return partial(
        fused_linear_kl_div_forward, student, weight, target, None, "batchmean", -100, has_label=False, temperature=1.0,
        eps=1e-10,
    )  # fmt: skip


FROM_LOGITS = {LIGER_LOGITS: liger_logits}
FROM_HIDDEN = {LIGER_HIDDEN: liger_hidden, FLA_HIDDEN: fla_hidden}
FROM_PROBABILITIES = {LIGER_PROBABILITIES: liger_probabilities}


def _project_on_a_gpu(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
