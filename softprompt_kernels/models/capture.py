"""Make a prefix from a context, from an embedding prompt, or from any kind of prompt.

The model runs over the prompt tokens alone, and the keys and values of every layer's attention are kept. Prompt tokens
come first and attention is causal, so these keys and values equal those of a run over prompt and inputs together.

Cost: one forward over the prompt tokens at batch 1, independent of the batch of inputs.

The keys and values are taken from the calls of the attention function, not from a cache. Sliding layers therefore keep
all their tokens, the autograd graph is complete, and gradient checkpointing, which drops caches, changes nothing.
"""

from __future__ import annotations

from typing import Protocol, cast, overload

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.attention import Call
from softprompt_kernels.models.families import check_positions, text_config
from softprompt_kernels.models.finite import check_finite, fitting_cast
from softprompt_kernels.models.forward import check_inputs, prefix_length, run_base
from softprompt_kernels.models.prepare import check_prepared
from softprompt_kernels.prompts.bank import PromptBank
from softprompt_kernels.prompts.embedding import EmbeddingPrompt
from softprompt_kernels.prompts.kv import KVPrompt
from softprompt_kernels.prompts.offload import input_device
from softprompt_kernels.prompts.prefix import Prefix


class TokenStore(Protocol):
    """Keeps the keys and values of a context in all layers, while they are computed."""

    length: int
    """Tokens that are complete in all layers."""

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Write new tokens of one layer behind the complete ones.

        Args:
            layer: its index.
            key, value: `[R, Hkv, n, D]` and `[R, Hkv, n, Dv]`, in the model's dtype and on the layer's device.
        """

    def advance(self, tokens: int) -> None:
        """More tokens are complete in all layers.

        Args:
            tokens: how many.
        """

    def prefix(self) -> Prefix:
        """The complete tokens, not copied."""


@torch.no_grad()
def capture(
    model: PreTrainedModel,
    input_ids: Tensor,
    chunk_tokens: int | None = None,
    before: Prefix | None = None,
    store: TokenStore | None = None,
) -> Prefix:
    """Keys and values of a context, without a graph.

    Args:
        model: a prepared model.
        input_ids: `[1, C]` int64 (or `[R, C]`: several contexts of one length).
        chunk_tokens: run this many tokens at a time, each chunk with the earlier chunks as its prefix. The result is
            the same; activations shrink from C tokens to `chunk_tokens`. None: all at once.
        before: a prefix of P tokens and R rows that the context follows. It is copied. None: the context is first.
        store: where the keys and values go; None: memory, in the model's dtype. A chunk reads the tokens before it from
            there. Tokens that are complete in the store already are not computed again; `before` is among them.

    Returns:
        A prefix of P + C tokens, from the store.

    Raises:
        SoftPromptError: as `prompted_hidden`, or `chunk_tokens` below 1, or `before` has another number of rows or
            padding, or a hidden state is not finite.
    """
    check_inputs(model, input_ids, before, None, None)
    if before is not None and (before.rows != input_ids.shape[0] or before.lengths is not None):
        padding = "" if before.lengths is None else " with padding"
        raise SoftPromptError(
            f"before: got {before.rows} rows{padding}, accepted is one without padding for each of "
            f"{input_ids.shape[0]} contexts"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise SoftPromptError(f"chunk_tokens: got {chunk_tokens}, accepted is 1 or more, or None")
    total, given = input_ids.shape[1], prefix_length(before)
    store = MemoryStore(given + total) if store is None else store
    if before is not None and store.length == 0:
        for layer, (key, value) in enumerate(before.layers):
            store.put(layer, key, value)
        store.advance(given)
    for start in range(store.length - given, total, chunk_tokens or total):
        chunk = input_ids[:, start : start + (chunk_tokens or total)]
        first, earlier = store.length, store.prefix() if store.length else None
        positions = torch.arange(first, first + chunk.shape[1], device=input_ids.device)[None]
        hidden = run_base(model, Call(earlier, sink=store), positions, input_ids=chunk)
        check_finite(model, "hidden states of the context", hidden)
        store.advance(chunk.shape[1])
    return store.prefix()


def embed_prefix(model: PreTrainedModel, embedding: Tensor, lengths: Tensor | None = None) -> Prefix:
    """Keys and values of embedding prompts, differentiable with respect to `embedding`.

    Cost: a forward over R·k tokens, independent of the batch that reads them.

    Args:
        model: a prepared model.
        embedding: `[k, d]`, or `[R, k, d]` for a bank; any floating dtype, cast to that of the model's embedding. The
            rows take the place of the embedding module's output.
        lengths: `[R]` int64, how many tokens of each prompt are real; these come first. None: all k.

    Returns:
        A prefix of R rows, k tokens, with `lengths`.

    Raises:
        SoftPromptError: the embedding size is not the model's, k is larger than the model's window, or, where no graph
            is wanted, a hidden state is not finite.
    """
    check_prepared(model)
    bank = embedding[None] if embedding.dim() == 2 else embedding
    table = _embedding_table(model)
    width = table.shape[1]
    if bank.dim() != 3 or bank.shape[1] == 0 or bank.shape[2] != width:
        raise SoftPromptError(
            f"embedding: got shape {tuple(embedding.shape)}, accepted is [k, {width}] or [R, k, {width}], k ≥ 1"
        )
    check_positions(text_config(model), bank.shape[1], 0)
    layers = LayerSink()
    device = input_device(model)
    positions = torch.arange(bank.shape[1], device=device)[None]
    graph = torch.is_grad_enabled() and embedding.requires_grad
    call = Call(None, key_lengths=lengths, sink=layers, wants_grad=graph)
    hidden = run_base(model, call, positions, inputs_embeds=bank.to(device, table.dtype))
    if not graph:  # a training looks at its loss, and the look waits for the device
        real = hidden if lengths is None else hidden[_real(lengths, bank.shape[1]).to(hidden.device)]
        check_finite(model, "hidden states of the embedding prompt", real)
    return layers.close(lengths)


Prompt = Prefix | KVPrompt | EmbeddingPrompt | PromptBank | DistributedDataParallel


@overload
def prefix_of(model: PreTrainedModel, prompt: Prompt) -> Prefix: ...
@overload
def prefix_of(model: PreTrainedModel, prompt: None) -> None: ...
def prefix_of(model: PreTrainedModel, prompt: Prompt | None) -> Prefix | None:
    """The prefix of any kind of prompt, differentiable. None (no prompt) stays None.

    Keys and values have the dtype of the model's embedding; the cast is done once for all layers. A `Prefix` is
    returned unchanged. A prompt in DistributedDataParallel is called through it, so that its gradient is averaged.

    Args:
        model: a prepared model.
        prompt: an `EmbeddingPrompt`, a `KVPrompt`, a `PromptBank` of either, or a `Prefix`.

    Raises:
        TypeError: `prompt` has another type.
        SoftPromptError: as `embed_prefix`.
    """
    if prompt is None or isinstance(prompt, Prefix):
        return prompt
    dtype = _embedding_table(model).dtype
    inner = prompt.module if isinstance(prompt, DistributedDataParallel) else prompt
    match inner:
        case KVPrompt():
            return _in_dtype(prompt(dtype), dtype)
        case EmbeddingPrompt():
            return embed_prefix(model, prompt(dtype))
        case PromptBank() if inner.is_kv:
            return _in_dtype(prompt(dtype), dtype)
        case PromptBank():
            return embed_prefix(model, *prompt(dtype))
    raise TypeError(f"prompt: got {type(inner).__name__}, accepted are Prefix, KVPrompt, EmbeddingPrompt, PromptBank")


def _in_dtype(prefix: Prefix, dtype: torch.dtype) -> Prefix:
    """The prefix in the dtype that was asked for. Mixed precision of accelerate returns fp32 whatever that was."""
    return prefix if prefix.dtype == dtype else prefix.to(dtype=dtype)


def _real(lengths: Tensor, tokens: int) -> Tensor:
    """`[R, tokens]` bool: whether a token is one of the `lengths [R]` first ones."""
    return torch.arange(tokens, device=lengths.device) < lengths[:, None]


def _embedding_table(model: PreTrainedModel) -> Tensor:
    """`[V, d]`. The model computes in its dtype, also where the layers are quantised."""
    return cast(Tensor, model.get_input_embeddings().weight)


class LayerSink:
    """Keeps each layer's keys and values, with their graph, until `close`."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] | None = {}

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        # Gradient checkpointing runs a layer again in the backward pass. The prefix has been returned by then.
        if self.layers is not None:
            self.layers[layer] = (key, value)

    def close(self, lengths: Tensor | None = None) -> Prefix:
        """The prefix of all layers. Nothing is kept from here on."""
        assert self.layers is not None
        layers, self.layers = self.layers, None
        return Prefix.of((layers[index] for index in range(len(layers))), lengths)


class MemoryStore:
    """Buffers for all tokens of every layer, in memory. A `TokenStore`.

    Args:
        total: tokens that there is room for.
        dtype: of the buffers; None: that of what is put there.
        name: of the setting that asks for this dtype, for errors.
    """

    def __init__(self, total: int, dtype: torch.dtype | None = None, name: str = "dtype") -> None:
        self.total, self.dtype, self.name = total, dtype, name
        self.length = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Copy new tokens into the buffers of a layer.

        Args:
            layer: its index.
            key, value: `[R, Hkv, n, D]` and `[R, Hkv, n, Dv]`, of any floating dtype.

        Raises:
            SoftPromptError: a number does not fit float16.
        """
        if layer not in self.layers:
            self.layers[layer] = (self._buffer(key), self._buffer(value))
        for buffer, new in zip(self.layers[layer], (key, value), strict=True):
            buffer[:, :, self.length : self.length + new.shape[2]] = fitting_cast(new, self.dtype, self.name)

    def advance(self, tokens: int) -> None:
        """Count complete tokens.

        Args:
            tokens: how many more.
        """
        self.length += tokens

    def prefix(self) -> Prefix:
        """Views of the buffers."""
        pairs = (self.layers[index] for index in range(len(self.layers)))
        return Prefix.of((key[:, :, : self.length], value[:, :, : self.length]) for key, value in pairs)

    def _buffer(self, like: Tensor) -> Tensor:
        return like.new_empty(*like.shape[:2], self.total, like.shape[3], dtype=self.dtype)
