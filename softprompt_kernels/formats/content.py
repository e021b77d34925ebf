"""What a file of any format holds: the prompt, and what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, adapter

FormatName = Literal["folder", "peft", "safetensors", "cartridges", "vllm-embeds"]
FORMATS: tuple[FormatName, ...] = ("folder", "peft", "safetensors", "cartridges", "vllm-embeds")
DESCRIPTIONS: dict[FormatName, str] = {
    "folder": "a saved prompt of this package, with softprompt.json",
    "peft": "a prompt adapter of PEFT",
    "safetensors": "one safetensors file of keys and values, or of vectors",
    "cartridges": "a cache of Cartridges (a TrainableCache, .pt)",
    "vllm-embeds": "the vectors of a prompt for vLLM (a tensor, .pt)",
}

FirstQuery = Literal["k", "0"]
POSITIONS: dict[FirstQuery, str] = {
    "k": adapter.POSITIONS,
    "0": "prompt before the sequence, which starts at 0",
}
"""Where the sequence after a prompt starts."""


@dataclass(frozen=True, eq=False)
class Content:
    """A prompt and what its file says of it.

    Args:
        format: the format of the file.
        prompt: in fp32 on the CPU.
        first_query: the position of the first token after the prompt that the keys are made for: "k" as in PEFT and in
            this package, "0" where the sequence is counted anew (see `cartridges`).
        dtype: that of the numbers in the file, by torch's name, or "int8".
        base_model: name of the model that the prompt belongs to; None: the file does not say.
        config: the content of adapter_config.json; empty where there is none.
        record: what softprompt.json has in a saved prompt: fingerprints, context, objective, figures. Empty where the
            file does not say.
    """

    format: FormatName
    prompt: EmbeddingPrompt | KVPrompt
    first_query: FirstQuery
    dtype: str
    base_model: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def kv_prompt(place: str, keys: list[Tensor], values: list[Tensor], frozen_tokens: int) -> KVPrompt:
    """A KV prompt of one key `[Hkv, k, D]` and one value for each layer, in any floating dtype.

    Args:
        place: the file, for the messages.
        keys, values: one for each layer.
        frozen_tokens: how many of the first tokens are frozen.

    Raises:
        SoftPromptError: shapes that do not fit each other, other numbers than finite floats, no tokens, or more frozen
            tokens than tokens.
    """
    if not keys or len(keys) != len(values):
        raise SoftPromptError(
            f"{place} has keys of {len(keys)} and values of {len(values)} layers, accepted is one of each a layer"
        )
    shape = tuple(keys[0].shape)
    for name, tensors in (("key", keys), ("value", values)):
        for layer, tensor in enumerate(tensors):
            place_of = f"{place}: the {name} of layer {layer}"
            check_numbers(place_of, tensor, 3, "[key heads, tokens, head size]")
            if tuple(tensor.shape) != shape:
                raise SoftPromptError(
                    f"{place_of} has shape {tuple(tensor.shape)}, accepted is that of the first key, {shape}"
                )
    check_frozen(place, frozen_tokens, shape[1])
    return KVPrompt(torch.stack(keys).float(), torch.stack(values).float(), frozen_tokens=frozen_tokens)


def embedding_prompt(place: str, vectors: Tensor, frozen_tokens: int = 0) -> EmbeddingPrompt:
    """An embedding prompt of vectors `[k, d]` in any floating dtype; arguments and errors as in `kv_prompt`."""
    check_numbers(place, vectors, 2, "[tokens, hidden size]")
    check_frozen(place, frozen_tokens, vectors.shape[0])
    return EmbeddingPrompt(vectors.float(), frozen_tokens=frozen_tokens)


def check_numbers(place: str, tensor: Tensor, dimensions: int, shape: str) -> None:
    """Raise a SoftPromptError unless a tensor has finite floating-point numbers and so many dimensions."""
    if not tensor.is_floating_point() or tensor.dim() != dimensions or 0 in tensor.shape:
        raise SoftPromptError(
            f"{place} is {dtype_name(tensor)} of shape {tuple(tensor.shape)}, accepted are floating-point numbers of "
            f"shape {shape}"
        )
    if not bool(tensor.float().isfinite().all()):
        raise SoftPromptError(f"{place} has numbers that are not finite in float32")


def check_frozen(place: str, frozen_tokens: int, tokens: int) -> None:
    """Raise a SoftPromptError unless 0 ≤ frozen tokens ≤ tokens."""
    if not 0 <= frozen_tokens <= tokens:
        raise SoftPromptError(f"{place}: {frozen_tokens} frozen tokens of {tokens}, accepted is 0 to {tokens}")


def dtype_name(tensor: Tensor) -> str:
    """The name of a tensor's dtype, without "torch."."""
    return str(tensor.dtype).removeprefix("torch.")


def check_other_place(option: str, target: Path, source: Path) -> None:
    """Raise a SoftPromptError if a prompt would be written over the one that it is made from.

    Args:
        option: the option that names the target.
        target, source: files or folders.
    """
    if target.exists() and source.exists() and target.resolve() == source.resolve():
        raise SoftPromptError(f"{option}: got {target}, which is the prompt itself; accepted is another path")


def check_target(option: str, target: Path, format_name: FormatName, found: str | None) -> None:
    """Raise a SoftPromptError if a file is there that is not of the format that would replace it.

    Args:
        option: the option that names the file.
        target: where the file is to be written.
        format_name: what is to be written.
        found: the format of what is there; None: nothing that is known.
    """
    if target.exists() and found != format_name:
        raise SoftPromptError(
            f"{option}: {target} exists and is not {DESCRIPTIONS[format_name]}; accepted is a new path, or such a file "
            "to replace"
        )
