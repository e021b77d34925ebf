"""Ways to a forward KL and its gradient: the ops, and what one writes with PyTorch alone.

Each returns the mean over the tokens and the gradient for the student. `F.kl_div` makes all logits of student and
teacher; the chunked form makes those of some tokens at a time and writes its gradient out by hand, which is the best
that PyTorch alone gives. Against cached moments stands a teacher whose log-probabilities are all kept: V numbers a
token in place of d + 1, in memory that counts as input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.case import compile_afresh
from benchmarks.harness.comparison import Results
from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments

CHUNK = 128  # tokens

Call = Callable[[], Results]


class Inputs(NamedTuple):
    """Hidden states, or logits."""

    student: Tensor  # [N, d]
    teacher: Tensor  # [N, d]
    weight: Tensor  # [V, d]


# --- the ops ----------------------------------------------------------------------------------------------------------


def live(inputs: Inputs, backend: str | None = None) -> Call:
    """`linear_kl_div`."""
    return _with_gradient(inputs.student, partial(linear_kl_div, *inputs, backend=backend))


def from_moments(inputs: Inputs, backend: str | None = None) -> Call:
    """`linear_kl_div_from_moments`."""
    moments = teacher_moments(inputs.teacher, inputs.weight, backend=backend)
    loss = partial(linear_kl_div_from_moments, inputs.student, moments, inputs.weight, backend=backend)
    return _with_gradient(inputs.student, loss)


def from_logits(inputs: Inputs, backend: str | None = None) -> Call:
    """`kl_div`."""
    return _with_gradient(inputs.student, partial(kl_div, inputs.student, inputs.teacher, backend=backend))


# --- PyTorch alone ----------------------------------------------------------------------------------------------------


def plain_logits(inputs: Inputs) -> Call:
    """`F.kl_div` of logits."""
    return _with_gradient(inputs.student, partial(_kl_of_logits, inputs.student, inputs.teacher))


def plain(inputs: Inputs) -> Call:
    """`F.kl_div` of hidden states."""
    return _with_gradient(inputs.student, partial(_kl_of_hidden, *inputs))


def kept(inputs: Inputs) -> Call:
    """`F.kl_div`, the teacher's log-probabilities being there."""
    return _with_gradient(inputs.student, partial(_kl_of_kept, inputs.student, _kept(inputs), inputs.weight))


def chunked(inputs: Inputs) -> Call:
    """Some tokens at a time, gradient by hand."""

    def call() -> Results:
        student, teacher, weight = (tensor.detach() for tensor in inputs)
        loss, gradient = student.new_zeros(()), torch.empty_like(student)
        for start in range(0, student.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            ours = F.log_softmax(student[rows] @ weight.T, dim=-1)
            theirs = F.log_softmax(teacher[rows] @ weight.T, dim=-1)
            loss += F.kl_div(ours, theirs, log_target=True, reduction="sum")
            torch.mm(ours.exp_().sub_(theirs.exp_()), weight, out=gradient[rows])
        return loss / student.shape[0], gradient / student.shape[0]

    return call


def chunked_kept(inputs: Inputs) -> Call:
    """Some tokens at a time, the teacher's log-probabilities being there."""
    log_probabilities = _kept(inputs)

    def call() -> Results:
        student, _, weight = (tensor.detach() for tensor in inputs)
        loss, gradient = student.new_zeros(()), torch.empty_like(student)
        for start in range(0, student.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            ours, theirs = F.log_softmax(student[rows] @ weight.T, dim=-1), log_probabilities[rows]
            loss += F.kl_div(ours, theirs, log_target=True, reduction="sum")
            torch.mm(ours.exp_().sub_(theirs.exp()), weight, out=gradient[rows])
        return loss / student.shape[0], gradient / student.shape[0]

    return call


def compiled(inputs: Inputs) -> Call:
    """`F.kl_div` of hidden states, through torch.compile."""
    return _with_gradient(inputs.student, partial(compile_afresh(_kl_of_hidden), *inputs))


def compiled_kept(inputs: Inputs) -> Call:
    """The same, with the teacher's log-probabilities being there."""
    function = compile_afresh(_kl_of_kept)
    return _with_gradient(inputs.student, partial(function, inputs.student, _kept(inputs), inputs.weight))


def compiled_logits(inputs: Inputs) -> Call:
    """`F.kl_div` of logits, through torch.compile."""
    function = compile_afresh(_kl_of_logits)
    return _with_gradient(inputs.student, partial(function, inputs.student, inputs.teacher))


# --- floors -----------------------------------------------------------------------------------------------------------


def products(inputs: Inputs, logits: int) -> Call:
    """So many bare products to logits and one back, into memory that is there."""
    student, _, weight = (tensor.detach() for tensor in inputs)
    out, gradient = student.new_zeros(student.shape[0], weight.shape[0]), torch.zeros_like(student)

    def call() -> Results:
        for _ in range(logits):
            torch.mm(student, weight.T, out=out)
        return (torch.mm(out, weight, out=gradient),)

    return call


def one_pass(inputs: Inputs) -> Call:
    """Reads two tensors and writes a third of the logits' size."""
    student, teacher, _ = (tensor.detach() for tensor in inputs)
    out = torch.zeros_like(student)
    return lambda: (torch.sub(student, teacher, out=out),)


# --- parts ------------------------------------------------------------------------------------------------------------


def _with_gradient(student: Tensor, loss: Callable[[], Tensor]) -> Call:
    def call() -> Results:
        value = loss()
        return (value, *torch.autograd.grad(value, student))

    return call


def _kl_of_logits(student: Tensor, teacher: Tensor) -> Tensor:
    ours, theirs = F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)
    return F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def _kl_of_hidden(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    return _kl_of_logits(student @ weight.T, teacher @ weight.T)


def _kl_of_kept(student: Tensor, log_probabilities: Tensor, weight: Tensor) -> Tensor:
    ours = F.log_softmax(student @ weight.T, dim=-1)
    return F.kl_div(ours, log_probabilities, log_target=True, reduction="batchmean")


def _kept(inputs: Inputs) -> Tensor:
    return F.log_softmax(inputs.teacher @ inputs.weight.T, dim=-1)


# kind -> ours, composed, the others by name, the floor and its name
OF_KIND = {
    "live": (
        live,
        partial(live, backend="composed"),
        {"F.kl_div of all logits": plain, "chunks of tokens, by hand": chunked},
        ("3 bare products", partial(products, logits=2)),
    ),
    "moments": (
        from_moments,
        partial(from_moments, backend="composed"),
        {"F.kl_div, teacher kept": kept, "chunks by hand, teacher kept": chunked_kept},
        ("2 bare products", partial(products, logits=1)),
    ),
    "logits": (
        from_logits,
        partial(from_logits, backend="composed"),
        {"F.kl_div of logits": plain_logits},
        ("one pass", one_pass),
    ),
}
COMPILED = {
    "live": {"F.kl_div of all logits, compiled": compiled},
    "moments": {"F.kl_div, teacher kept, compiled": compiled_kept},
    "logits": {"F.kl_div of logits, compiled": compiled_logits},
}
