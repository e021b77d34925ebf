"""The attention that prepared models call: transformers' arguments on one side, `prompt_attention` on the other.

transformers calls it once a layer with query, key and value after the rotary embedding. What belongs to the prompt
travels as one keyword argument of the model's forward, `softprompt`, which transformers hands through to every layer
untouched; the layer picks its keys and values by `module.layer_idx`. Nothing is kept between calls, so calls from
several threads do not meet.

Without that argument the model runs as it did before `prepare`: P = 0, causal, padding from `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.padding import Packing, Placement, compaction, is_right_padded, take_rows
from softprompt_kernels.ops import prompt_attention
from softprompt_kernels.prompts.prefix import Prefix

# transformers looks for "sdpa", "flash" and "flex_attention" inside the name and changes what it does.
NAME = "softprompt"


class KeyValueSink(Protocol):
    """Receives what each layer computed for its own tokens."""

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """`key [B, Hkv, N, D]` after the rotary embedding, `value [B, Hkv, N, Dv]`."""


@dataclass(frozen=True, eq=False)
class Call:
    """What one forward of the model is told about prompt and padding.

    Args:
        prefix: keys and values of the bank, None for no prompt.
        prompt_index: `[B]` int64, the row of the bank that each sequence reads; None as in `prompt_attention`.
        key_lengths: `[B]` int64, real own keys of a row, which come first. None: all.
        placement: where the queries sit; None when query i is at own position N − M + i.
        packing: where sequences begin in a packed batch, of which prompt_index `[S]` has an entry each; then there is
            neither key_lengths nor placement.
        sink: receives own keys and values, None to drop them.
        wants_grad: a graph is wanted, so the layers must run with gradients enabled.
    """

    prefix: Prefix | None
    prompt_index: Tensor | None = None
    key_lengths: Tensor | None = None
    placement: Placement | None = None
    packing: Packing | None = None
    sink: KeyValueSink | None = None
    wants_grad: bool = False


_PLAIN = Call(None)


def register() -> None:
    """Make the name known to transformers: the attention, and the mask without which padding is dropped silently."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, own_padding)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    softprompt: Call | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """One layer's attention over `[prefix ; own tokens]`.

    Args:
        query: `[B, Hq, M, D]` after the rotary embedding.
        key, value: `[B, Hkv, N, D]`, `[B, Hkv, N, Dv]`: this forward's own tokens, or all of a cache.
        attention_mask: what `own_padding` returned, used when there is no `softprompt`.
        s_aux: `[Hq]` attention sinks.

    Returns:
        `[B, M, Hq, Dv]` contiguous, and None in place of the attention weights, which are never formed.

    Raises:
        SoftPromptError: dropout, returned weights, packed sequences or a 4-D mask are asked for, or re-entrant
            gradient checkpointing, which runs the layers without gradients.
    """
    if dropout:
        raise SoftPromptError(
            f"attention dropout: got {dropout} in training mode, accepted is 0: call model.eval(), or set the "
            "model's dropout probabilities to 0"
        )
    if others.get("output_attentions"):
        raise SoftPromptError("output_attentions: got True, accepted is False: the weights are never formed")
    if others.get("cu_seq_lens_q") is not None:
        raise SoftPromptError("cu_seq_lens_q: packed sequences are not accepted, pad them to a batch")

    call = softprompt
    if call is None:
        call, key, value = _ordinary(attention_mask, query, key, value)
    if call.wants_grad and not torch.is_grad_enabled():
        raise SoftPromptError(
            "gradient checkpointing: got the re-entrant kind, which loses the gradient of a prompt; accepted is "
            'model.gradient_checkpointing_enable({"use_reentrant": False})'
        )
    if call.sink is not None:
        call.sink.put(module.layer_idx, key, value)
    prompt_key, prompt_value = _prompt(call, module.layer_idx, key, value)
    packing = call.packing
    longest = key.shape[2] if packing is None else packing.longest
    window = _binding_window(sliding_window, prompt_key.shape[2] + longest)

    placement, lengths = call.placement, None if call.prefix is None else call.prefix.lengths
    if query.shape[2] == 1 and window is None:
        placement = None  # a single last query sees all real keys wherever it sits
    if placement is not None:
        query = take_rows(query, placement.query_of_slot)
    out = cast(
        Tensor,
        prompt_attention(
            query,
            key,
            value,
            prompt_key,
            prompt_value,
            prompt_index=_on(call.prompt_index, query),
            prompt_lengths=_on(lengths, query),
            key_lengths=_on(call.key_lengths, query),
            cu_seqlens=None if packing is None else _on(packing.cu_seqlens, query),
            window=window,
            softcap=softcap,
            sinks=s_aux,
            scale=scaling,
        ),
    )
    if placement is not None:
        out = take_rows(out, placement.slot_of_query)
    return out.transpose(1, 2).contiguous(), None


def own_padding(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **_: Any,
) -> Tensor | None:
    """What `attend` gets as its mask: `[B, kv_length]` bool, True for real keys, or None when all are real.

    Raises:
        SoftPromptError: a mask that is more than causal, window and padding, or a cache of fixed size.
    """
    if not allow_is_causal_skip:
        raise SoftPromptError(
            "attention mask: got packed sequences or a custom mask function, accepted are causal models with padding"
        )
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise SoftPromptError(
            "past_key_values: got a cache of fixed size, or a mask longer than the keys; accepted is a DynamicCache, "
            "with an attention mask of one entry for each cached and new token"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -kv_length:]


def _ordinary(mask: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> tuple[Call, Tensor, Tensor]:
    """A call without a prefix: the padding of `mask` as lengths, with key and value moved where that is needed."""
    if mask is None:
        return _PLAIN, key, value
    if mask.dim() != 2 or mask.shape != (key.shape[0], key.shape[2]):
        raise SoftPromptError(
            f"attention_mask: got shape {tuple(mask.shape)}, accepted is [batch, tokens] with one entry for each token"
        )
    lengths = mask.sum(dim=1)
    if is_right_padded(mask):
        return Call(None, key_lengths=lengths), key, value
    order, inverse = compaction(mask)
    placement = Placement.by_order(order, inverse, query.shape[2])
    return Call(None, key_lengths=lengths, placement=placement), take_rows(key, order), take_rows(value, order)


def _prompt(call: Call, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The prefix of one layer where the layer lives and in its dtype: `[R, Hkv, P, D]`, `[R, Hkv, P, Dv]`."""
    if call.prefix is None:
        return key.new_empty(1, key.shape[1], 0, key.shape[3]), value.new_empty(1, value.shape[1], 0, value.shape[3])
    prompt_key, prompt_value = call.prefix.layers[layer]
    return prompt_key.to(key.device, key.dtype), prompt_value.to(value.device, value.dtype)


def _on(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """On the device of `like`: the layers of a model may be spread over several."""
    return None if tensor is None else tensor.to(like.device)


def _binding_window(window: int | None, keys: int) -> int | None:
    """The window, or None when all keys lie inside it: the kernels are faster without."""
    return None if window is None or window >= keys else window
