"""What the counters count: problems, ways to solve them, and the floor of each.

| suite | problem |
|---|---|
| attention | B sequences behind a shared prompt, forward, and backward to all five inputs |
| kl | two matrices of logits, forward KL and its gradient |
| linear | hidden states of both sides and a shared frozen head, N 8192, d 4096, V 128256, bf16; KL and gradient |
| moments | the same, the teacher having been reduced before |

Floors, in bytes. Attention forward: inputs and results once; backward: a pass over rows reads inputs, dO, out and lse
and writes dQ, a pass over keys reads inputs, dO, lse and rowsum(dO∘out) again and writes the other gradients. kl: both
logits forward, both again and the gradient backward. The others: the head twice, for the logits and for the way back,
hidden states and the gradient once; the logits would never leave the chip, which no way here achieves.

Interpreted problems are small, and so is the GPU they are planned for: `small_gpu(16)` has 16 multiprocessors, which is
the group of programs that share an L2 cache in traffic.py too.

`linear` and `moments` are too large for the interpreter and are put together: PyTorch's operations and the memory from
a run on tensors without data, where kernels are skipped, and the kernels' traffic from a run of few rows at the full V,
fp16 in place of bf16, times the rows. All of these kernels work row by row.
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
from benchmarks.counted.aten_traffic import AtenTraffic, bytes_of, unlaunched
from benchmarks.counted.triton_traffic import Traffic
from softprompt_kernels import kl_div, prompt_attention
from softprompt_kernels.kernels.problems.loss import Divergence, Head, HeadProblem
from softprompt_kernels.kernels.triton import targets

MULTIPROCESSORS = 16
Prepare = Callable[[Tensor, Tensor, Tensor], Callable[[], Any]]  # of student, teacher and head: does the work once
OURS, PEER, COMPOSED = "ours", "peer", "plain PyTorch"
TRITON = "triton"


@dataclass
class Count:
    """What one way does for one problem. Bytes count both directions."""

    suite: str
    case: str
    way: str
    role: str
    floor: int
    grouped: int  # of kernels, each byte once a group of programs; see traffic.py
    issued: int  # of kernels
    aten: int  # of PyTorch's operations
    flop: int
    exponentials: int
    atomics: int
    launches: int  # of kernels
    operations: int  # of PyTorch
    peak: int  # bytes that were made on the way and are alive together
    dtype: str = "fp32"
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def moved(self) -> int:
        """Bytes through memory, by the model."""
        return self.grouped + self.aten

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"moved": self.moved, "times_floor": self.moved / self.floor}


def count(suite: str, case: str, way: str, role: str, floor: int, run: Callable[[], Any]) -> Count:
    """Runs a way once, in the interpreter."""
    gc.collect()
    with small_gpu(), AtenTraffic() as aten, Traffic(MULTIPROCESSORS) as traffic:
        run()
    made = Count(
        suite,
        case,
        way,
        role,
        floor,
        traffic.total("grouped"),
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
    """In the interpreter, drivers plan for a GPU of so many multiprocessors."""
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
    """Letters as in attention_problem.py."""

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

        def projected(heads: int) -> Tensor:  # in memory as projections leave them, tokens before heads
            return tensor(self.batch, self.queries, heads).transpose(1, 2)

        made = [projected(self.heads), projected(self.kv_heads), projected(self.kv_heads)]
        made += [tensor(1, self.kv_heads, self.prompt) for _ in range(2)]
        return [one.requires_grad_() for one in made]

    def floors(self) -> tuple[int, int]:
        """Forward and backward."""
        query, *others = self.inputs()
        inputs, out = bytes_of(query, *others), bytes_of(query)
        lse = out // self.size
        of_rows = inputs + 2 * out + 2 * lse + bytes_of(query)  # reads out, dO, lse, writes dQ and delta
        of_keys = inputs + out + 2 * lse + bytes_of(*others)
        return inputs + out + lse, of_rows + of_keys


ATTENTION = [AttentionCase(batch=2), AttentionCase(batch=4), AttentionCase(queries=1, prompt=512)]


def count_attention(case: AttentionCase) -> list[Count]:
    """Forward and backward, ours, and with the prompt copied to every sequence in front of its own keys."""
    ours = _forward_and_backward(case, "prompt_attention", OURS, _shared)
    return ours + _forward_and_backward(case, "the same kernels, prompt concatenated", COMPOSED, _concatenated)


def _forward_and_backward(case: AttentionCase, way: str, role: str, attention: Callable[..., Tensor]) -> list[Count]:
    inputs, floors = case.inputs(), case.floors()
    upstream = torch.ones_like(inputs[0])
    made: list[Tensor] = []

    def forward() -> None:
        made.append(attention(*inputs))

    def backward() -> None:
        torch.autograd.grad(made[0], inputs, upstream)

    return [
        count("attention forward", case.name, way, role, floors[0], forward),
        count("attention backward", case.name, way, role, floors[1], backward),
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
    """N rows of V."""

    rows: int = 8
    vocab: int = 5000

    @property
    def name(self) -> str:
        return f"N{self.rows} V{self.vocab}"


def count_logits(case: LogitsCase) -> list[Count]:
    """Forward KL from logits and its gradient, of every way that can be run."""
    ways: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
        "kl_div": (OURS, lambda student, teacher: kl_div(student, teacher, backend=TRITON)),
        "F.kl_div of log-softmaxes": (COMPOSED, _plain),
        **{name: (PEER, way) for name, way in peers.FROM_LOGITS.items()},
    }
    return [_count_logits(case, name, role, way) for name, (role, way) in ways.items()]


def _count_logits(case: LogitsCase, name: str, role: str, way: Callable[[Tensor, Tensor], Tensor]) -> Count:
    floor = 5 * 4 * case.rows * case.vocab
    if reason := peers.missing(name):
        return _left_out("kl", case.name, name, role, floor, reason)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(case.rows, case.vocab, generator=generator) for _ in range(2))
    student.requires_grad_()
    return count("kl", case.name, name, role, floor, lambda: torch.autograd.grad(way(student, teacher), student))


def _plain(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


# --- hidden states ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeadCase:
    """N tokens of size d, V words."""

    tokens: int = 8192
    size: int = 4096
    vocab: int = 128256
    sampled: int = 4  # rows that kernels are counted for

    @property
    def name(self) -> str:
        return f"N{self.tokens} d{self.size} V{self.vocab} bf16"


def count_head(case: HeadCase) -> list[Count]:
    """Loss and gradient by the student with a live teacher, of every way."""
    ways: dict[str, tuple[str, Prepare]] = {
        "linear_kl_div": (OURS, live),
        "F.kl_div of all logits": (COMPOSED, _plain_head),
        **{name: (PEER, way) for name, way in peers.FROM_HIDDEN.items()},
    }
    return [_composition("linear", case, name, role, way, 16) for name, (role, way) in ways.items()]


def count_moments(case: HeadCase) -> list[Count]:
    """The same with what an earlier pass of the teacher has left: moments, or all its probabilities."""
    ways: dict[str, tuple[str, Prepare]] = {
        "linear_kl_div_from_moments": (OURS, from_moments),
        **{name: (PEER, way) for name, way in peers.FROM_PROBABILITIES.items()},
    }
    return [_composition("moments", case, name, role, way, case.size) for name, (role, way) in ways.items()]


def live(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """The driver itself: on tensors without data the op would be simulated."""
    from softprompt_kernels.kernels.triton.losses import linear_kl_div

    head = Head(weight, None, None, 1.0)
    problem = HeadProblem(student, teacher, head, head, None, Divergence("forward", 0.5, 1.0), None)
    return partial(linear_kl_div.forward, problem, need_gradient=True)


def from_moments(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """The driver; moments are made before."""
    from softprompt_kernels.kernels import moments
    from softprompt_kernels.kernels.triton.losses import expectation

    mean, entropy = torch.empty_like(teacher, dtype=torch.float32), student.new_empty(len(student), dtype=torch.float32)
    head = Head(weight, None, None, 1.0)
    problem = moments.MomentsProblem(student, mean, entropy, None, head, None, 0.0, None, 1.0, None)
    return partial(moments.forward, problem, True, expectation.forward)


def _plain_head(student: Tensor, teacher: Tensor, weight: Tensor) -> Callable[[], Any]:
    """What autograd keeps and makes: log-probabilities in fp32, and their gradient."""

    def run() -> Any:
        ours = F.log_softmax((student @ weight.T).float(), dim=-1)
        theirs = F.log_softmax((teacher @ weight.T).float(), dim=-1)
        loss = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        by_logits = (ours.exp() - theirs.exp()).to(weight.dtype)
        return loss, by_logits @ weight

    return run


def _composition(suite: str, case: HeadCase, name: str, role: str, way: Prepare, sampled_size: int) -> Count:
    floor = 2 * (2 * case.vocab * case.size + 3 * case.tokens * case.size)
    if reason := peers.missing(name):
        return _left_out(suite, case.name, name, role, floor, reason)
    shapes = [(case.tokens, case.size), (case.tokens, case.size), (case.vocab, case.size)]
    run = way(*(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes))
    gc.collect()
    with torch.no_grad(), unlaunched() as kernels, AtenTraffic() as aten:
        result = run()
    del result
    run = way(*_few(case, sampled_size))
    with torch.no_grad(), Traffic(MULTIPROCESSORS) as traffic:
        run()
    times = case.tokens / case.sampled
    issued = int(traffic.total("issued") * times)
    return Count(
        suite, case.name, name, role, floor, issued, issued, aten.read + aten.written,
        aten.flop, int(traffic.total("exponentials") * times), int(traffic.total("atomics") * times), len(kernels),
        aten.operations, aten.peak, "bf16", {"kernels": _kernels(traffic), "rows": case.sampled},
    )  # fmt: skip


def _few(case: HeadCase, size: int) -> list[Tensor]:
    """Hidden states of few rows and a head, whose logits are random although most of both is 0."""
    student, teacher, weight = (
        torch.zeros(rows, size, dtype=torch.float16) for rows in (case.sampled, case.sampled, case.vocab)
    )
    student[:, 0] = teacher[:, 0] = 1
    weight[:, 0] = torch.randn(case.vocab, generator=torch.Generator().manual_seed(0)).half()
    return [student, teacher, weight]


def _left_out(suite: str, case: str, way: str, role: str, floor: int, reason: str) -> Count:
    return Count(suite, case, way, role, floor, *[0] * 9, more={"left_out": reason})
