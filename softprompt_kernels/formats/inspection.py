"""What `softprompt inspect` says of a prompt of any format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.content import DESCRIPTIONS, POSITIONS, Content
from softprompt_kernels.prompts import EmbeddingPrompt
from softprompt_kernels.prompts.adapter import check_fits
from softprompt_kernels.prompts.fingerprint import differences, model_fingerprint, tokenizer_fingerprint
from softprompt_kernels.prompts.weights import parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def inspection(path: Path, content: Content) -> dict[str, Any]:
    """The facts of a prompt, as JSON can hold them.

    Args:
        path: the file or folder that it was read from.
        content: what was read.

    Returns:
        `format`, `description`, `kind` ("kv" or "embedding"), `tokens`, `frozen_tokens`, `sizes` (layers, key heads and
        head size, or hidden size), `dtype`, `bytes` (of the files), `peft_type`, `base_model`, `family`, `positions`,
        `context` (SHA-256 and tokens), `objective`, `figures`. What the file does not say is None or empty.
    """
    prompt, record = content.prompt, content.record
    sizes: dict[str, int]
    if isinstance(prompt, EmbeddingPrompt):
        kind, sizes = "embedding", {"hidden_size": prompt.hidden_size}
    else:
        layers, heads, _, dim = prompt.key.shape
        kind, sizes = "kv", {"layers": layers, "kv_heads": heads, "head_size": dim}
    return {
        "format": content.format,
        "description": DESCRIPTIONS[content.format],
        "kind": kind,
        "tokens": prompt.length,
        "frozen_tokens": prompt.frozen_tokens,
        "sizes": sizes,
        "numbers": sum(part.numel() for part in parts_of(prompt).values()),
        "dtype": content.dtype,
        "bytes": size_of(path),
        "peft_type": content.config.get("peft_type"),
        "base_model": content.base_model,
        "family": mapping(record, "model").get("family"),
        "positions": POSITIONS[content.first_query],
        "context": mapping(record, "context"),
        "objective": mapping(record, "objective"),
        "figures": mapping(record, "figures"),
    }


def fit(content: Content, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Why a prompt does not fit a model, one phrase for each reason; empty if it fits.

    Where the file has a fingerprint, the weights of the model count too, and its tokenizer if one is given. Otherwise
    the shapes alone.

    Args:
        content: the prompt.
        model, tokenizer: what it is compared with.

    Raises:
        SoftPromptError: the model has parameters without numbers, on the meta device.
    """
    saved = mapping(content.record, "model")
    fingerprint = model_fingerprint(model, saved)
    reasons = differences(saved, fingerprint) if saved else []
    try:
        check_fits("shape", content.prompt, fingerprint)
    except SoftPromptError as error:
        reasons.append(str(error))
    words = mapping(content.record, "tokenizer")
    if words and tokenizer is not None:
        found = differences(words, tokenizer_fingerprint(tokenizer, words))
        reasons += [f"tokenizer: {phrase}" for phrase in found]
    return reasons


def has_fingerprint(content: Content) -> bool:
    """Whether the file says which weights the prompt was made for."""
    return bool(mapping(content.record, "model"))


def mapping(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object `fields[name]`; empty if it is missing or something else."""
    value = fields.get(name)
    return value if isinstance(value, dict) else {}


def size_of(path: Path) -> int:
    """The bytes of a file, or of the files of a folder."""
    files = [path] if path.is_file() else [file for file in path.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)
