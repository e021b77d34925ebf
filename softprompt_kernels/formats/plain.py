"""A prompt as one safetensors file, for code that knows neither PEFT nor this package.

| tensor | shape |
|---|---|
| `layers.{i}.key`, `layers.{i}.value` | `[Hkv, k, D]` of layer i, keys after the rotary embedding at positions 0..k−1 |
| or `embeddings` | `[k, d]`, in place of the output of the model's embedding |

The metadata of a safetensors file is strings. Here each is JSON: `kind`, `tokens`, `frozen_tokens`, `positions`,
`base_model`, `rope` (the model's rotary settings), and `record`, the content of softprompt.json.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors_torch
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.content import POSITIONS, Content, dtype_name, embedding_prompt, kv_prompt
from softprompt_kernels.prompts import EmbeddingPrompt
from softprompt_kernels.prompts.weights import FLOATS, parts_of, read_safetensors, to_float_dtype

SCHEMA = "softprompt-kernels prompt 1"
VECTORS = "embeddings"
_LAYER = re.compile(r"layers\.(0|[1-9][0-9]*)\.(key|value)")


def to_bytes(content: Content, dtype: str) -> bytes:
    """The content of the file.

    Args:
        content: its keys are at 0..k−1.
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        SoftPromptError: another dtype, or a number is too large for it.
    """
    if dtype not in FLOATS:
        raise SoftPromptError(f"--dtype: got {dtype} for safetensors, accepted are {', '.join(FLOATS)}")
    tensors: dict[str, Tensor] = {}
    for name, numbers in parts_of(content.prompt).items():
        stored = to_float_dtype(numbers, dtype)
        if name == "embedding":
            tensors[VECTORS] = stored.contiguous()
        else:
            tensors |= {f"layers.{layer}.{name}": one.contiguous() for layer, one in enumerate(stored)}
    rope = (content.record.get("model") or {}).get("rope")
    fields: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "embedding" if isinstance(content.prompt, EmbeddingPrompt) else "kv",
        "tokens": content.prompt.length,
        "frozen_tokens": content.prompt.frozen_tokens,
        "positions": POSITIONS["k"],
        "base_model": content.base_model,
        "rope": rope,
        "record": content.record,
    }
    metadata = {name: json.dumps(value, sort_keys=True) for name, value in fields.items()}
    return safetensors_torch.save(tensors, metadata={"format": "pt", **metadata})


def is_plain(path: Path) -> bool:
    """Whether a file is a prompt of this format, by the names of its tensors. False for what is no safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (SafetensorError, OSError):
        return False
    return VECTORS in names or any(_LAYER.fullmatch(name) for name in names)


def read(path: Path) -> Content:
    """Read such a file, also one without this package's metadata.

    Raises:
        SoftPromptError: the file is damaged, its tensors do not fit each other, or its positions are others.
    """
    tensors = read_safetensors(path)
    metadata = metadata_of(path)
    if metadata.get("positions", POSITIONS["k"]) != POSITIONS["k"]:
        raise SoftPromptError(f"{path}: positions are {metadata['positions']!r}, accepted is {POSITIONS['k']!r}")
    frozen = metadata.get("frozen_tokens", 0)
    if type(frozen) is not int:
        raise SoftPromptError(f"{path}: frozen_tokens is {frozen!r}, accepted is a whole number")
    if VECTORS in tensors:
        vectors = tensors[VECTORS]
        prompt: Any = embedding_prompt(f"{path}: {VECTORS}", vectors, frozen)
        dtype = dtype_name(vectors)
    else:
        keys, values = layers_of(path, tensors)
        prompt = kv_prompt(str(path), keys, values, frozen)
        dtype = dtype_name(keys[0])
    record, base = metadata.get("record"), metadata.get("base_model")
    return Content(
        "safetensors",
        prompt,
        "k",
        dtype,
        base if isinstance(base, str) else None,
        record=record if isinstance(record, dict) else {},
    )


def layers_of(path: Path, tensors: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The keys and the values of a file, each `[Hkv, k, D]`, in the order of the layers.

    Raises:
        SoftPromptError: there are none, or a layer is missing.
    """
    found = {(int(match[1]), match[2]) for name in tensors if (match := _LAYER.fullmatch(name))}
    layers = (len(found) + 1) // 2
    missing = [f"layers.{i}.{n}" for i in range(layers) for n in ("key", "value") if (i, n) not in found]
    if missing or not layers:
        raise SoftPromptError(
            f"{path} has no tensor {missing[0] if missing else 'layers.0.key'}; accepted are layers.0.key, "
            f"layers.0.value and so on, or {VECTORS}"
        )
    return [tensors[f"layers.{i}.key"] for i in range(layers)], [tensors[f"layers.{i}.value"] for i in range(layers)]


def metadata_of(path: Path) -> dict[str, Any]:
    """The metadata of a safetensors file, with the strings that are JSON parsed."""
    with safe_open(path, framework="pt") as file:
        strings = file.metadata() or {}
    parsed = {}
    for name, text in strings.items():
        try:
            parsed[name] = json.loads(text)
        except (ValueError, RecursionError):
            parsed[name] = text
    return parsed
