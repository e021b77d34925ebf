"""Which transformers models can be served, and the few facts about them that the rest of the folder needs.

A family is served when its attention goes through transformers' AttentionInterface, looks only backwards, keeps one
key and value a token, and was tested to equal the concatenated run. Everything else is refused by name: a model that
ignores the prefix would run without an error and be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError

FAMILIES = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "llama",
    "mistral",
    "phi3",
    "qwen2",
    "qwen3",
)


def check_served(model: PreTrainedModel) -> None:
    """Raise unless the model is one whose attention can be given a prefix.

    Raises:
        TypeError: not a transformers model.
        SoftPromptError: a family, or an option of a served family, that would run wrong.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, accepted is a transformers PreTrainedModel")
    config = model.config
    accepted = f"accepted are {', '.join(FAMILIES)}"
    if config.model_type not in FAMILIES:
        raise SoftPromptError(f"model: got the family '{config.model_type}', {accepted}")
    if getattr(config, "add_cross_attention", False):
        raise SoftPromptError(f"model: got a '{config.model_type}' with cross-attention, accepted are decoders without")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise SoftPromptError(f"model: got a '{config.model_type}' with bidirectional attention, accepted is causal")
    # A copy of the modelling code may bring an attention of its own under a known name.
    if not model._can_set_attn_implementation():
        raise SoftPromptError(
            f"model: {type(model).__name__} computes its attention itself, accepted are models that "
            "go through transformers' AttentionInterface"
        )
    layers = sorted(module.layer_idx for module in attention_modules(model))
    if layers != list(range(config.num_hidden_layers)):
        raise SoftPromptError(
            f"model: got attention in layers {layers}, accepted is one in each of {config.num_hidden_layers} layers"
        )


def attention_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that call the attention function: those that know their layer and their scale."""
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling"):
            yield module


def rope_parameters(config: Any) -> dict[str | None, dict[str, Any]]:
    """Rotary settings by layer type; the key is None where all layers share one, and it is empty without any."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return {}
    if "rope_type" in parameters:
        return {None: parameters}
    return {layer_type: one for layer_type, one in parameters.items() if one is not None}


def window(config: Any) -> int:
    """Largest number of positions, prompt and own tokens together, at which the model computes what it was trained to.

    With longrope all frequencies change beyond `original_max_position_embeddings`. Keys that were rotated before that
    point would not fit queries after it, so there the window ends.
    """
    limit = config.max_position_embeddings
    for one in rope_parameters(config).values():
        if one["rope_type"] == "longrope":
            limit = min(limit, one["original_max_position_embeddings"])
    return limit


def check_window(config: Any, prompt: int, own: int, new: int = 0) -> None:
    """Raise a SoftPromptError when the positions would not fit."""
    limit = window(config)
    if prompt + own + new > limit:
        generated = f" + {new} new" if new else ""
        raise SoftPromptError(
            f"the sequence is too long: {prompt} prompt + {own} input{generated} tokens, the model's window is {limit}"
        )
