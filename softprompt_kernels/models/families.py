"""The supported transformers model families, and the facts about their configurations that this folder needs.

A family is supported when its attention goes through transformers' AttentionInterface, is causal, keeps one key and one
value per token, and when tests show that a prefix gives the same logits as the concatenated sequence. All other
families are refused by name. A model that ignored the prefix would run without an error and give wrong results.
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


def check_supported(model: PreTrainedModel) -> None:
    """Raise unless the model's attention can take a prefix.

    Raises:
        TypeError: `model` is not a transformers model.
        SoftPromptError: the family, or an option of a supported family, would give wrong results.
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
    # Modelling code from elsewhere may have a known model_type and an attention of its own.
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
    """The modules that call the attention function. They are those with a `layer_idx` and a `scaling`."""
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling"):
            yield module


def rope_parameters(config: Any) -> dict[str | None, dict[str, Any]]:
    """Rotary settings by layer type. The key is None when all layers share one setting. Empty: no rotary embedding."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return {}
    if "rope_type" in parameters:
        return {None: parameters}
    return {layer_type: settings for layer_type, settings in parameters.items() if settings is not None}


def max_positions(config: Any) -> int:
    """The model's context window: the largest number of prompt tokens and own tokens together.

    A longrope model changes all frequencies when the sequence is longer than `original_max_position_embeddings`. Keys
    that were rotated before that point do not fit queries after it, so the window ends there.
    """
    limit = config.max_position_embeddings
    for settings in rope_parameters(config).values():
        if settings["rope_type"] == "longrope":
            limit = min(limit, settings["original_max_position_embeddings"])
    return limit


def check_positions(config: Any, prompt: int, own: int, new: int = 0) -> None:
    """Raise a SoftPromptError when `prompt + own + new` tokens are more than the model's window."""
    limit = max_positions(config)
    if prompt + own + new > limit:
        generated = f" + {new} new" if new else ""
        raise SoftPromptError(
            f"the sequence is too long: {prompt} prompt + {own} input{generated} tokens, the model's window is {limit}"
        )
