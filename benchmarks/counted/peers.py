"""Other packages' kernels for the same losses, from PyPI, called the way that their own modules call them.

    pip install --no-deps liger-kernel flash-linear-attention fla-core einops

None of them is needed; what is missing, or cannot run in Triton's interpreter, is left out with a reason. What these
packages ask of a GPU is answered here, and nothing of theirs is copied:

- Liger multiplies 16-bit hidden states to fp32 logits on a GPU, and in two steps, over 16-bit logits, elsewhere. On
  tensors without data it takes the GPU's way, in which it needs less memory and moves fewer bytes.
- A frozen head and a student that needs a gradient are asked for in all of them.

cut-cross-entropy does other work (a cross-entropy of labels, no teacher), and asks a driver for its tiles.
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


def missing(way: str) -> str | None:
    """Why a way cannot be run; None if it can, or is no peer's."""
    package = PACKAGES.get(way)
    if package is None or importlib.util.find_spec(package) is not None:
        return None
    return f"{package} is not installed: pip install --no-deps {PYPI[package]}"


def liger_logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Liger's kernel takes log-probabilities."""
    from liger_kernel.transformers.functional import liger_jsd

    return liger_jsd(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), beta=0.0)


def liger_hidden(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """Loss and gradient are both of its forward."""
    from liger_kernel.ops import fused_linear_jsd

    project = _project_on_a_gpu if student.device.type == "meta" else fused_linear_jsd._project_to_float32

    def run() -> Any:
        with patch.object(fused_linear_jsd, "_project_to_float32", project):
            return fused_linear_jsd.fused_linear_jsd_forward(
                student, weight, teacher, weight, None, 0.0, -100, has_label=False, temperature=1.0
            )

    return run


def fla_hidden(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """Loss and gradient are both of its forward."""
    from fla.modules.fused_kl_div.ops import fused_kl_div_fwd

    return partial(fused_kl_div_fwd, student, teacher, weight, weight, "batchmean", use_dx=True, use_dw=False)


def liger_probabilities(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """The teacher's probabilities of all words, V numbers a token, are made before."""
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
