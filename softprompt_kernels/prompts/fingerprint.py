"""Which model and tokenizer a prompt belongs to, cheap enough to check at every load.

A prompt works with the very weights that it was trained against; another checkpoint of the same shape loads without
an error and answers nonsense. So the shape, the rotary settings and a sample of the weights are recorded: 64 evenly
spread elements of every parameter, the embedding and the head included whether tied or not. Reading them takes
milliseconds on any size of model and any device.

Independent of dtype: the sample is hashed twice, rounded to float16 and rounded to bfloat16, and one equal hash is
enough. A checkpoint cast to either type agrees with itself uncast on the hash of that type, because rounding twice to
one type is rounding once. (An fp32 checkpoint cast to bfloat16 here and to float16 there agrees on none: those weights
do differ by more than either rounding.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 64
"""Elements of a parameter that go into the hash of the weights."""

PROBE = "Naïve façade №5: 1234.5 km\n\tdef f(x): return x**2  # 你好, Привет!"
"""A text that tokenizers of one vocabulary but other rules (case, digits, spaces) split differently."""


def model_fingerprint(model: PreTrainedModel) -> dict[str, Any]:
    """The shape of a transformers model, its rotary settings, and two hashes of a sample of its weights.

    Fields: `family`, `layers`, `hidden_size`, `attention_heads`, `kv_heads`, `head_dim`, `vocabulary`, `rope` (None
    without), `weights {"float16", "bfloat16"}` (SHA-256, hexadecimal). All of it is JSON.
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
    """The size of a vocabulary and hashes of its tokens, its special tokens, and how it splits a probe text.

    Fields: `vocabulary`, `tokens`, `special_tokens`, `splitting` (SHA-256, hexadecimal, but the first). The chat
    template is no part of it: it may change without any token changing its meaning.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "vocabulary": len(tokenizer),
        "tokens": json_hash(sorted(tokenizer.get_vocab().items())),
        "special_tokens": json_hash(special),
        "splitting": json_hash(tokenizer(PROBE, add_special_tokens=False)["input_ids"]),
    }


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints, one phrase a field, the saved value first; empty if they agree.

    The hash of the weights says something only between models of one shape, so it is left out where others differ.
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
    """The phrase of one field, or none where it agrees."""
    name = field.replace("_", " ")
    there = saved.get(field)
    if isinstance(here, dict) and isinstance(there, dict):
        # Only settings that both know: a later version of transformers may write down a default it used before.
        for key in sorted(here.keys() & there.keys()):
            yield from (f"{name} {phrase}" for phrase in field_difference(key, there, here[key]))
    elif there != here:
        is_hash = isinstance(here, str) and len(here) == 64  # its digits tell nobody anything
        yield name if is_hash else f"{name} {there} against {here}"


@torch.no_grad()
def weights_hashes(model: PreTrainedModel) -> dict[str, str]:
    """SHA-256 of a sample of all parameters, once rounded to float16 and once to bfloat16."""
    # Embedding and head come first and both: a tied head is the embedding once more, so that tied and untied copies
    # agree although `parameters()` lists one matrix here and two there.
    ends: list[Any] = [
        layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    ]
    inner = [parameter for parameter in model.parameters() if not any(parameter is end for end in ends)]
    values = torch.cat([sampled(parameter) for parameter in [*ends, *inner]])
    # Rounding goes through fp32 for every type, so that float64 and quantised integers have one path.
    return {
        str(kind).removeprefix("torch."): hashlib.sha256(
            values.to(kind).view(torch.int16).numpy().astype("<i2").tobytes()
        ).hexdigest()
        for kind in (torch.float16, torch.bfloat16)
    }


def sampled(parameter: Tensor) -> Tensor:
    """`SAMPLES` elements of a parameter, evenly spread, in fp32 on the CPU (repeated where it has fewer)."""
    flat = parameter.detach().reshape(-1)
    if flat.numel() == 0:
        return torch.zeros(0)
    index = torch.arange(SAMPLES, device=flat.device) * flat.numel() // SAMPLES
    # Adding 0 turns −0 into 0: the two are one value with two bit patterns.
    return flat[index].float().cpu() + 0.0


def json_hash(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
