"""What the model reads before a query, as a prefix of keys and values: the whole context, k of its tokens, or none."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.models import capture, shift_keys
from softprompt_kernels.models.families import rope_parameters
from softprompt_kernels.prompts import Prefix, initialise

CAPTURE_TOKENS = 1024
"""Tokens of a context that go through the model at once."""


def capture_context(model: PreTrainedModel, ids: Tensor, *, before: Prefix | None = None) -> Prefix:
    """The keys and values of a context, `ids [1, C]`: the prefix that makes the model the teacher.

    Args:
        model: prepared.
        ids: the tokens of the context.
        before: a prompt of P tokens that the context follows, as the state of the segments before it. The result has
            P + C tokens then, the prompt's first. None: the context is first.
    """
    return capture(model, ids.to(model.device), CAPTURE_TOKENS, before)


def select_tokens(model: PreTrainedModel, context: Prefix, k: int, how: str) -> Prefix:
    """k tokens of a captured context as a prefix of length k.

    Args:
        model: rotates the keys to their new positions.
        context: the captured context, C tokens.
        k: from 1 to C.
        how: "first", or "strided": spread evenly over the context.

    Raises:
        SoftPromptError: "strided" for a model whose rotary frequencies depend on the length: its keys cannot be moved.
    """
    return initialise.from_prefix(context, k, how, rotate=partial(move_keys, model))


def move_keys(model: PreTrainedModel, prefix: Prefix, delta: int | Tensor) -> Prefix:
    """`shift_keys`, but the keys of a model with learned positions stay: positions cannot be taken out of them."""
    return shift_keys(model, prefix, delta) if rope_parameters(model.config) else prefix


def no_context_prefix(model: PreTrainedModel, chat: ChatFormat) -> Prefix | None:
    """What the chat template puts before a query when there is neither context nor prompt; None if it puts nothing."""
    ids = chat.no_context_ids()
    return None if ids is None else capture(model, ids.to(model.device))
