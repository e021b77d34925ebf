"""Kernels of other packages (peers) for the same losses, called as their own modules call them.

    pip install --no-deps liger-kernel flash-linear-attention fla-core einops trl

None of them is needed. A package that is missing, or that cannot run in Triton's interpreter, is left out with a
reason. None of their code is copied.

- All are called with a frozen head and a student that needs a gradient.
- On a GPU, Liger and TRL multiply 16-bit hidden states to fp32 logits; elsewhere they convert the operands or the
  logits. On tensors without data they are made to take the GPU's path, which needs less memory and moves fewer bytes.
- TRL's kernel also makes the student's entropy.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

LIGER_LOGITS = "Liger JSD of log-softmaxes"
LIGER_HIDDEN = "Liger fused_linear_jsd"
LIGER_PROBABILITIES = "Liger fused_linear_kl_div (16-bit logits)"
FLA_HIDDEN = "fla fused_kl_div (16-bit logits)"
TRL_HIDDEN = "TRL ChunkedDivergenceFunction"
PACKAGES = {
    LIGER_LOGITS: "liger_kernel",
    LIGER_HIDDEN: "liger_kernel",
    LIGER_PROBABILITIES: "liger_kernel",
    FLA_HIDDEN: "fla",
    TRL_HIDDEN: "trl",
}
PYPI = {"liger_kernel": "liger-kernel", "fla": "flash-linear-attention fla-core einops", "trl": "trl"}
BETA = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}  # Liger's and TRL's name for the divergence

COMPILED = "it generates its kernels for the machine that it runs on, and here they would be a CPU's"
ONLY_LABELS = "it computes the cross-entropy of labels, without a teacher, and asks a GPU's driver for its tile sizes"


def missing(implementation: str, divergence: str = "forward") -> str | None:
    """Why the implementation of a peer cannot be run; None if it can, or if it is not a peer's."""
    package = PACKAGES.get(implementation)
    if package is not None and importlib.util.find_spec(package) is None:
        return f"{package} is not installed: pip install --no-deps {PYPI[package]}"
    if implementation == FLA_HIDDEN and divergence != "forward":
        return "it has the forward KL alone"
    return None


def liger_logits(student: Tensor, teacher: Tensor, divergence: str = "forward") -> Tensor:
    """Liger's JSD of logits `[N, V]`. Its kernel takes log-probabilities, so they are made first."""
    from liger_kernel.transformers.functional import liger_jsd

    return liger_jsd(F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1), beta=BETA[divergence])


def liger_hidden(student: Tensor, teacher: Tensor, weight: Tensor, divergence: str = "forward") -> Callable[[], Any]:
    """Liger's JSD of hidden states `[N, d]`. Its forward makes both loss and gradient."""
    from liger_kernel.ops import fused_linear_jsd

    project = _project_on_a_gpu if student.device.type == "meta" else fused_linear_jsd._project_to_float32

    def run() -> Any:
        with patch.object(fused_linear_jsd, "_project_to_float32", project):
            return fused_linear_jsd.fused_linear_jsd_forward(
                student, weight, teacher, weight, None, BETA[divergence], -100, has_label=False, temperature=1.0
            )

    return run


def fla_hidden(student: Tensor, teacher: Tensor, weight: Tensor, divergence: str = "forward") -> Callable[[], Any]:
    """flash-linear-attention's forward KL of hidden states `[N, d]`. Its forward makes both loss and gradient."""
    from fla.modules.fused_kl_div.ops import fused_kl_div_fwd

    return partial(fused_kl_div_fwd, student, teacher, weight, weight, "batchmean", use_dx=True, use_dw=False)


def trl_hidden(student: Tensor, teacher: Tensor, weight: Tensor, divergence: str = "forward") -> Callable[[], Any]:
    """TRL's divergence of hidden states `[N, d]`, and its gradient, which makes the logits again."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def run() -> Any:
        hidden = student.detach().requires_grad_()
        with torch.enable_grad(), _trl_on_a_gpu(student.device.type == "meta"):
            rows, _ = ChunkedDivergenceFunction.apply(hidden, weight, None, teacher, weight, None, BETA[divergence])
            return rows, torch.autograd.grad(rows.sum(), hidden)

    return run


def liger_probabilities(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """Liger's KL with a cached teacher: its probabilities `[N, V]` of the whole vocabulary, made before the run."""

    from liger_kernel.ops.fused_linear_kl_div import fused_linear_kl_div_forward

    target = student.new_full((len(student), len(weight)), 1 / len(weight))
    return partial(
        fused_linear_kl_div_forward, student, weight, target, None, "batchmean", -100, has_label=False, temperature=1.0,
        eps=1e-10,
    )  # fmt: skip


FROM_HIDDEN = {LIGER_HIDDEN: liger_hidden, FLA_HIDDEN: fla_hidden, TRL_HIDDEN: trl_hidden}
FROM_PROBABILITIES = {LIGER_PROBABILITIES: liger_probabilities}


def _project_on_a_gpu(hidden: Tensor, weight: Tensor) -> Tensor:
    return torch.mm(hidden, weight.t(), out_dtype=torch.float32)


@contextmanager
def _trl_on_a_gpu(without_data: bool) -> Iterator[None]:
    """TRL's Triton kernels in place of its PyTorch ones; without data also its GEMMs of a GPU."""
    from trl.kernels import chunked_divergence

    def project(tile: Tensor, hidden: Tensor, weight: Tensor, bias: None, start: int, end: int, dtype: Any) -> None:
        torch.mm(hidden, weight[start:end].t(), out_dtype=torch.float32, out=tile)

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)

    changed: dict[str, Any] = {"_use_triton": lambda device: True}
    if without_data:
        changed |= {"_project": project, "_addmm_fp32": add_product, "_compute_dtype": lambda hidden: hidden.dtype}
    with patch.multiple(chunked_divergence, **changed):
        yield
