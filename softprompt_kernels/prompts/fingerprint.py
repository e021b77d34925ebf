"""Fingerprints of the model and tokenizer that a prompt belongs to. They are compared when a prompt is loaded.

A prompt works only with the weights that it was trained with. Another checkpoint of the same shape would load without
an error and give nonsense. The fingerprint therefore has the shape, the rotary settings, and hashes of a sample of the
weights: 64 evenly spaced elements of every parameter, including embedding and head, tied or not.

Cost: milliseconds, for any size of model and any device. Weights that are offloaded are loaded one module at a time.

The comparison does not depend on the dtype. The sample is hashed twice, rounded to float16 and rounded to bfloat16, and
one equal hash is enough. A checkpoint that was cast to one of these types has the same hash of that type as the
original, because rounding twice to one type equals rounding once. (If an fp32 checkpoint is cast to bfloat16 in one
place and to float16 in another, the two share no hash: their weights differ by more than either rounding.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts.offload import loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 64
"""Number of elements of each parameter in the hash of the weights."""

PROBE = "Naïve façade №5: 1234.5 km\n\tdef f(x): return x**2  # 你好, Привет!"
"""A text that tokenizers with one vocabulary but different rules (case, digits, spaces) split differently."""


def model_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The shape of a transformers model, its rotary settings, and two hashes of a sample of its weights.

    Fields: `family`, `layers`, `hidden_size`, `attention_heads`, `kv_heads`, `head_dim`, `vocabulary`, `rope` (None
    without rotary embedding), `weights {"float16", "bfloat16"}` (SHA-256, hexadecimal). All values can be written as
    JSON.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None)
    return {
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "attention_heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocabulary": config.vocab_size,
        "rope": json.loads(json.dumps(rope)) if rope else None,
        "weights": weights_hashes(model),
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The size of the vocabulary, and hashes of its tokens, its special tokens, and the tokens of a probe text.

    Fields: `vocabulary` (a number), `tokens`, `special_tokens`, `splitting` (SHA-256, hexadecimal). The chat template
    is not included: it may change while all tokens keep their meaning.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "vocabulary": len(tokenizer),
        "tokens": json_hash(sorted(tokenizer.get_vocab().items())),
        "special_tokens": json_hash(special),
        "splitting": json_hash(tokenizer(PROBE, add_special_tokens=False)["input_ids"]),
    }


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences of two fingerprints, one phrase per field, saved value first. Empty if they agree.

    The hash of the weights is compared only if all other fields agree: models of different shapes differ in it anyway.
    """
    phrases = [
        phrase for field, here in now.items() if field != "weights" for phrase in field_difference(field, saved, here)
    ]
    if "weights" in now and not phrases:
        there = saved.get("weights")
        if not isinstance(there, dict) or not any(there.get(kind) == digest for kind, digest in now["weights"].items()):
            phrases.append("weights (the same shape with other values)")
    return phrases


def field_difference(field: str, saved: dict[str, Any], here: Any) -> Iterator[str]:
    """One phrase for each difference in one field."""
    name = field.replace("_", " ")
    there = saved.get(field)
    if isinstance(here, dict) and isinstance(there, dict):
        # Compare only settings that both have: a later version of transformers may write an old default explicitly.
        for key in sorted(here.keys() & there.keys()):
            yield from (f"{name} {phrase}" for phrase in field_difference(key, there, here[key]))
    elif there != here:
        is_hash = isinstance(here, str) and len(here) == 64  # the digits of a hash are of no use in a message
        yield name if is_hash else f"{name} {there} against {here}"


@torch.no_grad()
def weights_hashes(model: PreTrainedModel) -> dict[str, str]:
    """SHA-256 of a sample of all parameters, once rounded to float16 and once to bfloat16."""
    # Embedding and head come first, and both are sampled also if they are tied. `parameters()` lists a tied matrix
    # once and an untied copy twice; this way both give one hash.
    ends: list[Any] = [
        layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    ]
    inner = [parameter for parameter in model.parameters() if not any(parameter is end for end in ends)]
    owners = {
        id(parameter): (f"{path}.{name}".lstrip("."), module, name)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }
    values = torch.cat([_sample(parameter, *owners.get(id(parameter), ())) for parameter in [*ends, *inner]])
    # The values are fp32 for every dtype of parameter, so float64 and quantised integers are rounded in the same way.
    return {
        str(kind).removeprefix("torch."): hashlib.sha256(
            values.to(kind).view(torch.int16).numpy().astype("<i2").tobytes()
        ).hexdigest()
        for kind in (torch.float16, torch.bfloat16)
    }


def _sample(parameter: Tensor, path: str = "", module: nn.Module | None = None, name: str = "") -> Tensor:
    """`sample_elements` of a parameter that may be offloaded: `name` of a module at `path` of the model."""
    if not parameter.is_meta:
        return sample_elements(parameter)
    if module is not None:
        with loaded(module):
            here: Tensor = getattr(module, name)
            if not here.is_meta:
                return sample_elements(here)
    raise SoftPromptError(
        f"model: its parameter {path} is on the meta device, without numbers; accepted are parameters with numbers, "
        "or offloaded by accelerate"
    )


def sample_elements(parameter: Tensor) -> Tensor:
    """`SAMPLES` evenly spaced elements of a parameter, in fp32 on the CPU (repeated if it has fewer)."""
    flat = parameter.detach().reshape(-1)
    if flat.numel() == 0:
        return torch.zeros(0, device="cpu")
    index = torch.arange(SAMPLES, device=flat.device) * flat.numel() // SAMPLES
    # Adding 0 turns −0 into 0. The two are equal, but have different bits and would have different hashes.
    return flat[index].float().cpu() + 0.0


def json_hash(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
