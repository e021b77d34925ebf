"""Write a prompt in another format.

| `to` | written | needs the model |
|---|---|---|
| `folder` | a saved prompt, with README.md; float32, bfloat16, float16 or int8 | |
| `peft` | the same, in the dtypes that PEFT reads, with the PEFT type that is asked for | |
| `safetensors` | one file, see `plain` | |
| `cartridges` | one file, see `cartridges` | for queries at 0 |
| `vllm-embeds` | one file, see `vllm` | |

A file or folder is complete or not there. What exists is replaced only if it has the same format.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats import cartridges, plain, vllm
from softprompt_kernels.formats.card import card_text
from softprompt_kernels.formats.content import FORMATS, POSITIONS, Content, FirstQuery, FormatName, check_target
from softprompt_kernels.formats.files import known_format
from softprompt_kernels.formats.inspection import mapping
from softprompt_kernels.formats.peft import clean_config
from softprompt_kernels.formats.torch_file import saved_bytes
from softprompt_kernels.models import prefix_of
from softprompt_kernels.output_file import check_output, written_when_complete
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt
from softprompt_kernels.prompts.adapter import FORMAT, base_name, check_destination, write
from softprompt_kernels.prompts.fingerprint import model_fingerprint
from softprompt_kernels.prompts.offload import input_device
from softprompt_kernels.prompts.weights import STORED_DTYPES, StoredDtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KV_TYPES = ("CARTRIDGE", "PREFIX_TUNING")
PEFT_TYPES = (*KV_TYPES, "PROMPT_TUNING")


def check_export(
    output: Path, to: str, dtype: str, kv_type: str | None, queries_at: FirstQuery, model_given: bool
) -> None:
    """Check the arguments of an export against each other and the place of the output, before anything is read.

    Args:
        output: where the file or folder will be.
        to, dtype, kv_type, queries_at: as in `export`.
        model_given: whether the model will be there.

    Raises:
        SoftPromptError: they do not go together, or something else is there.
    """
    if to not in FORMATS:
        raise SoftPromptError(f"--to: got {to!r}, accepted are {', '.join(FORMATS)}")
    if dtype not in STORED_DTYPES:
        raise SoftPromptError(f"--dtype: got {dtype!r}, accepted are {', '.join(STORED_DTYPES)}")
    if dtype == "int8" and to != "folder":
        reader = "PEFT cannot read 8 bits" if to == "peft" else f"{to} has no 8 bits"
        raise SoftPromptError(f"--dtype: got int8, but {reader}; accepted with --to folder, which this package reads")
    if kv_type is not None and kv_type not in PEFT_TYPES:
        raise SoftPromptError(f"--type: got {kv_type!r}, accepted are {', '.join(PEFT_TYPES)}")
    if queries_at == "0" and to != "cartridges":
        raise SoftPromptError(f"--queries-at: got 0 for {to}, accepted is k; 0 is for cartridges")
    if queries_at == "0" and not model_given:
        raise SoftPromptError(
            "--queries-at: got 0 without --model, which has the rotary embedding that moves the keys; accepted are both"
        )
    if to in ("folder", "peft"):
        check_destination(output)
    else:
        check_output("--output", output)
        check_target("--output", output, to, known_format(output) if output.exists() else None)


def export(
    content: Content,
    to: FormatName,
    output: Path,
    *,
    dtype: StoredDtype = "float32",
    kv_type: str | None = None,
    queries_at: FirstQuery = "k",
    model: PreTrainedModel | None = None,
    base_model: str | None = None,
) -> None:
    """Write a prompt in a format.

    Args:
        content: the prompt, as `files.read` gave it.
        to: the format.
        output: the file or folder.
        dtype: of the stored numbers.
        kv_type: PREFIX_TUNING, CARTRIDGE or PROMPT_TUNING, for folders and PEFT. None: CARTRIDGE for keys and values,
            PROMPT_TUNING for vectors. With a model, vectors are turned into keys and values for the first two.
        queries_at: for cartridges, where the sequence after it starts. "0" moves the keys.
        model: the prompt's model, prepared; needed where keys are moved or made.
        base_model: replaces the name of the base model; None: as it is.

    Raises:
        SoftPromptError: as in `check_export`; the format cannot hold this prompt; or a model is needed.
    """
    check_export(output, to, dtype, kv_type, queries_at, model is not None)
    content = ready(content, to, kv_type, queries_at, model)
    if base_model is not None:
        content = replace(content, base_model=base_model)
    if to in ("folder", "peft"):
        config = clean_config(content, kv_type)
        record = content.record or None
        if record is None and to == "folder":
            raise SoftPromptError(
                "--to: got folder for a file that does not say which model it belongs to; accepted with --model, or "
                "`softprompt import`"
            )
        write(output, content.prompt, config, record, dtype=dtype, readme=card_text(content, dtype, output.name))
        return
    if to == "safetensors":
        data = plain.to_bytes(content, dtype)
    elif to == "cartridges":
        data = cartridges.to_bytes(content, dtype)
    else:
        data = saved_bytes(vllm.vectors_of(content.prompt, dtype))
    write_file(output, data)


def write_file(output: Path, data: bytes) -> None:
    """Write one file: complete, or not at all."""
    with written_when_complete("--output", output) as temporary:
        assert temporary is not None
        temporary.write_bytes(data)


def ready(
    content: Content, to: FormatName, kv_type: str | None, first_query: FirstQuery, model: PreTrainedModel | None
) -> Content:
    """The prompt as a format wants it: of the right kind, with its keys where the queries of the format expect them.

    Raises:
        SoftPromptError: a model is needed for that.
    """
    wants_kv = kv_type in KV_TYPES if to in ("folder", "peft") else to == "cartridges"
    if wants_kv and model is not None and isinstance(content.prompt, EmbeddingPrompt):
        content = replace(content, prompt=as_kv(content.prompt, model))
    if model is None:
        if content.first_query != first_query:
            raise SoftPromptError(
                "PROMPT: got a cache whose keys are for queries at 0; accepted with --model, which has the rotary "
                "embedding that moves them"
            )
    elif to == "cartridges" or content.first_query != first_query:
        content = cartridges.moved(content, model, first_query)
    return with_record(content, model)


def with_record(content: Content, model: PreTrainedModel | None) -> Content:
    """The content with a record that fits its prompt. One is made if there is none and the model is given."""
    record: dict[str, Any] = dict(content.record)
    if not record and model is None:
        return content
    if model is not None and not mapping(record, "model"):
        record |= {"model": model_fingerprint(model)}
        record = {"context": {}, "objective": {}, "figures": {}, "tokenizer": None} | record
        content = replace(content, base_model=content.base_model or base_name(model))
    record |= {
        "format": FORMAT,
        "positions": POSITIONS["k"],
        "prompt_tokens": content.prompt.length,
        "frozen_tokens": content.prompt.frozen_tokens,
    }
    return replace(content, record=record)


@torch.no_grad()
def as_kv(prompt: EmbeddingPrompt, model: PreTrainedModel) -> KVPrompt:
    """The keys and values that a model computes from the vectors of a prompt: the same logits behind them.

    Args:
        prompt: `[k, d]`.
        model: prepared.
    """
    prefix = prefix_of(model, prompt.to(input_device(model)))
    return KVPrompt.from_prefix(prefix.to(device="cpu", dtype=torch.float32), frozen_tokens=prompt.frozen_tokens)
