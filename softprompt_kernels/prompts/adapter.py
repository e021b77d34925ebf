"""Save and load a prompt as a PEFT adapter folder, with one additional file.

| file | content | read by |
|---|---|---|
| adapter_config.json | type, sizes, name of the base model | PEFT, this package |
| adapter_model.safetensors | `prompt_embeddings [k, d]` or `[k, L·2·Hkv·D]` (see `layout`) | PEFT, this package |
| prompt_int8.safetensors | in its place, a prompt in 8 bits (see `weights`) | this package |
| softprompt.json | positions, context, model and tokenizer fingerprints, objective, figures | this package |
| README.md | a model card, if there is one | people, the hub |

`PeftModel.from_pretrained(model, folder)` gives the same logits as this package: in both, the sequence continues at
position k. The folder is written completely or not at all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import atomic_folder
from softprompt_kernels.prompts.embedding import EmbeddingPrompt
from softprompt_kernels.prompts.fingerprint import differences, model_fingerprint, tokenizer_fingerprint
from softprompt_kernels.prompts.json_file import dump, integer, read_object, to_json
from softprompt_kernels.prompts.kv import KVPrompt
from softprompt_kernels.prompts.offload import input_device
from softprompt_kernels.prompts.weights import (
    CONFIG,
    INT8,
    WEIGHTS,
    StoredDtype,
    check_finite,
    check_stored_dtype,
    parts_of,
    read_weights,
    weights_file,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "softprompt.json"
README = "README.md"
FORMAT = 1
POSITIONS = "prompt at 0..k-1, the sequence continues at k"

KVPeftType = Literal["CARTRIDGE", "PREFIX_TUNING"]
NAMES = (CONFIG, WEIGHTS, INT8, RECORD, README)
"""Files of a saved prompt. No folder with others is replaced."""

PEFT_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE")


def save(
    path: str | Path,
    prompt: EmbeddingPrompt | KVPrompt,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kv_type: KVPeftType = "CARTRIDGE",
    dtype: StoredDtype = "float32",
    context: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Write a prompt as an adapter folder. A prompt that was saved there before is replaced.

    Args:
        path: a new or empty folder, or one that `save` wrote.
        prompt: the number of its frozen tokens is recorded.
        model: the model that the prompt belongs to.
        tokenizer: its fingerprint is recorded if given.
        kv_type: the PEFT type of a KV prompt. With CARTRIDGE the frozen tokens stay frozen if PEFT trains the prompt
            further. PREFIX_TUNING is known to older versions of PEFT. The stored numbers are the same.
        dtype: of the stored numbers: "float32", "bfloat16", "float16", or "int8", which PEFT cannot read (see
            `weights`).
        context: the context that the prompt was made from: `{"sha256": ..., "tokens": ...}`.
        objective: the training objective.
        figures: results of the training. In context, objective and figures, NaN and infinities become null.

    Raises:
        SoftPromptError: the folder holds something else or cannot be written (its content is unchanged), or the prompt
            does not fit the model, or has numbers that are not finite or too large for the dtype.
        ValueError: `kv_type` or `dtype` is not one of those.
        TypeError: context, objective or figures cannot be written as JSON.
    """
    check_stored_dtype(dtype)
    fingerprint = model_fingerprint(model)
    config = adapter_config(prompt, fingerprint, kv_type)
    check_fits(str(path), prompt, fingerprint)
    config["base_model_name_or_path"] = base_name(model)
    record = {
        "format": FORMAT,
        "positions": POSITIONS,
        "prompt_tokens": prompt.length,
        "frozen_tokens": prompt.frozen_tokens,
        "context": to_json("context", context or {}),
        "model": fingerprint,
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        "objective": to_json("objective", objective or {}),
        "figures": to_json("figures", figures or {}),
    }
    write(path, prompt, config, record, dtype=dtype)


def write(
    path: str | Path,
    prompt: EmbeddingPrompt | KVPrompt,
    config: Mapping[str, Any],
    record: Mapping[str, Any] | None,
    *,
    dtype: StoredDtype = "float32",
    readme: str | None = None,
) -> None:
    """Write a prompt as a folder, with a configuration and a record that are given. No model is needed.

    Args:
        path: as in `save`.
        prompt: of the sizes that the configuration has.
        config: the content of adapter_config.json.
        record: the content of softprompt.json; None: no such file, as in a folder of PEFT's own.
        dtype: as in `save`.
        readme: the text of README.md; None: no such file.

    Raises:
        SoftPromptError, ValueError: as in `save`.
    """
    check_stored_dtype(dtype)
    for numbers in parts_of(prompt).values():
        check_finite(str(path), numbers)
    name, content = weights_file(prompt, dtype)
    files = {CONFIG: dump(dict(config)), name: content}
    if record is not None:
        files[RECORD] = dump(dict(record))
    if readme is not None:
        files[README] = readme.encode()
    atomic_folder.replace_folder(path, files, marker=RECORD, others=NAMES)


def load(
    path: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    force: bool = False,
) -> tuple[EmbeddingPrompt | KVPrompt, dict[str, Any] | None]:
    """Read a prompt that `save` or PEFT wrote, onto the model's device.

    Args:
        path: an adapter folder of type PROMPT_TUNING, PREFIX_TUNING or CARTRIDGE.
        model: compared with the recorded fingerprint.
        tokenizer: compared with the recorded fingerprint, if there is one.
        force: warn where a fingerprint differs, instead of raising. Shapes must fit all the same.

    Returns:
        The prompt in fp32, and the content of softprompt.json. A folder that PEFT wrote has no such file. Then the
        second value is None, and a warning says that only shapes were checked, not the weights of the model.

    Raises:
        SoftPromptError: there is no adapter, a file is broken, or the prompt belongs to another model or tokenizer
            (the message names the differences).
    """
    found = read(path)
    record = found.record
    fingerprint = model_fingerprint(model, (record or {}).get("model"))
    if record is None:
        warnings.warn(
            f"{path} has no {RECORD}: its shapes are checked, but not which weights it was trained against; "
            "make sure that it belongs to this model",
            stacklevel=2,
        )
    else:
        check_same(path, "model", record.get("model"), fingerprint, force)
        if tokenizer is not None and (saved := record.get("tokenizer")) is not None:
            check_same(path, "tokenizer", saved, tokenizer_fingerprint(tokenizer, saved), force)
    check_fits(str(path), found.prompt, fingerprint)
    return found.prompt.to(input_device(model)), record


@dataclass(frozen=True, eq=False)
class SavedPrompt:
    """The content of a folder.

    Args:
        prompt: in fp32 on the CPU.
        config: adapter_config.json.
        record: softprompt.json; None in a folder that PEFT wrote.
        dtype: that of the stored numbers.
    """

    prompt: EmbeddingPrompt | KVPrompt
    config: dict[str, Any]
    record: dict[str, Any] | None
    dtype: StoredDtype


def read(path: str | Path) -> SavedPrompt:
    """Read a prompt that `save` or PEFT wrote, without a model. Nothing is compared with one.

    Args:
        path: as in `load`.

    Raises:
        SoftPromptError: there is no adapter, or a file is broken.
    """
    config, record = describe(path)
    tokens = integer(Path(path) / CONFIG, config, "num_virtual_tokens", 1)
    prompt, dtype = read_weights(path, config, frozen_tokens(path, config, record, tokens))
    return SavedPrompt(prompt, config, record, dtype)


def describe(path: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The content of adapter_config.json and of softprompt.json (None if there is no such file). Reads no tensors.

    Args:
        path: an adapter folder that `save` or PEFT wrote.

    Raises:
        SoftPromptError: not an adapter folder, not a prompt, a broken file, or a file of a later version.
    """
    atomic_folder.recover(path)
    if not (Path(path) / CONFIG).is_file():
        hint = "; `softprompt import` makes one of a file" if Path(path).is_file() else ""
        raise SoftPromptError(f"{path} is not a saved prompt: it has no {CONFIG}{hint}")
    config = read_object(Path(path) / CONFIG)
    kind = config.get("peft_type")
    if kind not in PEFT_TYPES:
        raise SoftPromptError(f"{path}: peft_type is {kind!r}, accepted are {', '.join(PEFT_TYPES)}")
    if config.get("task_type") not in (None, "CAUSAL_LM") or config.get("num_transformer_submodules") not in (None, 1):
        raise SoftPromptError(f"{path}: task_type is {config.get('task_type')!r}, accepted are prompts for CAUSAL_LM")
    if not (Path(path) / RECORD).is_file():
        return config, None
    record = read_object(Path(path) / RECORD)
    if record.get("format") != FORMAT:
        raise SoftPromptError(
            f"{path}: {RECORD} has format {record.get('format')!r}, accepted is {FORMAT}; "
            "a later version of softprompt-kernels may read it"
        )
    if record.get("positions") != POSITIONS:
        raise SoftPromptError(f"{path}: positions are {record.get('positions')!r}, accepted is {POSITIONS!r}")
    return config, record


def check_destination(path: str | Path) -> None:
    """Raise for a `path` that `save` would refuse. For use before any work is done.

    Raises:
        SoftPromptError: the path holds something other than a saved prompt or an empty folder.
    """
    atomic_folder.check_replaceable(path, NAMES, marker=RECORD)


# adapter_config.json


def adapter_config(
    prompt: EmbeddingPrompt | KVPrompt, fingerprint: dict[str, Any], kv_type: str = "CARTRIDGE"
) -> dict[str, Any]:
    """adapter_config.json of a prompt, without the name of the base model; `kv_type` as in `save`.

    Args:
        prompt: its sizes are taken.
        fingerprint: of its model, as in `softprompt.json`.
        kv_type: the type of a KV prompt.

    Raises:
        ValueError: `kv_type` is not a type of KV prompts.
    """
    if isinstance(prompt, EmbeddingPrompt):
        return embedding_config(prompt, fingerprint)
    return kv_config(prompt, fingerprint, kv_type)


def embedding_config(prompt: EmbeddingPrompt, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """adapter_config.json of an embedding prompt."""
    return common_config("PROMPT_TUNING", prompt.length, fingerprint) | {
        "token_dim": prompt.hidden_size,
        "num_attention_heads": fingerprint["attention_heads"],
        "prompt_tuning_init": "RANDOM",
    }


def kv_config(prompt: KVPrompt, fingerprint: dict[str, Any], kv_type: str) -> dict[str, Any]:
    """adapter_config.json of a KV prompt."""
    if kv_type not in ("CARTRIDGE", "PREFIX_TUNING"):
        raise ValueError(f'kv_type: got {kv_type!r}, accepted are "CARTRIDGE" and "PREFIX_TUNING"')
    _, heads, _, dim = prompt.key.shape
    extra = {"num_frozen_tokens": prompt.frozen_tokens} if kv_type == "CARTRIDGE" else {"prefix_projection": False}
    return common_config(kv_type, prompt.length, fingerprint) | {
        "token_dim": heads * dim,
        "num_attention_heads": heads,
        **extra,
    }


def base_name(model: PreTrainedModel) -> str | None:
    """Where the model was loaded from: an absolute path if it is a folder, so that PEFT finds it from any folder."""
    name = getattr(model.config, "_name_or_path", None) or None
    return os.path.abspath(name) if name is not None and os.path.isdir(name) else name


def common_config(kind: str, tokens: int, fingerprint: dict[str, Any]) -> dict[str, Any]:
    """The fields of adapter_config.json that all types share."""
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "num_virtual_tokens": tokens,
        "num_layers": fingerprint["layers"],
        "num_transformer_submodules": 1,
    }


# Reading


def frozen_tokens(path: str | Path, config: dict[str, Any], record: dict[str, Any] | None, tokens: int) -> int:
    """How many of the first tokens are frozen. softprompt.json records it, or PEFT's configuration of a CARTRIDGE."""
    if record is not None:
        frozen = integer(Path(path) / RECORD, record, "frozen_tokens", 0)
    elif config["peft_type"] == "CARTRIDGE":
        frozen = integer(Path(path) / CONFIG, config, "num_frozen_tokens", 0)
    else:
        frozen = 0
    if frozen > tokens:
        raise SoftPromptError(f"{path}: {frozen} frozen tokens of {tokens}, accepted is 0 to {tokens}")
    return frozen


# Checks


def check_same(path: str | Path, what: str, saved: Any, now: dict[str, Any], force: bool) -> None:
    """Raise if the fingerprint of the model or tokenizer differs from the saved one. The message says how.

    With `force` it is a warning.
    """
    if not isinstance(saved, dict):
        raise SoftPromptError(f"{path}: {RECORD} has no fingerprint of the {what}")
    found = differences(saved, now)
    if not found:
        return
    message = f"{path} was made for another {what}; recorded against this one: {'; '.join(found)}"
    if not force:
        raise SoftPromptError(f"{message}; force (--force) loads it all the same")
    warnings.warn(message, stacklevel=3)


def check_fits(path: str, prompt: EmbeddingPrompt | KVPrompt, fingerprint: dict[str, Any]) -> None:
    """Raise if the prompt's shape does not fit the model."""
    if isinstance(prompt, EmbeddingPrompt):
        if prompt.hidden_size != fingerprint["hidden_size"]:
            raise SoftPromptError(
                f"{path}: the prompt's vectors have {prompt.hidden_size} numbers, "
                f"this model's embeddings {fingerprint['hidden_size']}"
            )
        return
    layers, heads, _, dim = prompt.key.shape
    accepted = tuple(fingerprint[name] for name in ("layers", "kv_heads", "head_dim"))
    if (layers, heads, dim) != accepted:
        raise SoftPromptError(
            f"{path}: the prompt has {layers} layers of {heads} heads of {dim} numbers, "
            f"this model {accepted[0]} of {accepted[1]} of {accepted[2]}"
        )
