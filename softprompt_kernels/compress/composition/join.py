"""Prompts of several contexts, joined to one.

    joined = [σ_1 ; moved σ_2 ; … ; moved σ_n],     σ_j without its sink for j ≥ 2

**Positions.** σ_j was made to stand at 0..k_j−1. In the joined prompt it stands behind those before it, so its keys are
rotated to there (`models.shift_keys`). This is exact, because rotary scores depend on differences of positions alone:
slices of one prompt, cut and joined, are that prompt again. What σ_j holds is not changed, as it has not read the other
contexts.

**Masses.** Behind the joined prompt, attention is one softmax over all keys. With the sum of exponentials Z_j and the
weighted values N_j of each prompt, and those of the own tokens,

    out = (Σ N_j + N_own) / (Σ Z_j + Z_own)

Each prompt was matched so that Z_j is that of its context. They add up as those of the contexts would, so no key needs
a correction. The attention sink must not add up: the first token takes the weight of heads that have nothing to read,
and n sinks would take it n times. So only the first prompt keeps its frozen tokens, which are its sink; the others lose
theirs. (docs/scale/compose.md has what was measured.)

**Embedding prompts** have no positions of their own, and no frozen tokens by default. Their vectors stand one behind
the other, and the model reads them in one run, in which later ones see the earlier ones.

Cost: one pass over the keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from softprompt_kernels.compress.distill.trainer import Prompt
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import check_fixed_frequencies, shift_keys
from softprompt_kernels.models.families import rope_parameters
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix


def join_prompts(model: PreTrainedModel, prompts: Sequence[Prompt]) -> Prompt:
    """One prompt that stands for the contexts of all of them, in this order.

    Args:
        model: that the prompts were made for. It rotates the keys.
        prompts: two or more of one kind, on one device. They are not changed.

    Returns:
        A new prompt of `joined_tokens(prompts)` tokens. The frozen tokens of the first stay frozen.

    Raises:
        SoftPromptError: fewer than two prompts, two kinds, shapes that differ, or KV prompts of a model whose keys
            cannot be moved: it has learned positions, or frequencies that depend on the length.
    """
    if len(prompts) < 2:
        raise SoftPromptError(f"prompts: got {len(prompts)}, accepted are two or more")
    kinds = {"kv" if isinstance(prompt, KVPrompt) else "embedding" for prompt in prompts}
    if len(kinds) > 1:
        raise SoftPromptError("prompts: got kv and embedding prompts, accepted are prompts of one kind")
    shapes = [_shape(prompt) for prompt in prompts]
    for index, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise SoftPromptError(
                f"prompts[{index}]: got a prompt of {shape}, accepted is that of prompts[0]: {shapes[0]}"
            )
    dropped = [0, *(prompt.frozen_tokens for prompt in prompts[1:])]
    frozen = prompts[0].frozen_tokens
    with torch.no_grad():
        vectors = [p.vectors()[n:] for p, n in zip(prompts, dropped, strict=True) if isinstance(p, EmbeddingPrompt)]
        if vectors:
            return EmbeddingPrompt(torch.cat(vectors), frozen_tokens=frozen)
        check_movable(model)
        prefixes = [prompt.prefix() for prompt in prompts if isinstance(prompt, KVPrompt)]
        return KVPrompt.from_prefix(join_prefixes(model, prefixes, dropped), frozen_tokens=frozen)


def joined_tokens(lengths: Sequence[int], frozen: Sequence[int]) -> list[int]:
    """How many tokens of the joined prompt come from each prompt.

    Args:
        lengths: of the prompts.
        frozen: their frozen tokens.
    """
    return [length - (sink if index else 0) for index, (length, sink) in enumerate(zip(lengths, frozen, strict=True))]


def join_prefixes(model: PreTrainedModel, prefixes: Sequence[Prefix], dropped: Sequence[int]) -> Prefix:
    """Prefixes one behind the other, with keys moved to their places.

    Args:
        model: rotates the keys.
        prefixes: of one row without padding each, with keys at 0..k_j−1.
        dropped: how many tokens at the start of each are left out.
    """
    parts, place = [], 0
    for prefix, drop in zip(prefixes, dropped, strict=True):
        parts.append(shift_keys(model, prefix.slice(drop, prefix.length), place - drop))
        place += prefix.length - drop
    return beside_each_other(parts)


def beside_each_other(prefixes: Sequence[Prefix]) -> Prefix:
    """Prefixes one behind the other, with keys as they are. This is all that PEFT's composition of adapters does."""
    layers = zip(*(prefix.layers for prefix in prefixes), strict=True)
    return Prefix.of(
        (torch.cat([k for k, _ in layer], dim=2), torch.cat([v for _, v in layer], dim=2)) for layer in layers
    )


def check_movable(model: PreTrainedModel) -> None:
    """Raise SoftPromptError if the keys of a model cannot be moved, so that its KV prompts cannot be joined."""
    if not rope_parameters(model.config):
        raise SoftPromptError(
            f"model: got a '{model.config.model_type}', whose positions are learned and are part of each key: its kv "
            "prompts cannot be joined; accepted are models with rotary positions, or embedding prompts"
        )
    check_fixed_frequencies(model)


def _shape(prompt: Prompt) -> str:
    if isinstance(prompt, EmbeddingPrompt):
        return f"vectors of {prompt.hidden_size} numbers"
    layers, heads, _, dim = prompt.key.shape
    return f"{layers} layers of {heads} heads of {dim} and {prompt.value.shape[3]} numbers"
