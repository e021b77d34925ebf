"""The attention function of prepared models. It translates transformers' arguments into a call of `prompt_attention`.

transformers calls it once per layer, with query, key and value after the rotary embedding. The prompt is passed to the
model's forward as one keyword argument, `softprompt`, of type `Call`. transformers passes unknown keyword arguments on
to the attention of every layer. Each layer picks its keys and values by `module.layer_idx`. No state is kept between
calls, so several threads can call one model at the same time.

Without `softprompt` the model runs as it did before `prepare`: P = 0, causal, padding from `attention_mask`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from softprompt_kernels.errors import NotServedError, SoftPromptError
from softprompt_kernels.models.padding import Packing, Placement, compaction, gather_tokens, is_right_padded
from softprompt_kernels.models.tap import QueryTap, ScoreFunction
from softprompt_kernels.ops import prompt_attention
from softprompt_kernels.prompts.prefix import Prefix

# transformers changes its behaviour if the name contains "sdpa", "flash" or "flex_attention".
NAME = "softprompt"


class KeyValueSink(Protocol):
    """Receives the keys and values that each layer computed for its own tokens."""

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """`key [B, Hkv, N, D]` after the rotary embedding, `value [B, Hkv, N, Dv]`."""


class OwnTokens(Protocol):
    """Keeps the keys and values of a sequence's earlier tokens. `past_key_values` of transformers is not used then."""

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add `key [B, Hkv, M, D]` and `value [B, Hkv, M, Dv]`; returns those of all N tokens."""


def _no_layers() -> set[int] | None:
    return None if torch.compiler.is_compiling() else set()


@dataclass(frozen=True, eq=False)
class Call:
    """The prompt and the padding of one forward of the model.

    Args:
        prefix: keys and values of the bank, None for no prompt.
        prompt_index: `[B]` int64, the row of the bank that each sequence reads; None as in `prompt_attention`.
        key_lengths: `[B]` int64, how many own keys of a row are real; these come first. None: all.
        placement: the positions of the queries; None when query i is at own position N − M + i.
        order: `[B, N]` int64, gathers the own keys of a row so that the real ones come first; None if they do.
        packing: where the S sequences begin in a packed batch. Then prompt_index has shape `[S]`, and key_lengths and
            placement are None.
        sink: receives own keys and values, None to drop them.
        tap: hands out queries and their results, None for none.
        own: adds the keys and values of earlier own tokens; None if there are none.
        wants_grad: whether a graph is needed; then the layers must run with gradients enabled.
        layers: the layers that were handed this call. A model that drops it runs without its prefix. None in
            `torch.compile`, which does not let a checkpointed layer write into it.
    """

    prefix: Prefix | None
    prompt_index: Tensor | None = None
    key_lengths: Tensor | None = None
    placement: Placement | None = None
    order: Tensor | None = None
    packing: Packing | None = None
    sink: KeyValueSink | None = None
    tap: QueryTap | None = None
    own: OwnTokens | None = None
    wants_grad: bool = False
    layers: set[int] | None = field(default_factory=_no_layers)

    def behind(self, mask: Tensor) -> Call:
        """This call with the padding of `mask [B, N]` (bool, True for a real token), for queries of all N tokens.

        Right padding needs no gather. Waits for the device, except in `torch.compile`, where padding may be anywhere.
        """
        lengths = mask.sum(dim=1)
        if not torch.compiler.is_compiling() and is_right_padded(mask):
            return replace(self, key_lengths=lengths)
        order, inverse = compaction(mask)
        placement = Placement.behind_prefix(order, inverse)
        return replace(self, key_lengths=lengths, placement=placement, order=order)


_NO_PROMPT = Call(None)


def register() -> None:
    """Register NAME with transformers: the attention function, and the mask function.

    Without a registered mask function, transformers silently drops the padding mask.
    """
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, own_padding_mask)


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
        key, value: `[B, Hkv, N, D]`, `[B, Hkv, N, Dv]`: this forward's own tokens, or all tokens of a cache.
        attention_mask: what `own_padding_mask` returned. Used only without `softprompt`.
        s_aux: `[Hq]` attention sinks.
        softprompt: prompt and padding of this forward of the model.

    Returns:
        `[B, M, Hq, Dv]` contiguous, and None in place of the attention weights, which are never computed.

    Raises:
        SoftPromptError: the call asks for dropout, attention weights, packed sequences or a 4-D mask, the attention
            reads in both directions, or it runs under
            re-entrant gradient checkpointing, which runs the layers without gradients.
    """
    if dropout:
        raise SoftPromptError(
            f"attention dropout: got {dropout} in training mode, accepted is 0: call model.eval(), or set the "
            "model's dropout probabilities to 0"
        )
    if not getattr(module, "is_causal", True):
        raise SoftPromptError(
            f"attn_implementation: got {NAME!r} for a {type(module).__name__} that reads in both directions, accepted "
            "are causal decoders"
        )
    if others.get("output_attentions"):
        raise SoftPromptError("output_attentions: got True, accepted is False: the weights are never computed")
    if others.get("cu_seq_lens_q") is not None:
        raise SoftPromptError("cu_seq_lens_q: packed sequences are not accepted, pad them to a batch")

    call = softprompt
    if call is None:
        call = _call_from_mask(attention_mask, query, key)
    elif call.layers is not None:
        call.layers.add(module.layer_idx)
    if call.wants_grad and not torch.is_grad_enabled():
        raise SoftPromptError(
            "gradient checkpointing: got the re-entrant kind, which loses the gradient of a prompt; accepted is "
            'model.gradient_checkpointing_enable({"use_reentrant": False})'
        )
    if call.sink is not None:
        call.sink.put(module.layer_idx, key, value)
    if call.own is not None:
        key, value = call.own.extend(module.layer_idx, key, value)
    if call.order is not None:
        key, value = gather_tokens(key, call.order), gather_tokens(value, call.order)
    prompt_key, prompt_value = _layer_prompt(call, module.layer_idx, key, value)
    packing = call.packing
    own_keys = key.shape[2] if packing is None else packing.max_seqlen
    window = _effective_window(sliding_window, prompt_key.shape[2] + own_keys)

    placement, lengths = call.placement, None if call.prefix is None else call.prefix.lengths
    if query.shape[2] == 1 and window is None:
        placement = None  # the only query is the last token: it sees all real keys at any position
    placed = query if placement is None else gather_tokens(query, placement.query_of_slot)
    result = prompt_attention(
        placed,
        key,
        value,
        prompt_key,
        prompt_value,
        prompt_index=_to_device_of(call.prompt_index, query),
        prompt_lengths=_to_device_of(lengths, query),
        key_lengths=_to_device_of(call.key_lengths, query),
        cu_seqlens=None if packing is None else _to_device_of(packing.cu_seqlens, query),
        window=window,
        softcap=softcap,
        sinks=s_aux,
        scale=scaling,
        return_lse=call.tap is not None,
    )
    out, lse = (cast(Tensor, result), None) if call.tap is None else cast(tuple[Tensor, Tensor], result)
    if placement is not None:
        out = gather_tokens(out, placement.slot_of_query)
    if call.tap is not None and lse is not None:
        if placement is not None:
            lse = gather_tokens(lse[..., None], placement.slot_of_query)[..., 0]
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        _hand_out(call.tap, module.layer_idx, query, out, lse, ScoreFunction(scale, softcap, sliding_window))
    return out.transpose(1, 2).contiguous(), None


def own_padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    device: torch.device | None = None,
    **_: Any,
) -> Tensor | None:
    """The mask that transformers passes to `attend`: `[B, kv_length]` bool, True for real keys, None when all are real.

    In `torch.compile` transformers cannot see whether the positions of a batch restart, and takes every batch without
    a mask for packed sequences. Then the compiled graph looks at the mask function, and a restart is a RuntimeError.

    Raises:
        SoftPromptError: the mask expresses more than causal, window and padding, or the cache has a fixed size.
    """
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise SoftPromptError(
            "past_key_values: got a cache of fixed size, or a mask longer than the keys; accepted is a DynamicCache, "
            "with an attention mask of one entry for each cached and new token"
        )
    compiling = torch.compiler.is_compiling()
    if not allow_is_causal_skip:
        if use_vmap or mask_function is None or not compiling:
            raise SoftPromptError(_MORE_THAN_PADDING)
        _assert_plainly_causal(mask_function, batch_size, q_length, device)
    if attention_mask is None or (not compiling and bool(attention_mask.all())):
        return None
    return attention_mask[:, -kv_length:]


_MORE_THAN_PADDING = (
    "attention mask: got packed sequences or a custom mask function, accepted are causal models with padding"
)


def _assert_plainly_causal(mask_function: Callable, batch: int, tokens: int, device: torch.device | None) -> None:
    """Adds a check to the compiled graph: each token sees the one before it, and not the one after it.

    Of packed sequences, the first token of a sequence does not see the one before it. In a block that is read in both
    directions, a token sees the one after it.
    """
    row = torch.arange(batch, device=device)[:, None]
    earlier, later = torch.arange(tokens - 1, device=device)[None], torch.arange(1, tokens, device=device)[None]
    causal = mask_function(row, 0, later, earlier).all() & ~mask_function(row, 0, earlier, later).any()
    torch._assert_async(causal, _MORE_THAN_PADDING)


def _call_from_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Call:
    """`Call` of a forward without a prefix. The padding of `mask` becomes `key_lengths`."""
    if mask is None:
        return _NO_PROMPT
    if mask.shape == (1, 1, 1, 1):  # of `run_base`, which passes a `Call` beside it
        raise NotServedError(
            "model: a layer does not hand the prefix on to its attention, accepted are models that pass unknown "
            "keyword arguments down to the attention function"
        )
    if mask.dim() != 2 or mask.shape != (key.shape[0], key.shape[2]):
        raise SoftPromptError(
            f"attention_mask: got shape {tuple(mask.shape)}, accepted is [batch, tokens] with one entry for each token"
        )
    lengths = mask.sum(dim=1)
    if not torch.compiler.is_compiling() and is_right_padded(mask):
        return Call(None, key_lengths=lengths)
    order, inverse = compaction(mask)
    return Call(
        None, key_lengths=lengths, placement=Placement.from_compaction(order, inverse, query.shape[2]), order=order
    )


def _layer_prompt(call: Call, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """The prefix of one layer, `[R, Hkv, P, D]` and `[R, Hkv, P, Dv]`, in the layer's dtype and on its device."""
    if call.prefix is None:
        return key.new_empty(1, key.shape[1], 0, key.shape[3]), value.new_empty(1, value.shape[1], 0, value.shape[3])
    prompt_key, prompt_value = call.prefix.layers[layer]
    return prompt_key.to(key.device, key.dtype), prompt_value.to(value.device, value.dtype)


def _hand_out(tap: QueryTap, layer: int, query: Tensor, out: Tensor, lse: Tensor, scores: ScoreFunction) -> None:
    """Pass `tap.tokens` of `[B, H, M, ·]` to the sink as `[n, H, ·]`."""
    tokens = tap.tokens.to(query.device)
    width = query.shape[2]
    row, column = tokens // width, tokens % width
    tap.sink.put(layer, query[row, :, column], out[row, :, column], lse[row, :, column], scores)


def _to_device_of(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """`tensor` on the device of `like`. The layers of a model may be on several devices."""
    return None if tensor is None else tensor.to(like.device)


def _effective_window(window: int | None, keys: int) -> int | None:
    """The window, or None when it covers all keys. The kernels are faster without a window."""
    return None if window is None or window >= keys else window
