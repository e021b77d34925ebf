"""Make a model able to take a prefix: switch its attention to ours, and back."""

from __future__ import annotations

from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.attention import NAME, register
from softprompt_kernels.models.families import check_served

# Kept on the model itself, so that it dies with it.
_PREVIOUS = "_softprompt_previous_attention"


def prepare(model: PreTrainedModel) -> None:
    """Let `model` take a prefix, in place. Calling it again changes nothing.

    The model keeps working as before without a prefix: same logits, same `generate`, padding included. Two things
    it can no longer do until `release`: return attention weights, and take packed sequences or 4-D masks.

    Raises:
        TypeError: not a transformers model.
        SoftPromptError: a model whose attention cannot be served.
    """
    check_served(model)
    register()
    previous = model.config._attn_implementation
    if previous == NAME:
        return
    model.set_attn_implementation(NAME)
    setattr(model, _PREVIOUS, previous)


def release(model: PreTrainedModel) -> None:
    """Give `model` back the attention that it had before `prepare`; nothing happens if it was not prepared."""
    previous = getattr(model, _PREVIOUS, None)
    if previous is not None:
        model.set_attn_implementation(previous)
        delattr(model, _PREVIOUS)


def check_prepared(model: PreTrainedModel) -> None:
    """Raise unless `prepare` was called: any other attention would ignore the prefix without a word."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, accepted is a transformers PreTrainedModel")
    if model.config._attn_implementation != NAME:
        raise SoftPromptError(
            f"model: its attention is '{model.config._attn_implementation}', accepted is a model after "
            "softprompt_kernels.models.prepare(model)"
        )
