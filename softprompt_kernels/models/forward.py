"""Run a model with a prefix: last hidden states or logits of a batch of inputs.

Positions: the tokens of a row start at the length of the row's prompt; padding is not counted. Padding may be anywhere
in a row. A padded batch runs in one of two forms:

- Packed, when the attention backend is good at packed sequences. Padding is removed, and the real tokens of the batch
  run through the model as one sequence. Only the attention has to know where each row begins (`cu_seqlens`); all other
  parts of the model work on single tokens.
- Right-padded, otherwise. The real tokens of each row are moved to its front. This costs one gather of the ids before
  the model and one gather of the hidden states after it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.errors import NotServedError, SoftPromptError
from softprompt_kernels.models.attention import Call
from softprompt_kernels.models.families import check_positions, decoder_of, family_of, head_size, text_config
from softprompt_kernels.models.head import head_of
from softprompt_kernels.models.padding import Packing, compaction, is_right_padded
from softprompt_kernels.models.prepare import check_prepared
from softprompt_kernels.models.tap import QueryTap
from softprompt_kernels.ops.prompt_attention import packs_sequences
from softprompt_kernels.prompts.offload import input_device
from softprompt_kernels.prompts.prefix import Prefix


def prompted_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,
    prefix: Prefix | None,
    *,
    attention_mask: Tensor | None = None,
    prompt_index: Tensor | None = None,
    tap: QueryTap | None = None,
) -> Tensor:
    """Hidden states after the final norm, ready for the head; the head itself is not run.

    Differentiable with respect to the prefix. Works under gradient checkpointing (not the re-entrant kind).

    Args:
        model: a prepared model, or the base model of one.
        input_ids: `[B, M]` int64.
        prefix: R rows of keys and values, None for no prompt.
        attention_mask: `[B, M]`, non-zero for real tokens; None: all are real. It is read on the CPU, so a CPU tensor
            avoids waiting for the device. The output at padding is finite and has no meaning.
        prompt_index: `[B]` int64, the row of the prefix that each sequence reads. None: the only row, or row b for
            sequence b if R = B.
        tap: receives the queries of some tokens in every layer, and what the attention gave them. Its indices are those
            of the flattened `input_ids`; the tokens must be real. None: nothing is handed out.

    Returns:
        `[B, M, d]` in the model's dtype.

    Raises:
        SoftPromptError: the model is not prepared, the prefix belongs to another model, shapes do not fit, all tokens
            are padding, or the sequence is longer than the model's window.
    """
    check_inputs(model, input_ids, prefix, attention_mask, prompt_index)
    first = first_position(prefix, prompt_index, input_ids)
    call = Call(prefix, prompt_index, tap=tap, wants_grad=wants_grad(prefix))
    if attention_mask is None or bool(attention_mask.all()):
        positions = first + torch.arange(input_ids.shape[1], device=input_ids.device)
        return run_base(model, call, positions, input_ids=input_ids)
    mask = attention_mask.bool()
    if packs_batches(model):
        return _packed_hidden(model, call, first, input_ids, mask)
    call = replace(call, key_lengths=mask.sum(dim=1).to(input_ids.device))
    inverse = None
    if not is_right_padded(mask):
        order, inverse = (index.to(input_ids.device) for index in compaction(mask))
        input_ids = input_ids.gather(1, order)
        call = replace(
            call, tap=_moved(tap, inverse + torch.arange(mask.shape[0], device=inverse.device)[:, None] * mask.shape[1])
        )
    positions = first + torch.arange(input_ids.shape[1], device=input_ids.device)
    hidden = run_base(model, call, positions, input_ids=input_ids)
    return hidden if inverse is None else hidden.take_along_dim(inverse.to(hidden.device)[..., None], dim=1)


def _packed_hidden(model: PreTrainedModel, call: Call, first: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Hidden states `[B, M, d]` of a padded batch, run as one packed sequence; 0 at padding."""
    batch, width = input_ids.shape
    packing = Packing.of(mask, input_ids.device)
    positions = packing.pack(first + packing.own_positions)
    tap = _moved(call.tap, mask.flatten().cumsum(0) - 1)
    hidden = run_base(model, replace(call, packing=packing, tap=tap), positions, input_ids=packing.pack(input_ids))
    padded = hidden.new_zeros(batch * width, hidden.shape[2])
    return padded.index_copy(0, packing.real.to(hidden.device), hidden[0]).unflatten(0, (batch, width))


def _moved(tap: QueryTap | None, new_index: Tensor) -> QueryTap | None:
    """The tap for a batch whose token i has moved to `new_index.flatten()[i]`."""
    if tap is None:
        return None
    return replace(tap, tokens=new_index.to(tap.tokens.device).flatten()[tap.tokens])


def prompted_logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    prefix: Prefix | None,
    *,
    attention_mask: Tensor | None = None,
    prompt_index: Tensor | None = None,
) -> Tensor:
    """Logits `[B, M, V]` in the model's dtype, as its own forward gives them.

    Arguments and errors as in `prompted_hidden`.
    """
    hidden = prompted_hidden(model, input_ids, prefix, attention_mask=attention_mask, prompt_index=prompt_index)
    return head_of(model).logits(hidden)


def run_base(model: PreTrainedModel, call: Call, positions: Tensor, **inputs: Tensor) -> Tensor:
    """One forward of `input_ids` or `inputs_embeds` without the head, at `positions [1 or B, M]`: `[B, M, d]`."""
    if call.packing is not None or call.own is not None:
        # transformers passes a 4-D mask on to the attention unchanged, and `attend` ignores it. Without this mask
        # transformers would look whether the positions restart, and would build a mask, which waits for the device.
        inputs["attention_mask"] = positions.new_zeros(1, 1, 1, 1)
    # The configuration may ask for tuples, or for the hidden states of all layers.
    output = decoder_of(model)(
        **inputs,
        position_ids=positions,
        use_cache=False,
        return_dict=True,
        output_hidden_states=False,
        softprompt=call,
    )
    check_complete(model, call)
    hidden: Tensor = output.last_hidden_state
    return hidden


def check_complete(model: PreTrainedModel, call: Call) -> None:
    """Raise unless each layer was handed the call. One that drops it ran without the prefix, and gave wrong results."""
    count = text_config(model).num_hidden_layers
    if call.layers is not None and len(call.layers) != count:
        raise NotServedError(
            f"model: {len(call.layers)} of the {count} layers of {type(model).__name__} hand the prefix on to their "
            "attention, accepted are models that pass unknown keyword arguments down to the attention function"
        )


def wants_grad(prefix: Prefix | None) -> bool:
    """Whether this forward needs a graph for the prefix's keys or values."""
    if prefix is None or not torch.is_grad_enabled():
        return False
    return any(key.requires_grad or value.requires_grad for key, value in prefix.layers)


def first_position(prefix: Prefix | None, prompt_index: Tensor | None, like: Tensor) -> Tensor:
    """Position of the first own token: `[1, 1]`, or `[B, 1]` for prompts of different lengths."""
    if prefix is None or prefix.lengths is None:
        return torch.full((1, 1), prefix_length(prefix), device=like.device)
    lengths = prefix.lengths.to(like.device)
    return (lengths if prompt_index is None else lengths[prompt_index.to(like.device)])[:, None]


def check_inputs(
    model: PreTrainedModel,
    input_ids: Tensor,
    prefix: Prefix | None,
    attention_mask: Tensor | None,
    prompt_index: Tensor | None,
    new_tokens: int = 0,
) -> None:
    """Raise a SoftPromptError for inputs that would otherwise give an unclear error inside the model or the op."""
    check_prepared(model)
    if input_ids.dim() != 2 or input_ids.shape[0] == 0 or input_ids.shape[1] == 0:
        raise SoftPromptError(f"input_ids: got shape {tuple(input_ids.shape)}, accepted is [B, M] with B and M ≥ 1")
    batch = input_ids.shape[0]
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise SoftPromptError(
            f"attention_mask: got shape {tuple(attention_mask.shape)}, accepted is {tuple(input_ids.shape)}, "
            "one entry for each of input_ids"
        )
    if prefix is None:
        if prompt_index is not None:
            raise SoftPromptError("prompt_index: got one without a prefix, accepted is None")
    else:
        _check_prefix(model, prefix)
        if prompt_index is None and prefix.rows not in (1, batch):
            raise SoftPromptError(
                f"prompt_index: got None for {prefix.rows} prompts and {batch} sequences, accepted is [{batch}] indices"
            )
        if prompt_index is not None and prompt_index.shape != (batch,):
            raise SoftPromptError(f"prompt_index: got shape {tuple(prompt_index.shape)}, accepted is ({batch},)")
        # On other devices than the CPU this check would wait for the device.
        if prompt_index is not None and prompt_index.device.type == "cpu":
            low, high = int(prompt_index.min()), int(prompt_index.max())
            if low < 0 or high >= prefix.rows:
                raise SoftPromptError(f"prompt_index: got {low} to {high}, accepted is 0 to {prefix.rows - 1}")
    check_positions(text_config(model), prefix_length(prefix), input_ids.shape[1], new_tokens)


def prefix_length(prefix: Prefix | None) -> int:
    """P, the tokens of a row of the prefix, padding included; 0 without a prefix."""
    return 0 if prefix is None else prefix.length


def _check_prefix(model: PreTrainedModel, prefix: Prefix) -> None:
    """Raise unless layers, key heads and head size of the prefix are the model's."""
    config = text_config(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = head_size(model)
    key = prefix.layers[0][0]
    got, accepted = (prefix.num_layers, key.shape[1], key.shape[3]), (config.num_hidden_layers, heads, dim)
    if got != accepted:
        raise SoftPromptError(
            f"prefix: got {got[0]} layers, {got[1]} key heads of size {got[2]}, "
            f"the model has {accepted[0]}, {accepted[1]} and {accepted[2]}"
        )


def packs_batches(model: PreTrainedModel) -> bool:
    """Whether padded batches run as one packed sequence: the backend is good at it, and the model allows it."""
    return family_of(model).packs and packs_sequences(head_size(model), model.dtype, input_device(model))
