"""What is counted: the problems, their implementations, and the floor of each.

| suite | problem |
|---|---|
| attention | B sequences behind a shared prompt, forward, and backward to all five inputs |
| kl | two matrices of logits, forward KL and its gradient |
| linear | hidden states of student and teacher, one frozen head, N 8192, d 4096, V 128256, bf16; KL and gradient |
| moments | the same with a cached teacher: moments, or for the peer all its probabilities |

Floors, in bytes:

| problem | reads and writes |
|---|---|
| attention forward | inputs and results once |
| attention backward | dQ: reads inputs, dO, out and lse, writes dQ and delta = rowsum(dO∘out) |
| | dK/dV: reads inputs, dO, lse and delta, writes the other four gradients |
| kl | forward reads both logits; backward reads both again and writes the gradient |
| linear, moments | the head twice, for the logits and for the gradient; hidden states and gradient once |

The last floor keeps the logits on the chip, which no implementation here achieves.

Problems in the interpreter are small, and so is the GPU that they are planned for: `small_gpu(16)` has 16
multiprocessors. A wave of programs in triton_traffic.py has the same size.

`linear` and `moments` are too large for the interpreter. Their counts come from two runs: PyTorch's operations and the
memory from a run on tensors without data, where kernels are skipped; the kernels' traffic from a run of few rows with
the full V, in fp16 in place of bf16, multiplied up to all rows. All of these kernels work row by row.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.counted import peers
from benchmarks.counted.aten_traffic import AtenTraffic, bytes_of, skip_launches
from benchmarks.counted.triton_traffic import Traffic
from softprompt_kernels import kl_div, prompt_attention
from softprompt_kernels.kernels.problems.loss import Divergence, Head, HeadProblem
from softprompt_kernels.kernels.triton import targets

MULTIPROCESSORS = 16
Prepare = Callable[[Tensor, Tensor, Tensor], Callable[[], Any]]  # (student, teacher, head) -> a call that runs once
OURS, PEER, COMPOSED = "ours", "peer", "plain PyTorch"
TRITON = "triton"


@dataclass
class Count:
    """The counts of one implementation for one problem. Bytes include reads and writes."""

    suite: str
    case: str
    implementation: str
    role: str
    floor: int
    missed: int  # bytes that the kernels move past the L2 cache, by the model of triton_traffic.py
    issued: int  # bytes that the kernels' programs ask for
    aten: int  # bytes of PyTorch's operations
    flop: int
    exponentials: int
    atomics: int
    launches: int  # of kernels
    operations: int  # of PyTorch
    peak: int  # most bytes that were allocated during the run and are alive together
    dtype: str = "fp32"
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """Bytes between memory and chip, by the model."""
        return self.missed + self.aten

    def record(self) -> dict[str, Any]:
        """The counts for JSON."""
        return asdict(self) | {"moved": self.moved, "times_floor": self.moved / self.floor}


def count(suite: str, case: str, implementation: str, role: str, floor: int, run: Callable[[], Any]) -> Count:
    """Run an implementation once, in the interpreter, and count."""
    gc.collect()
    with small_gpu(), AtenTraffic() as aten, Traffic(MULTIPROCESSORS) as traffic:
        run()
    made = Count(
        suite,
        case,
        implementation,
        role,
        floor,
        traffic.total("missed"),
        traffic.total("issued"),
        aten.read + aten.written,
        traffic.total("flop") + aten.flop,
        traffic.total("exponentials"),
        traffic.total("atomics"),
        len(traffic.launches),
        aten.operations,
        aten.peak,
    )
    made.more["kernels"] = _kernels(traffic)
    return made


def _kernels(traffic: Traffic) -> list[dict[str, Any]]:
    return [
        {
            "kernel": launch.kernel,
            "programs": launch.programs,
            "tensors": {name: asdict(figures) for name, figures in launch.tensors.items()},
        }
        for launch in traffic.launches
    ]


@contextmanager
def small_gpu(multiprocessors: int = MULTIPROCESSORS) -> Iterator[None]:
    """Make the drivers in the interpreter plan for a GPU with this number of multiprocessors."""
    name = targets.target_of(torch.device("cpu")).name
    before = targets.TARGETS[name]
    targets.TARGETS[name] = replace(before, multiprocessors=multiprocessors)
    targets.target_of.cache_clear()
    try:
        yield
    finally:
        targets.TARGETS[name] = before
        targets.target_of.cache_clear()


# --- attention --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionCase:
    """`batch, heads, kv_heads, queries, prompt, size`: B, Hq, Hkv, M = N, P, D."""

    batch: int = 4
    heads: int = 4
    kv_heads: int = 2
    queries: int = 64
    prompt: int = 64
    size: int = 16

    @property
    def name(self) -> str:
        return f"B{self.batch} H{self.heads}/{self.kv_heads} M{self.queries} P{self.prompt} D{self.size}"

    def inputs(self) -> list[Tensor]:
        """query, key, value, prompt_key, prompt_value."""
        generator = torch.Generator().manual_seed(0)

        def tensor(batch: int, heads: int, tokens: int) -> Tensor:
            return torch.randn(batch, heads, tokens, self.size, generator=generator)

        def projected(heads: int) -> Tensor:  # in memory as a projection leaves it: tokens before heads
            return tensor(self.batch, self.queries, heads).transpose(1, 2)

        made = [projected(self.heads), projected(self.kv_heads), projected(self.kv_heads)]
        made += [tensor(1, self.kv_heads, self.prompt) for _ in range(2)]
        return [one.requires_grad_() for one in made]

    def floors(self) -> tuple[int, int]:
        """Bytes of forward and backward."""
        query, *others = self.inputs()
        inputs, out = bytes_of(query, *others), bytes_of(query)
        lse = out // self.size
        query_pass = inputs + 2 * out + 2 * lse + bytes_of(query)  # reads out, dO, lse, writes dQ and delta
        key_pass = inputs + out + 2 * lse + bytes_of(*others)
        return inputs + out + lse, query_pass + key_pass


ATTENTION = [AttentionCase(batch=2), AttentionCase(batch=4), AttentionCase(queries=1, prompt=512)]


def count_attention(case: AttentionCase) -> list[Count]:
    """Forward and backward: ours, and our kernels on keys that are concatenated with copies of the prompt."""
    ours = _forward_and_backward(case, "prompt_attention", OURS, _shared)
    return ours + _forward_and_backward(case, "the same kernels, prompt concatenated", COMPOSED, _concatenated)


def _forward_and_backward(
    case: AttentionCase, implementation: str, role: str, attention: Callable[..., Tensor]
) -> list[Count]:
    inputs, floors = case.inputs(), case.floors()
    upstream = torch.ones_like(inputs[0])
    made: list[Tensor] = []

    def forward() -> None:
        made.append(attention(*inputs))

    def backward() -> None:
        torch.autograd.grad(made[0], inputs, upstream)

    return [
        count("attention forward", case.name, implementation, role, floors[0], forward),
        count("attention backward", case.name, implementation, role, floors[1], backward),
    ]


def _shared(*inputs: Tensor) -> Tensor:
    return prompt_attention(*inputs, backend=TRITON)


def _concatenated(query: Tensor, key: Tensor, value: Tensor, prompt_key: Tensor, prompt_value: Tensor) -> Tensor:
    batch = query.shape[0]
    joined = [
        torch.cat((prompt.expand(batch, -1, -1, -1), own), dim=2)
        for prompt, own in ((prompt_key, key), (prompt_value, value))
    ]
    none = [prompt[:, :, :0] for prompt in (prompt_key, prompt_value)]
    return prompt_attention(query, *joined, *none, backend=TRITON)


# --- logits -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogitsCase:
    """N rows of V logits."""

    rows: int = 8
    vocab: int = 5000

    @property
    def name(self) -> str:
        return f"N{self.rows} V{self.vocab}"


def count_logits(case: LogitsCase) -> list[Count]:
    """Forward KL from logits and its gradient, by every implementation."""
    implementations: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
        "kl_div": (OURS, lambda student, teacher: kl_div(student, teacher, backend=TRITON)),
        "F.kl_div of log-softmaxes": (COMPOSED, _pytorch_kl),
        **{name: (PEER, implementation) for name, implementation in peers.FROM_LOGITS.items()},
    }
    return [_count_logits(case, name, role, implementation) for name, (role, implementation) in implementations.items()]


def _count_logits(case: LogitsCase, name: str, role: str, implementation: Callable[[Tensor, Tensor], Tensor]) -> Count:
    floor = 5 * 4 * case.rows * case.vocab
    if reason := peers.missing(name):
        return _left_out("kl", case.name, name, role, floor, reason)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(case.rows, case.vocab, generator=generator) for _ in range(2))
    student.requires_grad_()
    return count(
        "kl", case.name, name, role, floor, lambda: torch.autograd.grad(implementation(student, teacher), student)
    )


def _pytorch_kl(student: Tensor, teacher: Tensor) -> Tensor:
    log_p_student, log_p_teacher = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(log_p_student, log_p_teacher, log_target=True, reduction="batchmean")


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


def count_head(case: HeadCase) -> list[Count]:
    """Loss and the student's gradient with a live teacher, by every implementation."""
    implementations: dict[str, tuple[str, Prepare]] = {
        "linear_kl_div": (OURS, live),
        "F.kl_div of all logits": (COMPOSED, _pytorch_linear_kl),
        **{name: (PEER, implementation) for name, implementation in peers.FROM_HIDDEN.items()},
    }
    return [
        _count_in_two_runs("linear", case, name, role, implementation, 16)
        for name, (role, implementation) in implementations.items()
    ]


def count_moments(case: HeadCase) -> list[Count]:
    """The same with a cached teacher, by every implementation: from moments, or from all its probabilities."""
    implementations: dict[str, tuple[str, Prepare]] = {
        "linear_kl_div_from_moments": (OURS, from_moments),
        **{name: (PEER, implementation) for name, implementation in peers.FROM_PROBABILITIES.items()},
    }
    return [
        _count_in_two_runs("moments", case, name, role, implementation, case.size)
        for name, (role, implementation) in implementations.items()
    ]


def live(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """The driver of `linear_kl_div`; the op itself would run its fake implementation on tensors without data."""
    from softprompt_kernels.kernels.triton.losses import linear_kl_div

    head = Head(weight, None, None, 1.0)
    problem = HeadProblem(student, teacher, head, head, None, Divergence("forward", 0.5, 1.0), None)
    return partial(linear_kl_div.forward, problem, need_gradient=True)


def from_moments(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """The driver of `linear_kl_div_from_moments`; the moments are made before the run."""
    from softprompt_kernels.kernels import moments
    from softprompt_kernels.kernels.triton.losses import expectation

    mean, entropy = torch.empty_like(teacher, dtype=torch.float32), student.new_empty(len(student), dtype=torch.float32)
    head = Head(weight, None, None, 1.0)
    problem = moments.MomentsProblem(student, mean, entropy, None, head, None, 0.0, None, 1.0, None)
    return partial(moments.forward, problem, True, expectation.forward)


def _pytorch_linear_kl(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """Plain PyTorch: what autograd keeps and makes, that is log-probabilities in fp32 and their gradient."""

    def run() -> Any:
        log_p_student = F.log_softmax((student @ weight.T).float(), dim=-1)
        log_p_teacher = F.log_softmax((teacher @ weight.T).float(), dim=-1)
        loss = F.kl_div(log_p_student, log_p_teacher, log_target=True, reduction="batchmean")
        grad_logits = (log_p_student.exp() - log_p_teacher.exp()).to(weight.dtype)
        return loss, grad_logits @ weight

    return run


def _count_in_two_runs(
    suite: str, case: HeadCase, name: str, role: str, implementation: Prepare, kernel_size: int
) -> Count:
    floor = 2 * (2 * case.vocab * case.size + 3 * case.tokens * case.size)
    if reason := peers.missing(name):
        return _left_out(suite, case.name, name, role, floor, reason)
    shapes = [(case.tokens, case.size), (case.tokens, case.size), (case.vocab, case.size)]
    run = implementation(*(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes))
    gc.collect()
    with torch.no_grad(), skip_launches() as kernels, AtenTraffic() as aten:
        result = run()
    del result
    run = implementation(*_few_rows(case, kernel_size))
    with torch.no_grad(), Traffic(MULTIPROCESSORS) as traffic:
        run()
    times = case.tokens / case.counted_rows
    issued = int(traffic.total("issued") * times)
    return Count(
        suite, case.name, name, role, floor, issued, issued, aten.read + aten.written,
        aten.flop, int(traffic.total("exponentials") * times), int(traffic.total("atomics") * times), len(kernels),
        aten.operations, aten.peak, "bf16", {"kernels": _kernels(traffic), "rows": case.counted_rows},
    )  # fmt: skip


def _few_rows(case: HeadCase, size: int) -> list[Tensor]:
    """Hidden states of a few rows, and a head. Only their first column is not 0, which makes random logits."""

    student, teacher, weight = (
        torch.zeros(rows, size, dtype=torch.float16) for rows in (case.counted_rows, case.counted_rows, case.vocab)
    )
    student[:, 0] = teacher[:, 0] = 1
    weight[:, 0] = torch.randn(case.vocab, generator=torch.Generator().manual_seed(0)).half()
    return [student, teacher, weight]


def _left_out(suite: str, case: str, implementation: str, role: str, floor: int, reason: str) -> Count:
    return Count(suite, case, implementation, role, floor, *[0] * 9, more={"left_out": reason})
