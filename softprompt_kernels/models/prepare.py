"""Switch a model to the attention that can take a prefix, and back."""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from softprompt_kernels.errors import NotServedError, SoftPromptError
from softprompt_kernels.models.attention import NAME, register
from softprompt_kernels.models.families import check_supported, decoder_of, is_wrapper, text_config

# Attribute of the model that holds what `prepare` changed.
_PREVIOUS = "_softprompt_previous"


@dataclass(frozen=True)
class _Previous:
    """The name of the attention, and `return_dict` of the model's and of the text model's configuration."""

    attention: str
    return_dict: tuple[bool | None, ...]


def prepare(model: PreTrainedModel) -> None:
    """Make `model` able to take a prefix. Changes the model in place; a second call changes nothing.

    Without a prefix the model works as before: same logits, same `generate`, also with padding. Until `release` it
    cannot return attention weights, and does not accept packed sequences or 4-D masks.

    Raises:
        TypeError: `model` is not a transformers model.
        SoftPromptError: the model's attention is not supported.
        NotServedError: its layers are split over ranks by tensor parallelism.
    """
    check_supported(model)
    _check_layers(model)
    register()
    configs = model.config, model.config.get_text_config()
    attention, previous = decoder_of(model).config._attn_implementation, getattr(model, _PREVIOUS, None)
    if previous is None:
        previous = _Previous(attention, tuple(one.return_dict for one in configs))
    elif attention != NAME:  # another one was set since then
        previous = replace(previous, attention=attention)
    for config in configs:
        config.return_dict = True  # with False, transformers' own models fail: they read each other's outputs by name
    if attention != NAME:
        _set_attention(model, NAME)
    setattr(model, _PREVIOUS, previous)


def _check_layers(model: PreTrainedModel) -> None:
    """Refuse tensor parallelism: a rank has a part of the heads, and a prefix has all of them. FSDP2's shards are whole
    when a layer runs.
    """
    ends = [each.weight for each in (model.get_input_embeddings(), model.get_output_embeddings()) if each is not None]
    split = [
        name
        for name, parameter in model.named_parameters()
        if hasattr(parameter, "placements") and not any(parameter is end for end in ends)
    ]
    if not split:
        return
    from torch.distributed.fsdp import FSDPModule  # a parameter in shards: torch.distributed is there

    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise NotServedError(
            f"model: its weight {split[0]} is split over ranks by tensor parallelism, accepted are whole layers, those "
            "in shards of FSDP2 (fully_shard), layers on several devices (device split), and a head in rows over ranks"
        )


def release(model: PreTrainedModel) -> None:
    """Give `model` back the attention that it had before `prepare`. Does nothing if it was not prepared."""
    previous = getattr(model, _PREVIOUS, None)
    if previous is not None:
        _set_attention(model, previous.attention)
        for config, value in zip((model.config, model.config.get_text_config()), previous.return_dict, strict=True):
            config.return_dict = value
        delattr(model, _PREVIOUS)


def _set_attention(model: PreTrainedModel, name: str) -> None:
    """Set the attention of the text decoder. Encoders for images or sound keep theirs."""
    if not is_wrapper(model):
        model.set_attn_implementation(name)
        return
    text = text_config(model)
    parts = [key for key in model.config.sub_configs if getattr(model.config, key) is text]
    model.set_attn_implementation(dict.fromkeys(parts, name))


def check_prepared(model: PreTrainedModel) -> None:
    """Raise unless `prepare` was called. Any other attention would silently ignore the prefix."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model: got {type(model).__name__}, accepted is a transformers PreTrainedModel")
    attention = decoder_of(model).config._attn_implementation
    if attention != NAME:
        raise SoftPromptError(
            f"model: its attention is '{attention}', accepted is a model after softprompt_kernels.models.prepare(model)"
        )
