"""The numbers of a saved prompt, in 32, 16 or 8 bits.

| dtype | file | read by |
|---|---|---|
| float32, bfloat16, float16 | adapter_model.safetensors: `prompt_embeddings`, see `layout` | PEFT, this package |
| int8 | prompt_int8.safetensors, see `eight_bits` | this package |

A prompt is fp32 in memory whatever the file has. Rounding is to the nearest number of the dtype.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import eight_bits
from softprompt_kernels.prompts.embedding import EmbeddingPrompt
from softprompt_kernels.prompts.json_file import integer
from softprompt_kernels.prompts.kv import KVPrompt
from softprompt_kernels.prompts.layout import flatten, unflatten

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
INT8 = "prompt_int8.safetensors"
TENSOR = "prompt_embeddings"

StoredDtype = Literal["float32", "bfloat16", "float16", "int8"]
FLOATS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
STORED_DTYPES = (*FLOATS, "int8")


def check_stored_dtype(dtype: str) -> None:
    """Raise ValueError unless prompts are stored in `dtype`."""
    if dtype not in STORED_DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, accepted are {', '.join(STORED_DTYPES)}")


def parts_of(prompt: EmbeddingPrompt | KVPrompt) -> dict[str, Tensor]:
    """The numbers of a prompt by name, fp32 on the CPU: `embedding [k, d]`, or `key` and `value` `[L, Hkv, k, D]`."""
    if isinstance(prompt, EmbeddingPrompt):
        return {"embedding": prompt.vectors(torch.float32).detach().cpu()}
    key, value = prompt.stacked(torch.float32)
    return {"key": key.detach().cpu(), "value": value.detach().cpu()}


def prompt_of(parts: dict[str, Tensor], frozen_tokens: int) -> EmbeddingPrompt | KVPrompt:
    """The prompt of such parts."""
    if "embedding" in parts:
        return EmbeddingPrompt(parts["embedding"], frozen_tokens=frozen_tokens)
    return KVPrompt(parts["key"], parts["value"], frozen_tokens=frozen_tokens)


def rounded(prompt: EmbeddingPrompt | KVPrompt, dtype: StoredDtype) -> EmbeddingPrompt | KVPrompt:
    """The prompt that is read again from a file of `dtype`, on the CPU.

    Raises:
        ValueError: `dtype` is none of those of `StoredDtype`.
        SoftPromptError: a number is too large for it.
    """
    check_stored_dtype(dtype)
    parts = {}
    for name, numbers in parts_of(prompt).items():
        if dtype == "int8":
            parts[name] = eight_bits.unpack("prompt", name, eight_bits.pack(name, numbers))
        else:
            parts[name] = to_float_dtype(numbers, dtype).float()
    return prompt_of(parts, prompt.frozen_tokens)


def to_float_dtype(numbers: Tensor, dtype: str) -> Tensor:
    """`numbers [...]` in float32, bfloat16 or float16.

    Raises:
        SoftPromptError: a finite number is too large for float16.
    """
    stored = numbers.to(FLOATS[dtype])
    if bool((stored.isinf() & numbers.isfinite()).any()):
        raise SoftPromptError(
            f"dtype: got {dtype} for a prompt with numbers up to {float(numbers.abs().max()):.3g}, which it cannot "
            "hold; accepted are float32 and bfloat16"
        )
    return stored


def weights_file(prompt: EmbeddingPrompt | KVPrompt, dtype: StoredDtype) -> tuple[str, bytes]:
    """The name and the content of the file of a prompt's numbers.

    Raises:
        ValueError, SoftPromptError: as in `rounded`.
    """
    check_stored_dtype(dtype)
    parts = parts_of(prompt)
    if dtype == "int8":
        tensors = {
            key: tensor.contiguous()
            for name, numbers in parts.items()
            for key, tensor in eight_bits.pack(name, numbers).items()
        }
        return INT8, safetensors_torch.save(tensors, metadata={"format": "pt"})
    flat = parts["embedding"] if "embedding" in parts else flatten(parts["key"], parts["value"])
    stored = to_float_dtype(flat, dtype).contiguous()
    return WEIGHTS, safetensors_torch.save({TENSOR: stored}, metadata={"format": "pt"})


def read_weights(
    path: str | Path, config: dict[str, Any], frozen_tokens: int
) -> tuple[EmbeddingPrompt | KVPrompt, StoredDtype]:
    """The prompt of a folder in fp32 on the CPU, and the dtype of its file.

    Args:
        path: the folder.
        config: the content of its adapter_config.json.
        frozen_tokens: how many of its first tokens are frozen.

    Raises:
        SoftPromptError: there is no file of numbers, or it does not fit the configuration, or has NaN or infinities.
    """
    folder = Path(path)
    tokens = integer(folder / CONFIG, config, "num_virtual_tokens", 1)
    dtype: StoredDtype
    if (folder / INT8).is_file() and not (folder / WEIGHTS).exists():
        name, dtype = INT8, "int8"
        parts = _unpacked(path, config, tokens)
    else:
        name = WEIGHTS
        tensor, dtype = read_tensor(path)
        parts = parts_of_rows(path, config, tensor, tokens)
    for numbers in parts.values():
        check_finite(str(folder / name), numbers)
    return prompt_of(parts, frozen_tokens), dtype


def _unpacked(path: str | Path, config: dict[str, Any], tokens: int) -> dict[str, Tensor]:
    file = Path(path) / INT8
    tensors = read_safetensors(file)
    names = ("embedding",) if config["peft_type"] == "PROMPT_TUNING" else ("key", "value")
    parts = {name: eight_bits.unpack(str(file), name, tensors) for name in names}
    shapes = {numbers.shape for numbers in parts.values()}
    if len(shapes) > 1:
        raise SoftPromptError(f"{file}: keys and values have shapes {sorted(map(tuple, shapes))}, accepted is one")
    (shape,) = shapes
    check_tokens(path, INT8, tokens, shape[-2])
    if "key" in parts:
        layers, heads, width = kv_sizes(path, config)
        if (shape[0], shape[1], 2 * shape[0] * shape[1] * shape[3]) != (layers, heads, width):
            raise SoftPromptError(
                f"{path}: {INT8} has {shape[0]} layers of {shape[1]} heads of {shape[3]} numbers, but {CONFIG} says "
                f"{layers} of {heads}, {width} numbers a token"
            )
    return parts


def parts_of_rows(path: str | Path, config: dict[str, Any], tensor: Tensor, tokens: int) -> dict[str, Tensor]:
    """The parts of `prompt_embeddings [k, ...]`, fp32, as views.

    Raises:
        SoftPromptError: its shape is not what the configuration says.
    """
    check_tokens(path, WEIGHTS, tokens, tensor.shape[0])
    if config["peft_type"] == "PROMPT_TUNING":
        return {"embedding": tensor}
    layers, heads, width = kv_sizes(path, config)
    if tensor.shape[1] != width or width % (2 * layers * heads):
        raise SoftPromptError(
            f"{path}: {WEIGHTS} has rows of {tensor.shape[1]} numbers, "
            f"but {CONFIG} says {width} ({layers} layers, {heads} heads)"
        )
    key, value = unflatten(tensor, layers, heads)
    return {"key": key, "value": value}


def check_tokens(path: str | Path, file: str, said: int, found: int) -> None:
    """Raise a SoftPromptError unless the file has as many tokens as the configuration says."""
    if found != said:
        raise SoftPromptError(f"{path}: {CONFIG} says {said} tokens, but {file} has {found}")


def kv_sizes(path: str | Path, config: dict[str, Any]) -> tuple[int, int, int]:
    """Layers, heads, and numbers of a token, as the configuration of a KV prompt has them."""
    layers = integer(Path(path) / CONFIG, config, "num_layers", 1)
    heads = integer(Path(path) / CONFIG, config, "num_attention_heads", 1)
    return layers, heads, 2 * layers * integer(Path(path) / CONFIG, config, "token_dim", 1)


def read_tensor(path: str | Path) -> tuple[Tensor, StoredDtype]:
    """`prompt_embeddings` in fp32 on the CPU, and its dtype in the file.

    Raises:
        SoftPromptError: there is no such file, or no matrix of finite numbers in it.
    """
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise SoftPromptError(f"{path} has no {WEIGHTS}; prompts are read from safetensors only")
    return rows_of(file, read_safetensors(file))


def rows_of(file: Path, tensors: dict[str, Tensor]) -> tuple[Tensor, StoredDtype]:
    """As `read_tensor`, for the tensors of a file that is open."""
    if TENSOR not in tensors:
        found = ", ".join(sorted(map(str, tensors))[:3]) or "nothing"
        raise SoftPromptError(f"{file} has no tensor {TENSOR}; it has {found}")
    tensor = tensors[TENSOR]
    if tensor.dim() != 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise SoftPromptError(
            f"{file}: {TENSOR} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}, "
            "accepted is a floating-point matrix with one row per token"
        )
    stored: Any = next((name for name, dtype in FLOATS.items() if dtype == tensor.dtype), "float32")
    rows = tensor.float()
    check_finite(str(file), rows)
    return rows, stored


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU.

    Raises:
        SoftPromptError: it cannot be read.
    """
    try:
        tensors: dict[str, Tensor] = safetensors_torch.load_file(file)
    except (SafetensorError, OSError, KeyError) as error:
        raise SoftPromptError(f"{file} is truncated or not a safetensors file ({error})") from error
    return tensors


def check_finite(path: str, tensor: Tensor) -> None:
    """Raise if the prompt has NaN or infinities. They would turn every logit into NaN."""
    if not bool(tensor.isfinite().all()):
        raise SoftPromptError(f"{path}: the prompt has numbers that are not finite")
