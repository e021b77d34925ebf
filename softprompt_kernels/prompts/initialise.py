"""Where a prompt starts: pure functions from a context, a text, the vocabulary or chance to k tokens.

| start | tokens | KV prompt | embedding prompt |
|---|---|---|---|
| first | first k of the context | `from_prefix(context, k, "first")` | `embed_tokens(embed, first_tokens(ids, k))` |
| strided | k spread evenly over it | `from_prefix(context, k, "strided", rotate=...)` | `strided_tokens` |
| text | of any text, cut or repeated to k | capture of `tiled_tokens(ids, k)` | `tiled_tokens` |
| vocabulary | k tokens by chance | capture of `vocabulary_tokens(...)` | `vocabulary_tokens` |
| random | no tokens: noise of the right size | `random_prefix(like, k)` | `random_embedding(embed, ...)` |

The start decides much of the end (Cartridges, LongHealth: 55.3 from the first tokens, 51.3 from unrelated text, 29.9
from random vectors), above all within few steps. Strided KV tokens reach furthest: each has seen all of the context
before it.

Everything here is deterministic given its `generator`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts.prefix import Prefix

Rotate = Callable[[Prefix, int], Prefix]
"""`rotate(prefix, delta)` moves all keys by `delta` positions; only the model knows its rotary embedding."""

MEASURED_TOKENS = 4096
"""Tokens of the vocabulary, drawn by chance, that the moments of `random_embedding` are measured on."""


def strided_indices(available: int, k: int) -> Tensor:
    """`[k]` int64: k of `0 … available−1`, increasing, as evenly spread as integers can be.

    `index_i = ⌊i·(available − 1)/(k − 1)⌋`: the first is always there (the sink), so is the last (nearest to the
    question, and the only one that saw the whole context), and gaps differ by one at most. k = 1 gives the first.

    Raises:
        SoftPromptError: not `1 ≤ k ≤ available`.
    """
    check_tokens(k, available)
    return torch.arange(k) * (available - 1) // max(k - 1, 1)


# KV prompts


def from_prefix(context: Prefix, k: int, how: str = "first", *, rotate: Rotate | None = None) -> Prefix:
    """k tokens of a captured context as a prefix that queries follow at position k.

    "first" takes tokens 0..k−1: they are where they belong, so nothing is rotated, and the result is exactly the
    prefix of the truncated context.

    "strided" takes `strided_indices`. In the context of length C their keys stood at positions p and queries came at
    C, so distances were C − p. Rotary scores depend on distances only: with all keys rotated by k − C, queries at k
    see the same distances, hence the same scores.

    Args:
        context: one row without padding, C tokens.
        k: from 1 to C.
        how: "first" or "strided".
        rotate: the model's rotation, for "strided". None: keys are taken as they are, which is right for models with
            learned positions only.

    Raises:
        SoftPromptError: k out of range.
        ValueError: another `how`, or a bank.
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
    """k tokens of Gaussian noise with the mean and spread that `like` has, channel by channel.

    Keys have channels of large constant offset and layers differ in scale by orders of magnitude, so unit noise lands
    far outside what the model can attend to. Moments are taken over the tokens after the sink, whose norms are unlike
    all others; the sink itself is copied, for a random vector is none.

    Args:
        like: a captured prefix of the same model, one row, at least `sink_tokens + 2` tokens.
        k: any length ≥ 1.
        sink_tokens: how many of the first tokens of `like` are copied (min(k, sink_tokens) are).
        generator: of the CPU; the same one gives the same prompt on every device.

    Raises:
        SoftPromptError: k < 1, or `like` too short to measure.
        ValueError: a bank, or `sink_tokens` < 0.
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
        noise = torch.randn(1, heads, k - copied, dim, generator=generator).to(tensor.device)
        return torch.cat((tensor[:, :, :copied], (mean + std * noise).to(tensor.dtype)), dim=2)

    return Prefix.of((sample(key), sample(value)) for key, value in like.layers)


# Tokens: for embedding prompts, and to capture a KV prompt from


def first_tokens(ids: Tensor, k: int) -> Tensor:
    """`[k]`: the first k of `ids [C]`.

    Raises:
        SoftPromptError: not `1 ≤ k ≤ C`.
    """
    check_tokens(k, check_ids(ids))
    return ids[:k]


def strided_tokens(ids: Tensor, k: int) -> Tensor:
    """`[k]`: `ids [C]` at `strided_indices(C, k)`.

    Raises:
        SoftPromptError: not `1 ≤ k ≤ C`.
    """
    return ids[strided_indices(check_ids(ids), k).to(ids.device)]


def tiled_tokens(ids: Tensor, k: int) -> Tensor:
    """`[k]`: the tokens of a text `ids [T]`, cut to k, or repeated from its start until there are k (PEFT's rule).

    Raises:
        SoftPromptError: k < 1, or a text without tokens.
    """
    check_tokens(k, None)
    count = check_ids(ids)
    if count == 0:
        raise SoftPromptError("The text to start the prompt from has no tokens; accepted is one token or more")
    return ids[torch.arange(k, device=ids.device) % count]


def vocabulary_tokens(
    vocab_size: int, k: int, *, exclude: Collection[int] = (), generator: torch.Generator | None = None
) -> Tensor:
    """`[k]` int64 on the CPU: k different tokens of the vocabulary by chance.

    Args:
        vocab_size: V.
        k: from 1 to the number of tokens left.
        exclude: ids never drawn (special tokens: an end-of-text in the middle of a prompt ends what came before it).
        generator: of the CPU.

    Raises:
        SoftPromptError: k out of range.
    """
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    allowed[[token for token in exclude if 0 <= token < vocab_size]] = False
    tokens = allowed.nonzero().flatten()
    check_tokens(k, tokens.numel())
    return tokens[torch.randperm(tokens.numel(), generator=generator)[:k]]


# Embedding prompts


@torch.no_grad()
def embed_tokens(embed: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """`[k, d]` fp32: what the model's embedding module makes of `ids [k]`.

    `embed` is the module, not its weight: some families (Gemma) scale the rows that they look up.
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
    """`[k, d]` fp32: Gaussian noise with the mean and spread, channel by channel, of the model's token embeddings.

    Args:
        embed: the model's embedding module, on `device`.
        vocab_size: V, at least 2.
        k: any length ≥ 1.
        device: where `embed` takes its ids.
        generator: of the CPU.

    Raises:
        SoftPromptError: k < 1, or a vocabulary too small to measure.
    """
    check_tokens(k, None)
    if vocab_size < 2:
        raise SoftPromptError(f"vocab_size: got {vocab_size}, accepted is at least 2 tokens to measure")
    measured = embed_tokens(
        embed, vocabulary_tokens(vocab_size, min(MEASURED_TOKENS, vocab_size), generator=generator).to(device)
    )
    std, mean = torch.std_mean(measured, dim=0)
    return mean + std * torch.randn(k, measured.shape[1], generator=generator).to(measured.device)


# Checks


def check_tokens(k: int, available: int | None) -> None:
    """Refuses a prompt length that cannot be had."""
    if k < 1:
        raise SoftPromptError(f"The prompt needs at least 1 token, got {k}")
    if available is not None and k > available:
        raise SoftPromptError(f"The prompt cannot have {k} tokens where only {available} are there to start from")


def check_one_row(prefix: Prefix) -> None:
    """Refuses a bank where one context is meant."""
    if prefix.rows != 1 or prefix.lengths is not None:
        raise ValueError(f"prefix: got a bank of {prefix.rows} rows, accepted is one row without padding")


def check_ids(ids: Tensor) -> int:
    """The number of tokens of `ids`, which has to be `[C]`."""
    if ids.dim() != 1:
        raise ValueError(f"ids: got shape {tuple(ids.shape)}, accepted is [C], one sequence without a batch")
    return ids.shape[0]
