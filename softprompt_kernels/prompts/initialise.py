"""Initialise a prompt of k tokens: from a context, from a text, from the vocabulary, or at random. Pure functions.

| method | tokens | KV prompt | embedding prompt |
|---|---|---|---|
| first | first k of the context | `from_prefix(context, k, "first")` | `embed_tokens(embed, first_tokens(ids, k))` |
| strided | k evenly spaced ones of the context | `from_prefix(context, k, "strided", rotate=...)` | `strided_tokens` |
| text | of any text, cut or repeated to k | capture of `tiled_tokens(ids, k)` | `tiled_tokens` |
| vocabulary | k random tokens | capture of `vocabulary_tokens(...)` | `vocabulary_tokens` |
| random | no tokens: noise of the right scale | `random_prefix(like, k)` | `random_embedding(embed, ...)` |

The initialisation matters much for the result (Cartridges, LongHealth: 55.3 from the first tokens, 51.3 from unrelated
text, 29.9 from random vectors), most of all after few steps. Strided KV tokens carry most of the context: the keys and
values of each token depend on all of the context before it.

All functions are deterministic given their `generator`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts.prefix import Prefix

Rotate = Callable[[Prefix, int], Prefix]
"""`rotate(prefix, delta)` moves all keys by `delta` positions (`models.shift_keys` with the model bound)."""

MEASURED_TOKENS = 4096
"""Number of random tokens of the vocabulary from which `random_embedding` takes mean and standard deviation."""


def strided_indices(available: int, k: int) -> Tensor:
    """`[k]` int64: k of `0 … available−1`, increasing, as evenly spaced as integers can be.

    `index_i = ⌊i·(available − 1)/(k − 1)⌋`. The first index is always included (the sink), and so is the last: it is
    nearest to the question, and only its token attended to the whole context. Gaps differ by at most one. k = 1 gives
    the first index.

    Raises:
        SoftPromptError: `1 ≤ k ≤ available` does not hold.
    """
    check_tokens(k, available)
    return torch.arange(k, device="cpu") * (available - 1) // max(k - 1, 1)


# KV prompts


def from_prefix(context: Prefix, k: int, how: str = "first", *, rotate: Rotate | None = None) -> Prefix:
    """k tokens of a captured context as a prefix. The sequence that follows continues at position k.

    "first" takes tokens 0..k−1. Their positions do not change, so nothing is rotated. The result is exactly the prefix
    of the truncated context.

    "strided" takes the tokens at `strided_indices`. In the context of length C, the key of token p has distance C − p
    to a query at C. Rotary scores depend on distances only. All keys are rotated by k − C, so a query at k has the same
    distances and the same scores.

    Args:
        context: one row without padding, C tokens.
        k: from 1 to C.
        how: "first" or "strided".
        rotate: the model's rotation, for "strided". None: keys are not rotated. This is right only for models with
            learned positions.

    Raises:
        SoftPromptError: k is out of range.
        ValueError: `how` is unknown, or `context` is a bank.
    """
    check_one_row(context)
    check_tokens(k, context.length)
    if how == "first":
        return context.slice(0, k)
    if how != "strided":
        raise ValueError(f'how: got {how!r}, accepted are "first" and "strided"')
    index = strided_indices(context.length, k).to(context.device)
    chosen = Prefix.of((key.index_select(2, index), value.index_select(2, index)) for key, value in context.layers)
    return chosen if rotate is None else rotate(chosen, k - context.length)


def random_prefix(like: Prefix, k: int, *, sink_tokens: int = 1, generator: torch.Generator | None = None) -> Prefix:
    """k tokens of Gaussian noise with the mean and standard deviation of `like` in every channel.

    Some channels of keys have a large constant offset, and layers differ in scale by orders of magnitude. Unit noise
    would be far outside the range that the model can attend to. Mean and standard deviation are taken over the tokens
    after the sink, because the norm of the sink is unlike all others. The sink itself is copied: a random vector would
    not act as a sink.

    Args:
        like: a captured prefix of the same model, one row, at least `sink_tokens + 2` tokens.
        k: any length ≥ 1.
        sink_tokens: min(k, sink_tokens) of the first tokens of `like` are copied.
        generator: of the CPU; the same one gives the same prompt on every device.

    Raises:
        SoftPromptError: k < 1, or `like` is too short.
        ValueError: `like` is a bank, or `sink_tokens` < 0.
    """
    check_one_row(like)
    check_tokens(k, None)
    if sink_tokens < 0:
        raise ValueError(f"sink_tokens: got {sink_tokens}, accepted is 0 or more")
    if like.length < sink_tokens + 2:
        raise SoftPromptError(
            f"like: got a prefix of {like.length} tokens, accepted is one of at least {sink_tokens + 2} to measure"
        )
    copied = min(k, sink_tokens)

    def sample(tensor: Tensor) -> Tensor:
        measured = tensor[:, :, sink_tokens:].float()
        std, mean = torch.std_mean(measured, dim=2, keepdim=True)
        _, heads, _, dim = tensor.shape
        noise = torch.randn(1, heads, k - copied, dim, generator=generator, device="cpu").to(tensor.device)
        return torch.cat((tensor[:, :, :copied], (mean + std * noise).to(tensor.dtype)), dim=2)

    return Prefix.of((sample(key), sample(value)) for key, value in like.layers)


# Token ids: for embedding prompts, or for a KV prompt that is captured from them


def first_tokens(ids: Tensor, k: int) -> Tensor:
    """`[k]`: the first k of `ids [C]`.

    Raises:
        SoftPromptError: `1 ≤ k ≤ C` does not hold.
    """
    check_tokens(k, check_ids(ids))
    return ids[:k]


def strided_tokens(ids: Tensor, k: int) -> Tensor:
    """`[k]`: `ids [C]` at `strided_indices(C, k)`.

    Raises:
        SoftPromptError: `1 ≤ k ≤ C` does not hold.
    """
    return ids[strided_indices(check_ids(ids), k).to(ids.device)]


def tiled_tokens(ids: Tensor, k: int) -> Tensor:
    """`[k]`: the tokens of a text `ids [T]`, cut to k, or repeated from the start until there are k (as PEFT does).

    Raises:
        SoftPromptError: k < 1, or the text has no tokens.
    """
    check_tokens(k, None)
    count = check_ids(ids)
    if count == 0:
        raise SoftPromptError("The text to start the prompt from has no tokens; accepted is one token or more")
    return ids[torch.arange(k, device=ids.device) % count]


def vocabulary_tokens(
    vocab_size: int, k: int, *, exclude: Collection[int] = (), generator: torch.Generator | None = None
) -> Tensor:
    """`[k]` int64 on the CPU: k different random tokens of the vocabulary.

    Args:
        vocab_size: V.
        k: from 1 to the number of tokens that are not excluded.
        exclude: ids that are never drawn. Use it for special tokens: an end-of-text token in the middle of a prompt
            cuts off the tokens before it.
        generator: of the CPU.

    Raises:
        SoftPromptError: k is out of range.
    """
    allowed = torch.ones(vocab_size, dtype=torch.bool, device="cpu")
    allowed[[token for token in exclude if 0 <= token < vocab_size]] = False
    tokens = allowed.nonzero().flatten()
    check_tokens(k, tokens.numel())
    return tokens[torch.randperm(tokens.numel(), generator=generator, device="cpu")[:k]]


# Embedding prompts


@torch.no_grad()
def embed_tokens(embed: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """`[k, d]` fp32: the output of the model's embedding module for `ids [k]`.

    `embed` is the module, not its weight, because some families (Gemma) scale the rows of the table.
    """
    check_ids(ids)
    return embed(ids[None])[0].float()


def random_embedding(
    embed: Callable[[Tensor], Tensor],
    vocab_size: int,
    k: int,
    *,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
) -> Tensor:
    """`[k, d]` fp32: Gaussian noise with the mean and standard deviation of the token embeddings in every channel.

    Args:
        embed: the model's embedding module, on `device`.
        vocab_size: V, at least 2.
        k: any length ≥ 1.
        device: the device of the ids that `embed` takes.
        generator: of the CPU.

    Raises:
        SoftPromptError: k < 1, or the vocabulary has less than 2 tokens.
    """
    check_tokens(k, None)
    if vocab_size < 2:
        raise SoftPromptError(f"vocab_size: got {vocab_size}, accepted is at least 2 tokens to measure")
    measured = embed_tokens(
        embed, vocabulary_tokens(vocab_size, min(MEASURED_TOKENS, vocab_size), generator=generator).to(device)
    )
    std, mean = torch.std_mean(measured, dim=0)
    return mean + std * torch.randn(k, measured.shape[1], generator=generator, device="cpu").to(measured.device)


# Checks


def check_tokens(k: int, available: int | None) -> None:
    """Raise unless `1 ≤ k ≤ available` (None: no upper limit)."""
    if k < 1:
        raise SoftPromptError(f"The prompt needs at least 1 token, got {k}")
    if available is not None and k > available:
        raise SoftPromptError(f"The prompt cannot have {k} tokens: there are only {available} to start from")


def check_one_row(prefix: Prefix) -> None:
    """Raise if `prefix` is a bank: several rows, or a row with padding."""
    if prefix.rows != 1 or prefix.lengths is not None:
        raise ValueError(f"prefix: got a bank of {prefix.rows} rows, accepted is one row without padding")


def check_ids(ids: Tensor) -> int:
    """C, the number of tokens of `ids [C]`. Raises a ValueError for another shape."""
    if ids.dim() != 1:
        raise ValueError(f"ids: got shape {tuple(ids.shape)}, accepted is [C], one sequence without a batch")
    return ids.shape[0]
