"""The table of model families: which are served, what is special about each, and which are refused for a known reason.

A family enters the table only with tests that a prefix gives the same logits as the concatenated sequence. A user adds
one of their own with `register_family`, after `softprompt doctor --model PATH` found it exact. The command line reads
such declarations from the module that the environment variable SOFTPROMPT_FAMILIES names.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from softprompt_kernels.errors import SoftPromptError

VARIABLE = "SOFTPROMPT_FAMILIES"


@dataclass(frozen=True)
class Family:
    """What is special about a family. `config` is always that of the text model.

    Args:
        interleaved: rotary pairs are features 2i and 2i + 1. Otherwise i and i + r/2, of r rotary features.
        has_rotary: `(config, layer) -> bool`, whether a layer rotates its keys. None: all layers do.
        logit_scale: `config -> float`, what the model multiplies its logits by. None: 1.
        window: `config -> int`, more tokens than these are refused. None: the model's `max_position_embeddings`.
        packs: False if some part of the model besides attention counts the tokens of a sequence. Its padded batches are
            never run as one packed sequence.
    """

    interleaved: bool = False
    has_rotary: Callable[[Any, int], bool] | None = None
    logit_scale: Callable[[Any], float] | None = None
    window: Callable[[Any], int] | None = None
    packs: bool = True


def _llama4_window(config: Any) -> int:
    """Up to here a chunk is the whole sequence, and the temperature of layers without positions is 1."""
    chunk: int = config.attention_chunk_size or config.max_position_embeddings
    return min(chunk, config.floor_scale - 1) if config.attn_temperature_tuning else chunk


def _below_sliding_window(config: Any) -> int:
    """For models whose masks have a window that their attention function is not told: there it covers all tokens."""
    types = getattr(config, "layer_types", None)
    slides = config.sliding_window is not None and (types is None or "sliding_attention" in types)
    limit: int = config.sliding_window if slides else config.max_position_embeddings
    return limit


_PLAIN = Family()
_INTERLEAVED = Family(interleaved=True)
_COHERE = Family(interleaved=True, logit_scale=lambda config: config.logit_scale)
_GRANITE = Family(logit_scale=lambda config: 1 / config.logits_scaling)


def _is_sliding(config: Any, layer: int) -> bool:
    return config.sliding_window is None or config.layer_types[layer] == "sliding_attention"


_families: dict[str, Family] = {
    "apertus": _PLAIN,
    "arcee": _PLAIN,
    "cohere": _COHERE,
    "cohere2": Family(
        interleaved=True,
        has_rotary=lambda config, layer: config.layer_types[layer] == "sliding_attention",
        logit_scale=lambda config: config.logit_scale,
    ),
    "dots1": _PLAIN,
    "ernie4_5": _INTERLEAVED,
    "ernie4_5_moe": _INTERLEAVED,
    "exaone4": Family(has_rotary=_is_sliding),
    "gemma": _PLAIN,
    "gemma2": _PLAIN,
    "gemma3_text": _PLAIN,
    "glm": _INTERLEAVED,
    "glm4": _INTERLEAVED,
    "glm4_moe": _PLAIN,
    "glm4v_text": _INTERLEAVED,
    "gpt2": _PLAIN,
    "gpt_neox": _PLAIN,
    "gpt_oss": _PLAIN,
    "granite": _GRANITE,
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "helium": _INTERLEAVED,
    "internlm3": _PLAIN,
    "llama": _PLAIN,
    "llama4_text": Family(
        interleaved=True,
        has_rotary=lambda config, layer: bool(config.no_rope_layers[layer]),
        window=_llama4_window,
        packs=False,
    ),
    "minimax_m2": _PLAIN,
    "ministral": _PLAIN,
    "ministral3": _PLAIN,
    "mistral": _PLAIN,
    "mixtral": _PLAIN,
    "olmo": _PLAIN,
    "olmo2": _PLAIN,
    "olmo3": _PLAIN,
    "olmoe": _PLAIN,
    "phi": _PLAIN,
    "phi3": _PLAIN,
    "qwen2": _PLAIN,
    "qwen2_5_vl_text": _PLAIN,
    "qwen2_moe": Family(window=_below_sliding_window),
    "qwen2_vl_text": _PLAIN,
    "qwen3": _PLAIN,
    "qwen3_moe": _PLAIN,
    "qwen3_vl_moe_text": _PLAIN,
    "qwen3_vl_text": _PLAIN,
    "seed_oss": _PLAIN,
    "smollm3": Family(has_rotary=lambda config, layer: bool(config.no_rope_layers[layer])),
    "starcoder2": _PLAIN,
}

FAMILIES = tuple(_families)
"""The families that the tests cover, by `model_type` of the text model."""

WRAPPERS = (
    "aya_vision",
    "cohere2_vision",
    "gemma3",
    "glm4v",
    "idefics3",
    "internvl",
    "llama4",
    "llava",
    "llava_next",
    "llava_onevision",
    "mistral3",
    "qwen2_5_vl",
    "qwen2_audio",
    "qwen2_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "voxtral",
)
"""Multimodal models whose text part is served, if it is of a served family. Their head is a plain linear layer."""

_MLA = "its keys and values have different sizes, and the format of saved prompts has one size for both"
_RECURRENT = "some of its layers keep a state instead of keys and values"
_DROPS = "its layers do not hand the prefix on to their attention"
_SHARED = "its later layers read the keys and values of earlier layers"
_SIZES = "its full layers have heads of another size than its sliding layers, and saved prompts have one size for all"
_LAST = "it rotates the last features of its keys, not the first ones, so that they cannot be moved to other positions"
_NORM = "it normalises keys after their rotary embedding, so that they cannot be moved to other positions"
_OWN = "it computes its attention itself, not through transformers' AttentionInterface"

REFUSED: dict[str, str] = {
    "bamba": _RECURRENT,
    "bloom": _OWN,
    "codegen": _OWN,
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "deepseek_v32": "its queries read only those keys that another part of the model selects",
    "falcon": _OWN,
    "falcon_h1": _RECURRENT,
    "gemma3n": _SHARED,
    "gemma3n_text": _SHARED,
    "gemma4": _SIZES,
    "gemma4_text": _SIZES,
    "glm4_moe_lite": _LAST,
    "gptj": _OWN,
    "granitemoehybrid": _RECURRENT,
    "hunyuan_v1_dense": _NORM,
    "hunyuan_v1_moe": _NORM,
    "jamba": _RECURRENT,
    "lfm2": _RECURRENT,
    "lfm2_moe": _RECURRENT,
    "mamba": _RECURRENT,
    "mamba2": _RECURRENT,
    "minicpm3": _MLA,
    "mistral4": _LAST,
    "mllama": "some of its layers attend to an image",
    "mpt": _OWN,
    "nanochat": "its rotary embedding turns the other way",
    "nemotron": _DROPS,
    "nemotron_h": _RECURRENT,
    "paligemma": "it reads its input in both directions",
    "phimoe": "it chooses experts at random in training mode, which activation checkpointing needs",
    "qwen3_5": _RECURRENT,
    "qwen3_5_moe": _RECURRENT,
    "qwen3_5_moe_text": _RECURRENT,
    "qwen3_5_text": _RECURRENT,
    "qwen3_next": _RECURRENT,
    "recurrent_gemma": _RECURRENT,
    "rwkv": _RECURRENT,
    "stablelm": _DROPS,
    "zamba2": _RECURRENT,
}
"""Families that are known not to be exact, with the reason. It completes the sentence "…, but <reason>"."""

_imported: set[str] = set()
_on_trial: set[str] | None = None


def register_family(
    model_type: str,
    *,
    interleaved: bool = False,
    has_rotary: Callable[[Any, int], bool] | None = None,
    logit_scale: Callable[[Any], float] | None = None,
    window: Callable[[Any], int] | None = None,
    packs: bool = True,
) -> None:
    """Declare that models of a type are served. `softprompt doctor --model PATH` tests whether that is true.

    Args:
        model_type: the `model_type` of the configuration; of the text part's, for a multimodal model.
        interleaved, has_rotary, logit_scale, window, packs: as in `Family`.

    Raises:
        TypeError: `model_type` is not a string.
        SoftPromptError: it is empty, or the package's own tests cover this type already.
    """
    if not isinstance(model_type, str):
        raise TypeError(f"model_type: got {model_type!r}, accepted is a string, such as 'my_model'")
    if not model_type:
        raise SoftPromptError("model_type: got '', accepted is the model_type of a configuration")
    if model_type in FAMILIES:
        raise SoftPromptError(f"model_type: got {model_type!r}, which is served already; accepted is another one")
    _families[model_type] = Family(interleaved, has_rotary, logit_scale, window, packs)


def find_family(model_type: str) -> Family | None:
    """The family of a `model_type`, declared ones included; None if there is none.

    Raises:
        SoftPromptError: the module that SOFTPROMPT_FAMILIES names cannot be imported.
    """
    _import_declarations()
    known = model_type in _families or model_type in REFUSED or model_type in WRAPPERS
    if not known and _on_trial is not None:
        _on_trial.add(model_type)
        return _PLAIN
    return _families.get(model_type)


@contextmanager
def undeclared_families() -> Iterator[set[str]]:
    """Inside, a family that nobody declared counts as a plain one. Yields the names of those that were asked for."""
    global _on_trial
    before, _on_trial = _on_trial, set()
    try:
        yield _on_trial
    finally:
        _on_trial = before


def served() -> list[str]:
    """The names of all served families, declared ones included."""
    return sorted(_families)


def _import_declarations() -> None:
    """Import the module that SOFTPROMPT_FAMILIES names, once."""
    name = os.environ.get(VARIABLE)
    if not name or name in _imported:
        return
    _imported.add(name)  # before the import: the module may look up a family
    try:
        importlib.import_module(name)
    except Exception as error:  # the module is the user's: it may raise anything
        _imported.discard(name)
        raise SoftPromptError(
            f"{VARIABLE}: cannot import {name!r} ({type(error).__name__}: {error}), accepted is the name of a Python "
            "module that calls softprompt_kernels.models.register_family"
        ) from error
