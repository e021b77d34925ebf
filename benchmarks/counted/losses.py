"""The losses: what is counted, by whom, and the floors. Each with its gradient for the student; the head is frozen.

| op | problem | floor: reads and writes |
|---|---|---|
| kl_div | two matrices of logits, each divergence | both logits twice (forward, backward), the gradient |
| linear_kl_div | hidden states of both and a head, each divergence | the head twice (logits, gradient), the rest once |
| linear_kl_div_from_moments | the same with a cached teacher: its moments, or for peers its probabilities | the same |
| teacher_moments | hidden states and a head | the head twice (logits, mean), the rest once |

Rows of a real vocabulary do not stay in the cache, so each read of them counts. The last three ops have N 8192, d 4096,
V 128256 in bf16. Their floor keeps the logits on the chip, which no implementation here achieves. They are too large
for the interpreter. Their counts come from two runs: PyTorch's operations and the memory from a run on tensors without
data, where kernels are skipped; the kernels' traffic from a run of few rows with the full V, in fp16 in place of bf16,
multiplied up to all rows. All of these kernels work row by row.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.counted import peers
from benchmarks.counted.aten_traffic import AtenTraffic, skip_launches
from benchmarks.counted.record import MULTIPROCESSORS, OURS, PEER, PYTORCH, Count, count, kernels, left_out
from benchmarks.counted.triton_traffic import Traffic
from softprompt_kernels import kl_div
from softprompt_kernels.kernels.problems.loss import Divergence, Head, HeadProblem

DIVERGENCES = ("forward", "reverse", "jsd")
Prepare = Callable[[Tensor, Tensor, Tensor], Callable[[], Any]]  # (student, teacher, head) -> a call that runs once


# --- logits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitsCase:
    """N rows of V logits."""

    rows: int = 8
    vocab: int = 5000

    @property
    def name(self) -> str:
        return f"N{self.rows} V{self.vocab} fp32"


def count_logits(case: LogitsCase, divergence: str = "forward") -> list[Count]:
    """A divergence of logits and its gradient, by every implementation."""
    suite, floor = f"kl_div {divergence}", 5 * 4 * case.rows * case.vocab
    implementations: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
        "kl_div": (OURS, partial(kl_div, divergence=divergence, backend="triton")),
        "F.kl_div of log-softmaxes": (PYTORCH, partial(pytorch_divergence, divergence=divergence)),
        peers.LIGER_LOGITS: (PEER, partial(peers.liger_logits, divergence=divergence)),
    }
    counts = []
    for name, (role, implementation) in implementations.items():
        if reason := peers.missing(name, divergence):
            counts.append(left_out(suite, case.name, name, role, floor, reason))
            continue
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.randn(case.rows, case.vocab, generator=generator) for _ in range(2))
        run = partial(_loss_and_gradient, implementation, student.requires_grad_(), teacher)
        counts.append(count(suite, case.name, name, role, floor, run, cached=False))
    counts.append(left_out(suite, case.name, "torch.compile of F.kl_div", PYTORCH, floor, peers.COMPILED))
    return counts


def pytorch_divergence(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    """Of logits, as one writes it with `F.kl_div`; the JSD with β = ½."""
    log_p_student, log_p_teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    mean = partial(F.kl_div, log_target=True, reduction="batchmean")
    if divergence == "forward":
        return mean(log_p_student, log_p_teacher)
    if divergence == "reverse":
        return mean(log_p_teacher, log_p_student)
    log_half = torch.full((), -0.6931471805599453, device=student.device)
    log_mixture = torch.logaddexp(log_p_student + log_half, log_p_teacher + log_half)
    return (mean(log_mixture, log_p_teacher) + mean(log_mixture, log_p_student)) / 2


def _loss_and_gradient(loss: Callable[..., Tensor], student: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        value = loss(student, *others)
        return value, *torch.autograd.grad(value, student)


# --- hidden states ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadCase:
    """N tokens of size d, a vocabulary of V."""

    tokens: int = 8192
    size: int = 4096
    vocab: int = 128256
    counted_rows: int = 4  # rows that the kernels are run on

    @property
    def name(self) -> str:
        return f"N{self.tokens} d{self.size} V{self.vocab} bf16"

    @property
    def floor(self) -> int:
        """Bytes: the head twice, and three tensors of hidden states."""
        return 2 * (2 * self.vocab * self.size + 3 * self.tokens * self.size)


def count_head(case: HeadCase, divergence: str = "forward") -> list[Count]:
    """Loss and the student's gradient with a live teacher, by every implementation."""
    implementations: dict[str, tuple[str, Prepare]] = {
        "linear_kl_div": (OURS, partial(live, divergence=divergence)),
        "F.kl_div of all logits": (PYTORCH, partial(_pytorch_hidden, divergence=divergence)),
        **{name: (PEER, partial(peer, divergence=divergence)) for name, peer in peers.FROM_HIDDEN.items()},
    }
    suite = f"linear_kl_div {divergence}"
    counts = [
        _count_in_two_runs(suite, case, name, role, implementation, 16, divergence)
        for name, (role, implementation) in implementations.items()
    ]
    for name, reason in (("torch.compile of F.kl_div", peers.COMPILED), ("cut-cross-entropy", peers.ONLY_LABELS)):
        counts.append(left_out(suite, case.name, name, PEER, case.floor, reason))
    return counts


def count_moments(case: HeadCase) -> list[Count]:
    """Loss and gradient with a cached teacher, by every implementation: from moments, or from all its probabilities."""
    implementations: dict[str, tuple[str, Prepare]] = {
        "linear_kl_div_from_moments": (OURS, from_moments),
        "F.kl_div, cached probabilities": (PYTORCH, _pytorch_probabilities),
        **{name: (PEER, implementation) for name, implementation in peers.FROM_PROBABILITIES.items()},
    }
    return [
        _count_in_two_runs("linear_kl_div_from_moments", case, name, role, implementation, case.size)
        for name, (role, implementation) in implementations.items()
    ]


def count_teacher(case: HeadCase) -> list[Count]:
    """Making the moments, by our op and by PyTorch."""
    implementations: dict[str, tuple[str, Prepare]] = {
        "teacher_moments": (OURS, make_moments),
        "softmax of all logits, times the head": (PYTORCH, _pytorch_moments),
    }
    return [
        _count_in_two_runs("teacher_moments", case, name, role, implementation, case.size)
        for name, (role, implementation) in implementations.items()
    ]


# The drivers of our ops are called directly: the ops would run their fake implementation on tensors without data.


def live(student: Tensor, teacher: Tensor, weight: Tensor, divergence: str = "forward") -> Callable[[], Any]:
    """`linear_kl_div`."""
    from softprompt_kernels.kernels.triton.losses import linear_kl_div

    head = Head(weight, None, None, 1.0)
    problem = HeadProblem(student, teacher, head, head, None, Divergence(divergence, 0.5, 1.0), None)
    return partial(linear_kl_div.forward, problem, need_gradient=True)


def from_moments(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """`linear_kl_div_from_moments`; the moments are made before the run."""
    from softprompt_kernels.kernels import moments
    from softprompt_kernels.kernels.triton.losses import expectation

    mean, entropy = torch.empty_like(teacher, dtype=torch.float32), student.new_empty(len(student), dtype=torch.float32)
    head = Head(weight, None, None, 1.0)
    problem = moments.MomentsProblem(student, mean, entropy, None, head, None, 0.0, None, 1.0, None)
    return partial(moments.forward, problem, True, expectation.forward)


def make_moments(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """`teacher_moments`."""
    from softprompt_kernels.kernels import moments
    from softprompt_kernels.kernels.triton.losses import expectation

    return partial(moments.teacher_moments, teacher, Head(weight, None, None, 1.0), 1.0, None, expectation.forward)


def _pytorch_hidden(student: Tensor, teacher: Tensor, weight: Tensor, divergence: str) -> Callable[[], Any]:
    """Plain PyTorch, with fp32 log-probabilities of 16-bit logits."""

    def loss(student: Tensor) -> Tensor:
        return pytorch_divergence((student @ weight.T).float(), (teacher @ weight.T).float(), divergence)

    return partial(_loss_and_gradient, loss, student.requires_grad_())


def _pytorch_probabilities(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    target = student.new_full((len(student), len(weight)), 1 / len(weight))

    def loss(student: Tensor) -> Tensor:
        return F.kl_div(F.log_softmax((student @ weight.T).float(), dim=-1), target, reduction="batchmean")

    return partial(_loss_and_gradient, loss, student.requires_grad_())


def _pytorch_moments(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    def run() -> tuple[Tensor, Tensor]:
        log_p = F.log_softmax((teacher @ weight.T).float(), dim=-1)
        p = log_p.exp()
        return p.to(weight.dtype) @ weight, -(p * log_p).sum(dim=-1)

    return run


# --- two runs ---------------------------------------------------------------------------------------------------------


def _count_in_two_runs(
    suite: str,
    case: HeadCase,
    name: str,
    role: str,
    implementation: Prepare,
    kernel_size: int,
    divergence: str = "forward",
) -> Count:
    if reason := peers.missing(name, divergence):
        return left_out(suite, case.name, name, role, case.floor, reason)
    shapes = [(case.tokens, case.size), (case.tokens, case.size), (case.vocab, case.size)]
    run = implementation(*(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes))
    gc.collect()
    with torch.no_grad(), skip_launches() as skipped, AtenTraffic() as aten:
        result = run()
    del result
    traffic = Traffic(MULTIPROCESSORS)
    if skipped:
        run = implementation(*_few_rows(case, kernel_size))
        with torch.no_grad(), traffic:
            run()
    times = case.tokens / case.counted_rows
    issued, exponentials = (int(traffic.total(figure) * times) for figure in ("issued", "exponentials"))
    return Count(
        suite, case.name, name, role, case.floor, issued, issued, aten.read + aten.written, aten.flop,
        exponentials + aten.exponentials, int(traffic.total("atomics") * times), len(skipped), aten.operations,
        aten.peak, "bf16", {"kernels": kernels(traffic), "rows": case.counted_rows},
    )  # fmt: skip


def _few_rows(case: HeadCase, size: int) -> list[Tensor]:
    """Hidden states of a few rows, and a head. Only their first column is not 0, which makes random logits."""

    student, teacher, weight = (
        torch.zeros(rows, size, dtype=torch.float16) for rows in (case.counted_rows, case.counted_rows, case.vocab)
    )
    student[:, 0] = teacher[:, 0] = 1
    weight[:, 0] = torch.randn(case.vocab, generator=torch.Generator().manual_seed(0)).half()
    return [student, teacher, weight]
