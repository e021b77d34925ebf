"""Puts our ops behind the names that Liger's tests import. None of Liger's own code runs.

| name in the tests | here |
|---|---|
| KL and JSD of log-probabilities | `kl_div`, and the gradient of the normaliser, which theirs leaves out |
| fused linear JSD | `linear_kl_div`, over T²: theirs is not multiplied by it |
| fused linear KL with target probabilities | `linear_kl_div`: log-targets as hidden states, the identity as head |
| chunked JSD with biases | `linear_kl_div` with a column of ones; the loss of the labels is PyTorch's |
| `...Function.apply` | the same on the reference backend, since tests compare it with the function |

Rows that are ignored have weight 0. Their device "cuda" is the CPU here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from softprompt_kernels import kl_div, linear_kl_div

IMPLEMENTATION = "softprompt"


# --- our ops with their signatures ------------------------------------------------------------------------------------


def keep(labels: Tensor | None, ignore_index: int) -> Tensor | None:
    return None if labels is None else (labels != ignore_index).float()


def divergence_of(beta: float) -> dict[str, Any]:
    return {"divergence": {0.0: "forward", 1.0: "reverse"}.get(beta, "jsd"), "beta": beta if 0 < beta < 1 else 0.5}


def jsd(
    input: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    beta: float = 0.5,
    ignore_index: int = -100,
    *_: Any,
    backend: str | None = None,
    **__: Any,
) -> Tensor:
    """Of log-probabilities [N, V]. By Euler's rule, a change of the normaliser Z of e^student at Z = 1 changes

    Σ p_t (t − s) by −dlogZ,   Σ p_s (s − t) by (KL + 1) dlogZ,   the JSD by (1 − β) KL(s‖m) dlogZ.
    """
    weights, options = keep(shift_labels, ignore_index), divergence_of(beta)
    loss = kl_div(input, target, weights=weights, backend=backend, **options)
    with torch.no_grad():
        if beta == 0.0:
            slope = -torch.ones(len(input))
        elif beta == 1.0:
            slope = 1 + kl_div(input, target, divergence="reverse", reduction="none", backend=backend)
        else:
            shares = torch.tensor([beta, 1 - beta]).log()
            mixture = torch.logaddexp(target.float() + shares[0], input.float() + shares[1])
            slope = (1 - beta) * kl_div(mixture, input, reduction="none", backend=backend)
        slope = slope / len(input) if weights is None else slope * weights / weights.sum().clamp_min(1)
    normaliser = input.float().logsumexp(dim=-1)
    return (loss + slope @ (normaliser - normaliser.detach())).to(input.dtype)


def elementwise_kl(
    student: Tensor,
    target: Tensor,
    reduction: str = "batchmean",
    log_target: bool = False,
    eps: float = 1e-10,
    *,
    backend: str | None = None,
) -> Tensor:
    """Σ q (log q − s) over [N, V], for any q ≥ 0 with total Q and any s: Q (KL + log Q − lse(s))."""
    if reduction == "none":
        raise NotImplementedError("kl_div gives rows, and no single elements")
    log_q = target if log_target else target.log()
    total = log_q.double().exp().sum(dim=-1)
    loss = kl_div(student, log_q, weights=total.float(), reduction="sum", backend=backend)
    loss = loss + total @ (total.log() - student.double().logsumexp(dim=-1))
    rows = {"sum": 1, "batchmean": len(student), "mean": student.numel()}[reduction]
    return (loss / rows).to(student.dtype)


def fused_linear_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    shift_labels: Tensor | None = None,
    jsd_beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    accum_dtype: torch.dtype | None = None,
    *_: Any,
    backend: str | None = None,
) -> Tensor:
    loss = linear_kl_div(
        student_input,
        teacher_input,
        student_weight,
        teacher_weight=teacher_weight,
        temperature=temperature,
        weights=keep(shift_labels, ignore_index),
        backend=backend,
        **divergence_of(jsd_beta),
    )
    return loss / temperature**2


def fused_linear_kl_div(
    student_input: Tensor,
    student_weight: Tensor,
    target: Tensor,
    shift_labels: Tensor | None = None,
    reduction: str = "batchmean",
    ignore_index: int = -100,
    temperature: float = 1.0,
    eps: float = 1e-10,
    accum_dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    if reduction not in ("sum", "mean", "batchmean"):
        raise ValueError(f"reduction must be one of sum, mean and batchmean, got {reduction}")
    loss = linear_kl_div(
        student_input,
        temperature * target.float().log(),
        student_weight,
        teacher_weight=torch.eye(target.shape[1]),
        temperature=temperature,
        weights=keep(shift_labels, ignore_index),
        reduction="sum" if reduction == "sum" else "mean",
        backend=backend,
    )
    return loss / temperature**2 / (target.shape[1] if reduction == "mean" else 1)


def chunked_jsd(
    student_input: Tensor,
    student_weight: Tensor,
    teacher_input: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    weight_hard_loss: float = 0.5,
    weight_soft_loss: float = 0.5,
    beta: float = 0.5,
    ignore_index: int = -100,
    temperature: float = 1.0,
    compiled: bool = True,
    chunk_size: int = 1024,
    return_soft_hard_loss: bool = False,
    *,
    backend: str | None = None,
) -> Any:
    student, teacher = (student_input, student_weight), (teacher_input, teacher_weight)
    if student_bias is not None:
        student, teacher = with_bias(*student, student_bias), with_bias(*teacher, teacher_bias)
    options = (labels, beta, ignore_index, temperature)
    soft = fused_linear_jsd(*student, *teacher, *options, backend=backend)
    hard = F.cross_entropy(
        F.linear(student_input, student_weight, student_bias).float(), labels, ignore_index=ignore_index
    )
    loss = weight_hard_loss * hard + weight_soft_loss * soft
    return (loss, soft, hard) if return_soft_hard_loss else loss


def with_bias(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    assert bias is not None
    return torch.cat((hidden, hidden.new_ones(len(hidden), 1)), 1), torch.cat((weight, bias[:, None]), 1)


def kl_loss_and_grad(
    logits: Tensor,
    target: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    temperature: float,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Scaled rows of Σ q (log q − log p), and their gradient with respect to the logits."""
    log_q = target.float().log()
    log_total = log_q.logsumexp(dim=-1)
    total = log_total.exp() * (1 if labels is None else keep(labels, ignore_index))  # type: ignore[operator]
    student = logits.detach().requires_grad_()
    options: dict[str, Any] = {"temperature": temperature, "weights": total, "reduction": "none"}
    rows = kl_div(student, temperature * log_q, **options) / temperature**2
    (gradient,) = torch.autograd.grad(rows.sum() * scale, student)
    return (rows.detach() + total * log_total) * scale, gradient


# --- their names ------------------------------------------------------------------------------------------------------


def on_the_reference(op: Any) -> Any:
    return SimpleNamespace(apply=lambda *arguments: op(*arguments, backend="reference"))


class LigerJSD(torch.nn.Module):
    def __init__(self, beta: float = 0.5, ignore_index: int = -100) -> None:
        super().__init__()
        self.options = {"beta": beta, "ignore_index": ignore_index}

    def forward(self, student: Tensor, target: Tensor, labels: Tensor | None = None) -> Tensor:
        return jsd(student, target, labels, **self.options)


class LigerKLDIVLoss(torch.nn.Module):
    def __init__(self, reduction: str = "mean", log_target: bool = False) -> None:
        super().__init__()
        self.reduction, self.log_target = reduction, log_target

    def forward(self, student: Tensor, target: Tensor) -> Tensor:
        return elementwise_kl(student, target, self.reduction, self.log_target)


class WithOptions(torch.nn.Module):
    """A module that calls a function with the options that it was made with."""

    function: Any

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, *arguments: Any) -> Any:
        return type(self).function(*arguments, **self.options)


class LigerFusedLinearJSD(WithOptions):
    function = staticmethod(fused_linear_jsd)


class LigerFusedLinearKLDivLoss(WithOptions):
    function = staticmethod(fused_linear_kl_div)


class LigerFusedLinearJSDLoss(WithOptions):
    function = staticmethod(chunked_jsd)


def dispatch(op: str, *arguments: Any, impl: str | None = None, backend: str | None = None) -> Any:
    ops: dict[str, Any] = {
        "kl_div": elementwise_kl,
        "fused_linear_jsd": fused_linear_jsd,
        "kl_loss_and_grad": kl_loss_and_grad,
    }
    return ops[op](*arguments)


JSD_FUNCTION, KL_FUNCTION = on_the_reference(fused_linear_jsd), on_the_reference(fused_linear_kl_div)
LOG_JSD_FUNCTION, CHUNKED_FUNCTION = on_the_reference(jsd), on_the_reference(chunked_jsd)
MODULES: dict[str, dict[str, Any]] = {
    "liger_kernel": {},
    "liger_kernel.utils": {"infer_device": lambda: "cpu", "is_npu_available": lambda: False},
    "liger_kernel.transformers": {},
    "liger_kernel.transformers.functional": {
        "liger_jsd": jsd,
        "liger_fused_linear_jsd": fused_linear_jsd,
        "liger_fused_linear_kl_div": fused_linear_kl_div,
    },
    "liger_kernel.transformers.jsd": {"LigerJSD": LigerJSD, "LigerJSDFunction": LOG_JSD_FUNCTION},
    "liger_kernel.transformers.kl_div": {"LigerKLDIVLoss": LigerKLDIVLoss},
    "liger_kernel.transformers.fused_linear_jsd": {"LigerFusedLinearJSD": LigerFusedLinearJSD},
    "liger_kernel.transformers.fused_linear_kl_div": {"LigerFusedLinearKLDivLoss": LigerFusedLinearKLDivLoss},
    "liger_kernel.ops": {"LigerFusedLinearJSDFunction": JSD_FUNCTION, "LigerFusedLinearKLDivFunction": KL_FUNCTION},
    "liger_kernel.ops.jsd": {"dispatch": dispatch, "LigerJSDFunction": LOG_JSD_FUNCTION},
    "liger_kernel.ops.fused_linear_jsd": {"dispatch": dispatch, "LigerFusedLinearJSDFunction": JSD_FUNCTION},
    "liger_kernel.ops.fused_linear_kl_div": {"dispatch": dispatch, "LigerFusedLinearKLDivFunction": KL_FUNCTION},
    "liger_kernel.functional": {"jsd": jsd},
    "liger_kernel.backends": {},
    "liger_kernel.backends.dispatch": {
        "available_impls": lambda op: [IMPLEMENTATION],
        "available_backends": lambda op: [IMPLEMENTATION],
        "dispatch": dispatch,
    },
    "liger_kernel.backends.registry": {"get_registered": lambda op, backend: None},
    "liger_kernel.chunked_loss": {"LigerFusedLinearJSDLoss": LigerFusedLinearJSDLoss},
    "liger_kernel.chunked_loss.functional": {"liger_fused_linear_jsd": CHUNKED_FUNCTION.apply},
    "liger_kernel.chunked_loss.jsd_loss": {
        "LigerFusedLinearJSDFunction": SimpleNamespace(apply=chunked_jsd),
    },
}

for name, content in MODULES.items():
    module = sys.modules[name] = ModuleType(name)
    module.__path__ = []  # type: ignore[attr-defined]
    vars(module).update(content)
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


# --- their GPU --------------------------------------------------------------------------------------------------------


class OnTheCpu(TorchFunctionMode):
    """Makes and moves to the CPU what is asked for on "cuda"."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def here(value: Any) -> Any:
            return "cpu" if isinstance(value, str) and value == "cuda" else value

        return function(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Iterator[None]:
    with OnTheCpu():
        return (yield)


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if (skips := "_require_cuda_for_ops_tests") in item.fixturenames:
            item.fixturenames.remove(skips)
