"""The parameters of a model's language-model head, for losses that never store all logits.

logits = softcap(logit_scale · (W h + b)),   softcap(x) = c · tanh(x / c),   without a softcap: the identity
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError


@dataclass(frozen=True, eq=False)
class Head:
    """A linear head.

    Args:
        weight: `[V, d]`, the model's own tensor, not a copy.
        bias: `[V]` or None.
        softcap: c, or None.
        logit_scale: factor of the linear output.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden [..., d]` to `[..., V]`."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model.

    Raises:
        SoftPromptError: the model has no head, or the head's weight is quantised (not a floating-point matrix).
    """
    head = model.get_output_embeddings()
    if head is None:
        raise SoftPromptError(f"model: {type(model).__name__} has no language-model head, accepted is a ...ForCausalLM")
    weight: Tensor = head.weight
    if weight.dim() != 2 or not weight.is_floating_point():
        raise SoftPromptError(
            f"model: its head is {weight.dtype} of shape {tuple(weight.shape)}, accepted is floating point [V, d]: "
            "leave the head out of the quantisation"
        )
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return Head(weight, getattr(head, "bias", None), softcap)
