"""Implementations of a forward KL and its gradient: the ops, and what one writes with PyTorch alone.

Each returns the mean loss over the tokens and the gradient of the student's hidden states (or logits). `F.kl_div` makes
all logits of student and teacher. The chunked form makes the logits of some tokens at a time and computes the gradient
by hand, which is the best that PyTorch alone gives.

The baselines of the op that takes cached moments get a cached teacher too: its log-probabilities for the whole
vocabulary. These are V numbers a token in place of d + 1, and their memory counts as input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from softprompt_kernels.bench.peers import eager
from softprompt_kernels.bench.peers.compiled import compile_for_one_size
from softprompt_kernels.bench.rounds import Results
from softprompt_kernels.ops import kl_div, linear_kl_div, linear_kl_div_from_moments, teacher_moments
from softprompt_kernels.testing.losses import HeadInputs as Inputs  # logits [N, V] in place of states for `logits`

CHUNK = 128  # tokens

Call = Callable[[], Results]


# --- the ops ----------------------------------------------------------------------------------------------------------


def live(inputs: Inputs, backend: str | None = None) -> Call:
    """`linear_kl_div`."""
    return _with_gradient(inputs.student, partial(linear_kl_div, *inputs, backend=backend))


def from_moments(inputs: Inputs, backend: str | None = None) -> Call:
    """`linear_kl_div_from_moments`; the moments count as input."""
    moments = teacher_moments(inputs.teacher, inputs.weight, backend=backend)
    loss = partial(linear_kl_div_from_moments, inputs.student, moments, inputs.weight, backend=backend)
    return _with_gradient(inputs.student, loss)


def from_logits(inputs: Inputs, backend: str | None = None) -> Call:
    """`kl_div`."""
    return _with_gradient(inputs.student, partial(kl_div, inputs.student, inputs.teacher, backend=backend))


# --- PyTorch alone ----------------------------------------------------------------------------------------------------


def kl_div_of_given_logits(inputs: Inputs) -> Call:
    """`F.kl_div` of logits that are the inputs."""
    return _with_gradient(inputs.student, partial(eager.kl_of_logits, inputs.student, inputs.teacher))


def kl_div_of_all_logits(inputs: Inputs) -> Call:
    """`F.kl_div` of the logits of all tokens, made from hidden states."""
    return _with_gradient(inputs.student, partial(eager.kl_of_hidden, *inputs))


def kl_div_with_cached_teacher(inputs: Inputs) -> Call:
    """`F.kl_div`, with the teacher's log-probabilities as input."""
    log_p_teacher = eager.teacher_log_probabilities(inputs)
    loss = partial(eager.kl_of_cached_teacher, inputs.student, log_p_teacher, inputs.weight)
    return _with_gradient(inputs.student, loss)


def chunked(inputs: Inputs) -> Call:
    """Some tokens at a time, with the gradient by hand."""

    def call() -> Results:
        student, teacher, weight = (tensor.detach() for tensor in inputs)
        loss, gradient = student.new_zeros(()), torch.empty_like(student)
        for start in range(0, student.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            log_p_student = F.log_softmax(student[rows] @ weight.T, dim=-1)
            log_p_teacher = F.log_softmax(teacher[rows] @ weight.T, dim=-1)
            loss += F.kl_div(log_p_student, log_p_teacher, log_target=True, reduction="sum")
            torch.mm(log_p_student.exp_().sub_(log_p_teacher.exp_()), weight, out=gradient[rows])
        return loss / student.shape[0], gradient / student.shape[0]

    return call


def chunked_with_cached_teacher(inputs: Inputs) -> Call:
    """Some tokens at a time, with the teacher's log-probabilities as input."""
    log_probabilities = eager.teacher_log_probabilities(inputs)

    def call() -> Results:
        student, _, weight = (tensor.detach() for tensor in inputs)
        loss, gradient = student.new_zeros(()), torch.empty_like(student)
        for start in range(0, student.shape[0], CHUNK):
            rows = slice(start, start + CHUNK)
            log_p_student, log_p_teacher = F.log_softmax(student[rows] @ weight.T, dim=-1), log_probabilities[rows]
            loss += F.kl_div(log_p_student, log_p_teacher, log_target=True, reduction="sum")
            torch.mm(log_p_student.exp_().sub_(log_p_teacher.exp()), weight, out=gradient[rows])
        return loss / student.shape[0], gradient / student.shape[0]

    return call


def compiled(inputs: Inputs) -> Call:
    """`kl_div_of_all_logits`, compiled by torch.compile."""
    return _with_gradient(inputs.student, partial(compile_for_one_size(eager.kl_of_hidden), *inputs))


def compiled_with_cached_teacher(inputs: Inputs) -> Call:
    """`kl_div_with_cached_teacher`, compiled by torch.compile."""
    function = compile_for_one_size(eager.kl_of_cached_teacher)
    loss = partial(function, inputs.student, eager.teacher_log_probabilities(inputs), inputs.weight)
    return _with_gradient(inputs.student, loss)


def compiled_logits(inputs: Inputs) -> Call:
    """`kl_div_of_given_logits`, compiled by torch.compile."""
    function = compile_for_one_size(eager.kl_of_logits)
    return _with_gradient(inputs.student, partial(function, inputs.student, inputs.teacher))


# --- floors -----------------------------------------------------------------------------------------------------------


def bare_gemms(inputs: Inputs, logits: int) -> Call:
    """`logits` GEMMs from hidden states to logits and one back, each into an existing output."""
    student, _, weight = (tensor.detach() for tensor in inputs)
    out, gradient = student.new_zeros(student.shape[0], weight.shape[0]), torch.zeros_like(student)

    def call() -> Results:
        for _ in range(logits):
            torch.mm(student, weight.T, out=out)
        return (torch.mm(out, weight, out=gradient),)

    return call


def one_pass(inputs: Inputs) -> Call:
    """Reads two tensors of the logits' size and writes a third."""
    student, teacher, _ = (tensor.detach() for tensor in inputs)
    out = torch.zeros_like(student)
    return lambda: (torch.sub(student, teacher, out=out),)


# --- parts ------------------------------------------------------------------------------------------------------------


def _with_gradient(student: Tensor, loss: Callable[[], Tensor]) -> Call:
    def call() -> Results:
        value = loss()
        return (value, *torch.autograd.grad(value, student))

    return call


class Implementations(NamedTuple):
    """The implementations of one kind of problem."""

    ours: Callable[[Inputs], Call]
    composed: Callable[[Inputs], Call]
    baselines: dict[str, Callable[[Inputs], Call]]
    floor_name: str
    floor: Callable[[Inputs], Call]


BY_KIND = {
    "live": Implementations(
        live,
        partial(live, backend="composed"),
        {"F.kl_div of all logits": kl_div_of_all_logits, "chunked by hand": chunked},
        "3 bare GEMMs",
        partial(bare_gemms, logits=2),
    ),
    "moments": Implementations(
        from_moments,
        partial(from_moments, backend="composed"),
        {
            "F.kl_div, cached teacher": kl_div_with_cached_teacher,
            "chunked by hand, cached teacher": chunked_with_cached_teacher,
        },
        "2 bare GEMMs",
        partial(bare_gemms, logits=1),
    ),
    "logits": Implementations(
        from_logits,
        partial(from_logits, backend="composed"),
        {"F.kl_div of logits": kl_div_of_given_logits},
        "one pass over the logits",
        one_pass,
    ),
}
COMPILED = {
    "live": {"F.kl_div of all logits, compiled": compiled},
    "moments": {"F.kl_div, cached teacher, compiled": compiled_with_cached_teacher},
    "logits": {"F.kl_div of logits, compiled": compiled_logits},
}
