"""Which transformers models are supported, and the facts about their configurations that this folder needs.

A family is supported when its attention goes through transformers' AttentionInterface, is causal, keeps one key and one
value per token, and when tests show that a prefix gives the same logits as the concatenated sequence. The table is in
`registry`. Of a multimodal model only the text decoder runs. All other families are refused by name. A model that
ignored the prefix would run without an error and give wrong results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from softprompt_kernels.errors import NotServedError, SoftPromptError
from softprompt_kernels.models.registry import REFUSED, WRAPPERS, Family, find_family, served


def auto_class(config: PreTrainedConfig) -> Any:
    """The transformers class that loads a model of this `config` with its head.

    AutoModelForCausalLM, or AutoModelForMultimodalLM for multimodal models.
    """
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM


def decoder_of(model: PreTrainedModel) -> Any:
    """The text decoder: embeddings, layers and the final norm, without the head. Of a base model, the model itself."""
    decoder: Any = model.get_decoder()
    if decoder.get_output_embeddings() is not None:  # Llama 4: its wrapper contains a model with a head
        decoder = decoder.model
    return decoder


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the text decoder: of a multimodal wrapper its text part's, else the model's own."""
    return model.config.get_text_config(decoder=True)


def is_wrapper(model: PreTrainedModel) -> bool:
    """Whether the text decoder is only a part of the model, beside an encoder for images or sound."""
    return text_config(model) is not model.config


def family_of(model: PreTrainedModel) -> Family:
    """What is special about the model's family. A family that is not served counts as plain."""
    return find_family(text_config(model).model_type) or Family()


def check_supported(model: PreTrainedModel) -> None:
    """Raise unless the model's attention can take a prefix.

    Raises:
        TypeError: `model` is not a transformers model.
        NotServedError: the family, or an option of a supported family, would give wrong results.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, accepted is a transformers PreTrainedModel")
    if model.config.is_encoder_decoder or not hasattr(model, "get_decoder"):
        raise NotServedError(f"model: got the family '{model.config.model_type}', accepted are decoders alone")
    config = text_config(model)
    for model_type in (model.config.model_type, config.model_type):
        if model_type in REFUSED and find_family(model_type) is None:
            raise NotServedError(f"model: got the family '{model_type}', but {REFUSED[model_type]}; {_accepted()}")
    if find_family(config.model_type) is None:
        raise NotServedError(f"model: got the family '{config.model_type}', {_accepted()}")
    if is_wrapper(model) and model.config.model_type not in WRAPPERS and find_family(model.config.model_type) is None:
        raise NotServedError(
            f"model: got a '{config.model_type}' inside a '{model.config.model_type}', accepted are a "
            f"'{config.model_type}' alone or inside {', '.join(WRAPPERS)}"
        )
    check_attention(model)


def _accepted() -> str:
    return f"accepted are {', '.join(served())}"


def check_attention(model: PreTrainedModel) -> None:
    """Raise a NotServedError unless every layer has causal attention over keys and values of its own."""
    config, decoder = text_config(model), decoder_of(model)
    if getattr(config, "add_cross_attention", False):
        raise NotServedError(f"model: got a '{config.model_type}' with cross-attention, accepted are decoders without")
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise NotServedError(f"model: got a '{config.model_type}' with bidirectional attention, accepted is causal")
    # Modelling code from elsewhere may have a known model_type and an attention of its own.
    if not decoder._can_set_attn_implementation():
        raise NotServedError(
            f"model: {type(model).__name__} computes its attention itself, accepted are models that "
            "go through transformers' AttentionInterface"
        )
    layers = sorted(module.layer_idx for module in attention_modules(decoder))
    if layers != list(range(config.num_hidden_layers)):
        raise NotServedError(
            f"model: got attention in layers {layers}, accepted is one in each of {config.num_hidden_layers} layers"
        )
    for module in attention_modules(decoder):
        key = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None) or head_size(model)
        value = getattr(module, "v_head_dim", None) or key
        if (key, value) != (head_size(model),) * 2:
            raise NotServedError(
                f"model: got keys of size {key} and values of size {value} in layer {module.layer_idx}, accepted is "
                f"the head size of the configuration, {head_size(model)}, for both in all layers"
            )


def attention_modules(model: nn.Module) -> Iterator[Any]:
    """The modules that call the attention function. They are those with a `layer_idx` and a `scaling`."""
    for module in model.modules():
        if isinstance(getattr(module, "layer_idx", None), int) and hasattr(module, "scaling"):
            yield module


def head_size(model: PreTrainedModel) -> int:
    """D, the size of the attention's heads, as the configuration has it."""
    config = text_config(model)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_parameters(config: Any) -> dict[str | None, dict[str, Any]]:
    """Rotary settings by layer type. The key is None when all layers share one setting. Empty: no rotary embedding."""
    parameters = getattr(config.get_text_config(decoder=True), "rope_parameters", None)
    if not parameters:
        return {}
    if "rope_type" in parameters:
        return {None: parameters}
    return {layer_type: settings for layer_type, settings in parameters.items() if settings is not None}


def max_positions(config: Any) -> int:
    """The model's context window: the largest number of prompt tokens and own tokens together.

    A longrope model changes all frequencies when the sequence is longer than `original_max_position_embeddings`. Keys
    that were rotated before that point do not fit queries after it, so the window ends there.

    A yarn model reads `factor` times the tokens that it was first trained on. Many configurations keep that first
    number as `max_position_embeddings`. The factors of other types do not say how long the window is: some models are
    trained for less, and the others have the whole window in `max_position_embeddings`.
    """
    config = config.get_text_config(decoder=True)
    limit: int = config.max_position_embeddings
    for settings in rope_parameters(config).values():
        if settings["rope_type"] == "yarn" and settings.get("factor"):
            limit = max(limit, int(settings["factor"] * settings["original_max_position_embeddings"]))
        if settings["rope_type"] == "longrope":
            limit = min(limit, settings["original_max_position_embeddings"])
    family = find_family(config.model_type)
    if family is not None and family.window is not None:  # last: a family's own limit holds for any rotary setting
        limit = min(limit, family.window(config))
    return limit


def check_positions(config: Any, prompt: int, own: int, new: int = 0) -> None:
    """Raise a SoftPromptError when `prompt + own + new` tokens are more than the model's window."""
    limit = max_positions(config)
    if prompt + own + new > limit:
        generated = f" + {new} new" if new else ""
        raise SoftPromptError(
            f"the sequence is too long: {prompt} prompt + {own} input{generated} tokens, the model's window is {limit}"
        )
