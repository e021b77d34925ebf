"""Cases of the losses. N tokens, hidden states of size d, a vocabulary of V.

The logits of the teacher have a standard deviation of 3. The student is the teacher plus a tenth of noise. Losses are
the mean over the tokens. U = 2·N·V·d FLOP is one GEMM of the head's size; the head is frozen.

| op | FLOP forward, backward | bytes forward, backward, in elements |
|---|---|---|
| `kl_div` | none | 2NV (both logits), 3NV (both again, and the gradient) |
| `linear_kl_div` | 2U (both logits), 1U (gradient of the hidden states) | Vd + 2Nd, Vd + Nd |
| `linear_kl_div_from_moments` | 1U (the student's logits), 1U | Vd + 2Nd, Vd + Nd |
| `linear_cross_entropy` | 1U, 1U | Vd + Nd, Vd + Nd |
| `teacher_moments` | 2U (logits, expectation of the head's rows) | 2Vd + Nd, and N·(d + 1) written in fp32 |

`linear_cross_entropy` is no op: it is `linear_kl_div_from_moments` with labels alone, a loss that other packages have.

The head is read twice, for the logits and for the gradient, and logits never leave the chip; no known implementation
achieves this. The moments count as many bytes as hidden states of the same dtype.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments
from softprompt_kernels.testing.case import BACKWARD, BOTH, FORWARD, Case

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


class LogitsInputs(NamedTuple):
    """Logits of student and teacher."""

    student: Tensor  # [N, V]
    teacher: Tensor  # [N, V]


class HeadInputs(NamedTuple):
    """Hidden states of student and teacher, and the head that both share."""

    student: Tensor  # [N, d]
    teacher: Tensor  # [N, d]
    weight: Tensor  # [V, d]


class LabelInputs(NamedTuple):
    """Hidden states of the student, the head, and the labels."""

    student: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    labels: Tensor  # [N] int64


class TeacherInputs(NamedTuple):
    """Hidden states of the teacher, and the head."""

    teacher: Tensor  # [N, d]
    weight: Tensor  # [V, d]


@dataclass(frozen=True)
class _LossCase(Case):
    """What the cases of the losses share."""

    result_names: ClassVar[tuple[str, ...]] = ("loss", "dstudent")

    tokens: int

    def sources(self, inputs: Any) -> tuple[Tensor, ...]:
        return (inputs.student,)

    def grad_out(self, inputs: Any) -> None:
        return None

    def result_bytes(self, pass_: str | None = None, dtype: torch.dtype = torch.float32) -> int:
        loss, gradient = max(4, dtype.itemsize), self.tokens * self._row() * dtype.itemsize
        return {FORWARD: loss, BACKWARD: gradient, BOTH: loss + gradient}[self.check_pass(pass_)]

    @abstractmethod
    def _row(self) -> int:
        """Numbers in a row of the student."""

    def tolerance(self, dtype: torch.dtype) -> float:
        return TOLERANCES[dtype]

    def reduced(self, flop: float) -> Self:
        return replace(self, tokens=max(1, min(self.tokens, int(flop * self.tokens / (self._cost() or 1)))))

    def _cost(self) -> float:
        """FLOP of all passes."""
        return self.flop()


@dataclass(frozen=True)
class KlDivCase(_LossCase):
    """`kl_div` of N rows of V logits, for example `KlDivCase(512, 49152)`.

    Args:
        tokens, vocab: N, V.
    """

    op: ClassVar[str] = "kl_div"
    letters: ClassVar[tuple[str, ...]] = ("N", "V")

    vocab: int

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {"N": (self.tokens,), "V": (self.vocab,)}

    def inputs(
        self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
    ) -> LogitsInputs:
        generator = torch.Generator().manual_seed(seed)
        teacher = 3 * torch.randn(self.tokens, self.vocab, generator=generator)
        student = teacher + 0.3 * torch.randn(self.tokens, self.vocab, generator=generator)
        return LogitsInputs(student.to(device, dtype).requires_grad_(), teacher.to(device, dtype))

    def forward(self, inputs: LogitsInputs, backend: str | None = None) -> Callable[[], Tensor]:
        return partial(kl_div, *inputs, backend=backend)

    def flop(self, pass_: str | None = None) -> float:
        self.check_pass(pass_)
        return 0.0

    def bytes(self, pass_: str | None = None, dtype: torch.dtype = torch.float32) -> int:
        pass_ = self.check_pass(pass_)
        return {FORWARD: 2, BACKWARD: 3, BOTH: 5}[pass_] * self.tokens * self.vocab * dtype.itemsize

    def tiny(self) -> Self:
        return replace(self, tokens=5, vocab=40)

    def _row(self) -> int:
        return self.vocab

    def _cost(self) -> float:
        return 50.0 * self.tokens * self.vocab  # the reference's, in float64: exponentials, and passes over memory


@dataclass(frozen=True)
class _HeadCase(_LossCase):
    """What the cases of the losses from hidden states share."""

    letters: ClassVar[tuple[str, ...]] = ("N", "d", "V")
    gemms: ClassVar[dict[str, int]]

    size: int
    vocab: int

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        return {"N": (self.tokens,), "d": (self.size,), "V": (self.vocab,)}

    def inputs(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0) -> Any:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(self.vocab, self.size, generator=generator).mul_(3 / self.size**0.5)
        teacher = torch.randn(self.tokens, self.size, generator=generator)
        student = teacher + 0.1 * torch.randn(self.tokens, self.size, generator=generator)
        student, teacher, weight = (tensor.to(device, dtype) for tensor in (student, teacher, weight))
        return self._inputs(student, teacher, weight, generator)

    def _inputs(self, student: Tensor, teacher: Tensor, weight: Tensor, generator: torch.Generator) -> Any:
        return HeadInputs(student.requires_grad_(), teacher, weight)

    def flop(self, pass_: str | None = None) -> float:
        pass_ = self.check_pass(pass_)
        return self.gemms[pass_] * 2.0 * self.tokens * self.size * self.vocab

    def bytes(self, pass_: str | None = None, dtype: torch.dtype = torch.float32) -> int:
        pass_ = self.check_pass(pass_)
        head, hidden = self.vocab * self.size, self.tokens * self.size
        elements = {FORWARD: head + 2 * hidden, BACKWARD: head + hidden, BOTH: 2 * head + 3 * hidden}
        return elements[pass_] * dtype.itemsize

    def _row(self) -> int:
        return self.size

    def tiny(self) -> Self:
        return replace(self, tokens=5, size=8, vocab=40)

    @abstractmethod
    def forward(self, inputs: Any, backend: str | None = None) -> Callable[[], Tensor | tuple[Tensor, ...]]:
        """See `Case`."""


@dataclass(frozen=True)
class LinearKlDivCase(_HeadCase):
    """`linear_kl_div` with one frozen head for both, for example `LinearKlDivCase(512, 576, 49152)`.

    Args:
        tokens, size, vocab: N, d, V.
    """

    op: ClassVar[str] = "linear_kl_div"
    gemms: ClassVar[dict[str, int]] = {FORWARD: 2, BACKWARD: 1, BOTH: 3}

    def forward(self, inputs: HeadInputs, backend: str | None = None) -> Callable[[], Tensor]:
        return partial(linear_kl_div, *inputs, backend=backend)


@dataclass(frozen=True)
class LinearKlDivFromMomentsCase(_HeadCase):
    """`linear_kl_div_from_moments`, for example `LinearKlDivFromMomentsCase(512, 576, 49152)`. Moments are made before.

    Args:
        tokens, size, vocab: N, d, V.
    """

    op: ClassVar[str] = "linear_kl_div_from_moments"
    gemms: ClassVar[dict[str, int]] = {FORWARD: 1, BACKWARD: 1, BOTH: 2}

    def forward(self, inputs: HeadInputs, backend: str | None = None) -> Callable[[], Tensor]:
        moments = teacher_moments(inputs.teacher, inputs.weight, backend=backend)
        return partial(linear_kl_div_from_moments, inputs.student, moments, inputs.weight, backend=backend)


@dataclass(frozen=True)
class LinearCrossEntropyCase(_HeadCase):
    """`linear_kl_div_from_moments` with labels and alone, for example `LinearCrossEntropyCase(512, 576, 49152)`.

    Args:
        tokens, size, vocab: N, d, V.
    """

    op: ClassVar[str] = "linear_cross_entropy"
    gemms: ClassVar[dict[str, int]] = {FORWARD: 1, BACKWARD: 1, BOTH: 2}

    @property
    def function(self) -> str:
        return LinearKlDivFromMomentsCase.op

    def _inputs(self, student: Tensor, teacher: Tensor, weight: Tensor, generator: torch.Generator) -> LabelInputs:
        labels = torch.randint(self.vocab, (self.tokens,), generator=generator)
        return LabelInputs(student.requires_grad_(), weight, labels.to(student.device))

    def forward(self, inputs: LabelInputs, backend: str | None = None) -> Callable[[], Tensor]:
        student, weight, labels = inputs
        return partial(
            linear_kl_div_from_moments, student, None, weight, labels=labels, label_weight=1.0, backend=backend
        )

    def bytes(self, pass_: str | None = None, dtype: torch.dtype = torch.float32) -> int:
        pass_ = self.check_pass(pass_)
        return (2 if pass_ == BOTH else 1) * (self.vocab + self.tokens) * self.size * dtype.itemsize


@dataclass(frozen=True)
class TeacherMomentsCase(_HeadCase):
    """`teacher_moments`, which has no gradient, for example `TeacherMomentsCase(512, 576, 49152)`.

    Its results are the expectation of the head's rows and the entropy.

    Args:
        tokens, size, vocab: N, d, V.
    """

    op: ClassVar[str] = "teacher_moments"
    passes: ClassVar[tuple[str, ...]] = (FORWARD,)
    result_names: ClassVar[tuple[str, ...]] = ("mean", "entropy")
    gemms: ClassVar[dict[str, int]] = {FORWARD: 2}

    def _inputs(self, student: Tensor, teacher: Tensor, weight: Tensor, generator: torch.Generator) -> TeacherInputs:
        return TeacherInputs(teacher, weight)

    def forward(self, inputs: TeacherInputs, backend: str | None = None) -> Callable[[], tuple[Tensor, Tensor]]:
        def moments() -> tuple[Tensor, Tensor]:
            made = teacher_moments(*inputs, backend=backend)
            return made.mean, made.entropy

        return moments

    def sources(self, inputs: TeacherInputs) -> tuple[Tensor, ...]:
        return ()

    def bytes(self, pass_: str | None = None, dtype: torch.dtype = torch.float32) -> int:
        self.check_pass(pass_)
        head, hidden = self.vocab * self.size, self.tokens * self.size
        return (2 * head + hidden) * dtype.itemsize + self.tokens * (self.size + 1) * max(4, dtype.itemsize)

    def result_bytes(self, pass_: str | None = None, dtype: torch.dtype = torch.float32) -> int:
        self.check_pass(pass_)
        return self.tokens * (self.size + 1) * max(4, dtype.itemsize)
