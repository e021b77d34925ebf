"""A saved compressor: a folder that is written completely or not at all.

| file | content |
|---|---|
| compressor.json | the form, fingerprints of model and tokenizer, how it was trained, figures |
| summary.safetensors | `summary [k, d]` |
| adapter_config.json, adapter_model.safetensors | LoRA, as PEFT saves it; only with a rank above 0 |

So with LoRA the folder is a PEFT adapter too. A compressor is refused for another model or tokenizer than its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress.compressor.compressor import Compressor, embedding_table
from softprompt_kernels.compress.compressor.form import Form, State
from softprompt_kernels.compress.compressor.lora import CONFIG, WEIGHTS, Lora
from softprompt_kernels.compress.compressor.segments import even_lengths
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models.families import max_positions
from softprompt_kernels.prompts.atomic_folder import check_replaceable, recover, replace_folder
from softprompt_kernels.prompts.fingerprint import differences, model_fingerprint, tokenizer_fingerprint
from softprompt_kernels.prompts.json_file import dump, integer, read_object, to_json
from softprompt_kernels.prompts.weights import check_finite, read_safetensors

RECORD, SUMMARY = "compressor.json", "summary.safetensors"
FORMAT = 1
NAMES = (RECORD, SUMMARY, CONFIG, WEIGHTS)
"""Files of a saved compressor. No folder with others is replaced."""


def save_compressor(
    path: Path,
    compressor: Compressor,
    fingerprints: Mapping[str, Any],
    base_model: str,
    trained: Mapping[str, Any],
    figures: Mapping[str, Any],
) -> None:
    """Write a compressor. One that was saved there before is replaced.

    Args:
        path: a new or empty folder, or one of a saved compressor.
        compressor: what to save.
        fingerprints: from `fingerprints`, made before the model had LoRA layers.
        base_model: name of the model, for PEFT.
        trained: how it was trained.
        figures: of its evaluation.

    Raises:
        SoftPromptError: the folder holds something else or cannot be written, or a number is not finite.
    """
    summary = compressor.summary.detach().cpu().contiguous()
    check_finite(str(path), summary)
    form = compressor.form
    record = {
        "format": FORMAT,
        "tokens": form.tokens,
        "state": form.state,
        "segment_tokens": form.segment_tokens,
        "lora_rank": form.lora_rank,
        **fingerprints,
        "trained": to_json("trained", trained),
        "figures": to_json("figures", figures),
    }
    files = {RECORD: dump(record), SUMMARY: save({"summary": summary})}
    if compressor.lora is not None:
        files |= compressor.lora.files(base_model)
    replace_folder(path, files, marker=RECORD, others=NAMES)


def fingerprints(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The fingerprints of a model without LoRA layers and of its tokenizer, as they are saved."""
    return {"model": model_fingerprint(model), "tokenizer": tokenizer_fingerprint(tokenizer)}


def check_destination(path: Path) -> None:
    """Raise a SoftPromptError for a path that `save_compressor` would refuse."""
    check_replaceable(path, NAMES, marker=RECORD)


def read_form(path: Path) -> tuple[Form, dict[str, Any]]:
    """The form of a saved compressor and the content of its compressor.json. Reads no tensors.

    Raises:
        SoftPromptError: it is no saved compressor, or of a later version.
    """
    recover(path)
    file = path / RECORD
    if not file.is_file():
        raise SoftPromptError(
            f"compressor: {path} has no {RECORD}, accepted is a folder that `softprompt train-compressor` wrote"
        )
    record = read_object(file)
    if record.get("format") != FORMAT:
        raise SoftPromptError(
            f"compressor: {file} has format {record.get('format')!r}, accepted is {FORMAT}; a later version of "
            "softprompt-kernels may read it"
        )
    state: Any = record.get("state")
    if state not in get_args(State):
        raise SoftPromptError(f"{file}: state is {state!r}, accepted are {' and '.join(get_args(State))}")
    tokens, longest = integer(file, record, "tokens", 1), integer(file, record, "segment_tokens", 1)
    return Form(tokens, state, longest, integer(file, record, "lora_rank", 0)), record


def load_compressor(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Compressor:
    """A saved compressor for its model.

    With LoRA the model gets layers that are off outside of `reading`. `compressor.lora.detach()` takes them out.

    Args:
        path: the folder.
        model, tokenizer: compared with the recorded fingerprints.

    Raises:
        SoftPromptError: it is no saved compressor, a file is damaged, or it belongs to another model or tokenizer.
    """
    form, record = read_form(path)
    check_belongs(path, record, model, tokenizer)
    summary = _tensors(path / SUMMARY)
    if set(summary) != {"summary"} or summary["summary"].dim() != 2 or summary["summary"].shape[0] != form.tokens:
        raise SoftPromptError(f"{path / SUMMARY} does not hold `summary` of {form.tokens} tokens, as {RECORD} says")
    width = embedding_table(model).shape[1]
    if summary["summary"].shape[1] != width:
        raise SoftPromptError(f"{path / SUMMARY} has rows of {summary['summary'].shape[1]}, the model's have {width}")
    tensors = _tensors(path / WEIGHTS) if form.lora_rank else {}
    lora = Lora(model, form.lora_rank) if form.lora_rank else None
    if lora is not None:
        try:
            lora.load(tensors, str(path / WEIGHTS))
        except SoftPromptError:
            lora.detach()
            raise
    return Compressor(model, form, summary["summary"], lora)


def check_compressor(
    path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context_tokens: int, tokens: int
) -> None:
    """Check that a saved compressor can read a context into a prompt of so many tokens. The model stays as it is.

    Args:
        path, model, tokenizer: as in `load_compressor`.
        context_tokens: C.
        tokens: k.

    Raises:
        SoftPromptError: as `load_compressor`, or the lengths do not fit.
    """
    compressor = load_compressor(path, model, tokenizer)
    if compressor.lora is not None:
        compressor.lora.detach()
    form = compressor.form
    if tokens != form.prompt_tokens(context_tokens):
        raise SoftPromptError(
            f"tokens: got {tokens}, accepted with the compressor {path} and a context of {context_tokens} tokens is "
            f"{form.prompt_tokens(context_tokens)}"
        )
    lengths = even_lengths(context_tokens, form.segment_tokens)
    form.check_window(max_positions(model.config), len(lengths), max(lengths))


def check_belongs(
    path: Path, record: Mapping[str, Any], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise a SoftPromptError unless a compressor was trained for this model and tokenizer.

    Args:
        path: its folder.
        record: of `read_form`.
        model, tokenizer: those at hand.
    """
    for what, make in (
        ("model", lambda saved: model_fingerprint(model, saved)),
        ("tokenizer", lambda saved: tokenizer_fingerprint(tokenizer, saved)),
    ):
        saved = record.get(what)
        if not isinstance(saved, dict):
            raise SoftPromptError(f"{path / RECORD} has no fingerprint of the {what}")
        if found := differences(saved, make(saved)):
            raise SoftPromptError(
                f"compressor: {path} was trained for another {what}; recorded against this one: {'; '.join(found)}"
            )


def digest(path: Path) -> str:
    """The SHA-256 of what decides the prompts of a saved compressor, hexadecimal.

    Raises:
        SoftPromptError: it is no saved compressor.
    """
    form, _ = read_form(path)
    hasher = hashlib.sha256(repr(form).encode())
    for name in (SUMMARY, *([WEIGHTS] if form.lora_rank else [])):
        hasher.update((path / name).read_bytes())
    return hasher.hexdigest()


def _tensors(file: Path) -> dict[str, Tensor]:
    tensors = read_safetensors(file)
    for tensor in tensors.values():
        check_finite(str(file), tensor)
    return tensors
