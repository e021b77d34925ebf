"""Prompt adapters of PEFT: folders with adapter_config.json, with or without this package's softprompt.json.

PEFT saves what its prompt encoder gives, not the encoder. A prompt with a reparameterisation (`prefix_projection=True`)
therefore lies in its file as keys and values, after the projection, and loads like one without.

Refused are types whose numbers are no prompt that stands alone: P_TUNING, MULTITASK_PROMPT_TUNING and the rest; and
prompts for more than one submodule (encoder-decoders).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.content import Content
from softprompt_kernels.formats.torch_file import dense, load_tensors
from softprompt_kernels.prompts import EmbeddingPrompt
from softprompt_kernels.prompts.adapter import describe, embedding_config, frozen_tokens, kv_config
from softprompt_kernels.prompts.adapter import read as read_folder
from softprompt_kernels.prompts.json_file import integer
from softprompt_kernels.prompts.weights import CONFIG, TENSOR, WEIGHTS, parts_of_rows, prompt_of, rows_of

OLD_WEIGHTS = "adapter_model.bin"


def read(path: Path) -> Content:
    """Read a folder of PEFT or of this package. PEFT's older `adapter_model.bin` is read without running code.

    Raises:
        SoftPromptError: no such folder, another type of adapter, or a broken file.
    """
    if (path / OLD_WEIGHTS).is_file() and not (path / WEIGHTS).exists():
        config, record = describe(path)
        tensors = load_tensors(path / OLD_WEIGHTS)
        if not isinstance(tensors, dict):
            raise SoftPromptError(f"{path / OLD_WEIGHTS} holds {type(tensors).__name__}, accepted are tensors by name")
        if TENSOR in tensors:
            dense(f"{path / OLD_WEIGHTS}: {TENSOR}", tensors[TENSOR])
        rows, dtype = rows_of(path / OLD_WEIGHTS, tensors)
        tokens = integer(path / CONFIG, config, "num_virtual_tokens", 1)
        prompt = prompt_of(parts_of_rows(path, config, rows, tokens), frozen_tokens(path, config, record, tokens))
        stored = cast(str, dtype)
    else:
        found = read_folder(path)
        prompt, config, record, stored = found.prompt, found.config, found.record, found.dtype
    base = config.get("base_model_name_or_path")
    return Content(
        "peft" if record is None else "folder",
        prompt,
        "k",
        stored,
        base if isinstance(base, str) and base else None,
        config=config,
        record=record or {},
    )


def clean_config(content: Content, kv_type: str | None) -> dict[str, Any]:
    """adapter_config.json with the fields that a prompt needs, and nothing else of what a file had.

    Args:
        content: the prompt. Its sizes are taken from it, and what they do not say from its record or its configuration.
        kv_type: PREFIX_TUNING or CARTRIDGE, for a KV prompt; PROMPT_TUNING, for an embedding prompt; None: CARTRIDGE or
            PROMPT_TUNING.

    Raises:
        SoftPromptError: the type is not one of this kind of prompt, or the number of layers or heads is not known.
    """
    embedding = isinstance(content.prompt, EmbeddingPrompt)
    accepted = ("PROMPT_TUNING",) if embedding else ("CARTRIDGE", "PREFIX_TUNING")
    if kv_type is not None and kv_type not in accepted:
        raise SoftPromptError(
            f"--type: got {kv_type} for {'an embedding' if embedding else 'a KV'} prompt, accepted: "
            f"{' or '.join(accepted)}" + ("; with --model also the other types" if embedding else "")
        )
    if isinstance(content.prompt, EmbeddingPrompt):
        model = content.record.get("model") or {}
        fields = {
            "layers": model.get("layers") or content.config.get("num_layers"),
            "attention_heads": model.get("attention_heads") or content.config.get("num_attention_heads"),
        }
        if not all(type(value) is int for value in fields.values()):
            raise SoftPromptError(
                "--to: the file does not say how many layers and heads its model has, which PEFT's configuration "
                "needs; accepted with --model"
            )
        config = embedding_config(content.prompt, fields)
    else:
        config = kv_config(content.prompt, {"layers": content.prompt.num_layers}, kv_type or "CARTRIDGE")
    return config | {"base_model_name_or_path": content.base_model}
