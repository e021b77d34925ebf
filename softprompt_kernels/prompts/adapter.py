"""Save and load a prompt as a PEFT adapter folder, with one additional file.

| file | content | read by |
|---|---|---|
| adapter_config.json | type, sizes, name of the base model | PEFT, this package |
| adapter_model.safetensors | `prompt_embeddings [k, d]` or `[k, L·2·Hkv·D]` (see `layout`), fp32 | PEFT, this package |
| softprompt.json | positions, context, model and tokenizer fingerprints, objective, figures | this package |

`PeftModel.from_pretrained(model, folder)` gives the same logits as this package: in both, the sequence continues at
position k. The folder is written completely or not at all.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import atomic_folder
from softprompt_kernels.prompts.embedding import EmbeddingPrompt
from softprompt_kernels.prompts.fingerprint import differences, model_fingerprint, tokenizer_fingerprint
from softprompt_kernels.prompts.json_file import dump, integer, read_object, to_json
from softprompt_kernels.prompts.kv import KVPrompt
from softprompt_kernels.prompts.layout import flatten, unflatten
from softprompt_kernels.prompts.offload import input_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
RECORD = "softprompt.json"
TENSOR = "prompt_embeddings"
FORMAT = 1
POSITIONS = "prompt at 0..k-1, the sequence continues at k"

KVPeftType = Literal["CARTRIDGE", "PREFIX_TUNING"]
PEFT_TYPES = ("PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE")


def save(
    path: str | Path,
    prompt: EmbeddingPrompt | KVPrompt,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kv_type: KVPeftType = "CARTRIDGE",
    context: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """Write a prompt as an adapter folder. A prompt that was saved there before is replaced.

    Args:
        path: a new or empty folder, or one that `save` wrote.
        prompt: saved in fp32; the number of its frozen tokens is recorded.
        model: the model that the prompt belongs to.
        tokenizer: its fingerprint is recorded if given.
        kv_type: the PEFT type of a KV prompt. With CARTRIDGE the frozen tokens stay frozen if PEFT trains the prompt
            further. PREFIX_TUNING is known to older versions of PEFT. The stored numbers are the same.
        context: the context that the prompt was made from: `{"sha256": ..., "tokens": ...}`.
        objective: the training objective.
        figures: results of the training. In context, objective and figures, NaN and infinities become null.

    Raises:
        SoftPromptError: the folder holds something else or cannot be written (its content is unchanged), or the prompt
            does not fit the model or has numbers that are not finite.
        TypeError: context, objective or figures cannot be written as JSON.
    """
    fingerprint = model_fingerprint(model)
    if isinstance(prompt, EmbeddingPrompt):
        tensor = prompt.vectors(torch.float32).detach()
        config = embedding_config(prompt, fingerprint)
    else:
        tensor = flatten(*prompt.stacked(torch.float32)).detach()
        config = kv_config(prompt, fingerprint, kv_type)
    check_fits(str(path), prompt, fingerprint)
    check_finite(str(path), tensor)
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
    files = {
        CONFIG: dump(config),
        WEIGHTS: safetensors_torch.save({TENSOR: tensor.cpu().contiguous()}, metadata={"format": "pt"}),
        RECORD: dump(record),
    }
    atomic_folder.replace_folder(path, files, marker=RECORD)


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
    config, record = describe(path)
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
    tensor = read_tensor(path)
    tokens = integer(Path(path) / CONFIG, config, "num_virtual_tokens", 1)
    if tensor.shape[0] != tokens:
        raise SoftPromptError(f"{path}: {CONFIG} says {tokens} tokens, but {WEIGHTS} has {tensor.shape[0]}")
    frozen = frozen_tokens(path, config, record, tokens)
    prompt: EmbeddingPrompt | KVPrompt
    if config["peft_type"] == "PROMPT_TUNING":
        prompt = EmbeddingPrompt(tensor, frozen_tokens=frozen)
    else:
        layers = integer(Path(path) / CONFIG, config, "num_layers", 1)
        heads = integer(Path(path) / CONFIG, config, "num_attention_heads", 1)
        width = 2 * layers * integer(Path(path) / CONFIG, config, "token_dim", 1)
        if tensor.shape[1] != width or width % (2 * layers * heads):
            raise SoftPromptError(
                f"{path}: {WEIGHTS} has rows of {tensor.shape[1]} numbers, "
                f"but {CONFIG} says {width} ({layers} layers, {heads} heads)"
            )
        prompt = KVPrompt(*unflatten(tensor, layers, heads), frozen_tokens=frozen)
    check_fits(str(path), prompt, fingerprint)
    return prompt.to(input_device(model)), record


def describe(path: str | Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The content of adapter_config.json and of softprompt.json (None if there is no such file). Reads no tensors.

    Args:
        path: an adapter folder that `save` or PEFT wrote.

    Raises:
        SoftPromptError: not an adapter folder, not a prompt, a broken file, or a file of a later version.
    """
    atomic_folder.recover(path)
    if not (Path(path) / CONFIG).is_file():
        raise SoftPromptError(f"{path} is not a saved prompt: it has no {CONFIG}")
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
    atomic_folder.check_replaceable(path, (CONFIG, WEIGHTS, RECORD), marker=RECORD)


# adapter_config.json


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


def read_tensor(path: str | Path) -> Tensor:
    """`prompt_embeddings` in fp32 on the CPU. Raises a SoftPromptError unless it is a matrix of finite numbers."""
    file = Path(path) / WEIGHTS
    if not file.is_file():
        raise SoftPromptError(f"{path} has no {WEIGHTS}; prompts are read from safetensors only")
    try:
        tensors = safetensors_torch.load_file(file)
    except (SafetensorError, OSError, KeyError) as error:
        raise SoftPromptError(f"{file} is truncated or not a safetensors file ({error})") from error
    if TENSOR not in tensors:
        found = ", ".join(sorted(tensors)[:3]) or "nothing"
        raise SoftPromptError(f"{file} has no tensor {TENSOR}; it has {found}")
    tensor = tensors[TENSOR]
    if tensor.dim() != 2 or 0 in tensor.shape or not tensor.is_floating_point():
        raise SoftPromptError(
            f"{file}: {TENSOR} is {str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}, "
            "accepted is a floating-point matrix with one row per token"
        )
    tensor = tensor.float()
    check_finite(str(file), tensor)
    return tensor


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


def check_finite(path: str, tensor: Tensor) -> None:
    """Raise if the prompt has NaN or infinities. They would turn every logit into NaN."""
    if not bool(tensor.isfinite().all()):
        raise SoftPromptError(f"{path}: the prompt has numbers that are not finite")
