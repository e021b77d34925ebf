"""A user's own training loss: a function of Python that a run imports by name, "package.module:function".

    function(student, teacher, head, labels) -> losses

    student   [n, d]   the student's last hidden states, differentiable, in the model's dtype
    teacher   [n, d]   the teacher's
    head               `Head`: `head.logits(hidden)` gives logits [n, V]; `head.weight [V, d]`
    labels    [n]      int64, the tokens that follow
    losses    [n]      floating point, one loss a token, in nats if it is to be compared with others

How it is found, and that it is code which runs: `sources/named_function.py`.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.sources.named_function import load_function
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head, prompted_hidden

LossFunction = Callable[[Tensor, Tensor, Head, Tensor], Tensor]
SIGNATURE = "function(student [n, d], teacher [n, d], head, labels [n]) -> losses [n]"
_TRIED_TOKENS = 4


def load_own_loss(name: str) -> LossFunction:
    """The function that `name` ("package.module:function") names. Its module is imported, which runs it.

    Raises:
        SoftPromptError: the module cannot be imported, or has no such function.
    """
    return load_function("objective", name, f"a function: {SIGNATURE}")


def source_digest(function: LossFunction) -> str:
    """The SHA-256 of the file that a function stands in, hexadecimal: with another one, a run is another run.

    Of what stands in a script or a notebook, the source of the function alone.

    Raises:
        SoftPromptError: there is no source.
    """
    module = sys.modules.get(getattr(function, "__module__", ""))
    try:
        if module is not None and module.__name__ != "__main__" and getattr(module, "__file__", None):
            return hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()
    except (OSError, TypeError) as error:
        raise SoftPromptError(
            f"objective: the source of {_name(function)} cannot be read, which tells runs apart; "
            "accepted is a function in a file of Python"
        ) from error


def call_own_loss(function: LossFunction, student: Tensor, teacher: Tensor, head: Head, labels: Tensor) -> Tensor:
    """`[n]` fp32 (float64 for float64 students): the losses of the tokens. Arguments as above, in the file's head.

    Raises:
        SoftPromptError: the function returns something else.
    """
    losses = function(student, teacher, head, labels)
    wanted = f"accepted is a floating tensor of shape [{student.shape[0]}], one loss a token"
    if not isinstance(losses, Tensor):
        raise SoftPromptError(f"objective: {_name(function)} returns {type(losses).__name__}, {wanted}")
    if losses.shape != student.shape[:1] or not losses.is_floating_point():
        kind = str(losses.dtype).removeprefix("torch.")
        raise SoftPromptError(f"objective: {_name(function)} returns {kind} of shape {list(losses.shape)}, {wanted}")
    return losses if losses.dtype == torch.float64 else losses.float()


def check_own_loss(function: LossFunction, model: PreTrainedModel, head: Head, ids: Tensor) -> None:
    """Try a loss on a few hidden states of the model, as a training step would.

    Args:
        function: the loss.
        model: prepared.
        head: of the model.
        ids: `[1, m]` int64: any tokens, at least two.

    Raises:
        SoftPromptError: the function raises, returns something else than losses, a loss or gradient that is not finite,
            or a loss that does not depend on the student.
    """
    with torch.no_grad():
        hidden = prompted_hidden(model, ids[:, : _TRIED_TOKENS + 1], None)[0]
    source_digest(function)
    for rows in (hidden.shape[0] - 1, 1):
        student, teacher = hidden[:rows].clone().requires_grad_(), hidden[1 : rows + 1].clone()
        try:
            losses = call_own_loss(function, student, teacher, head, ids[0, 1 : rows + 1])
            gradient = torch.autograd.grad(losses.sum(), student)[0] if losses.requires_grad else None
        except SoftPromptError:
            raise
        except Exception as error:  # the function is the user's: it may raise anything
            raise SoftPromptError(
                f"objective: {_name(function)} fails on {rows} tokens ({_words(error)}), accepted is {SIGNATURE}"
            ) from error
        for what, tensor in (("losses", losses), ("gradients", gradient)):
            if tensor is not None and not bool(tensor.isfinite().all()):
                raise SoftPromptError(f"objective: {_name(function)} gives {what} that are not finite on {rows} tokens")
        if gradient is None:
            raise SoftPromptError(
                f"objective: the losses of {_name(function)} do not depend on the student's hidden states, accepted "
                "are losses that are computed from them without detach"
            )


def _name(function: LossFunction) -> str:
    return getattr(function, "__qualname__", None) or repr(function)


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
