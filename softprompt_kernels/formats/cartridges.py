"""The cache of Cartridges (arXiv 2506.06266; HazyResearch/cartridges, `cartridges.cache.TrainableCache`).

Its `save` writes one file of torch.save, a dictionary of four lists with one tensor `[1, Hkv, tokens, D]` a layer:

    trainable_keys, trainable_values    the tokens that are trained
    frozen_keys, frozen_values          the first tokens, which are not; empty lists where there are none

Keys are after the rotary embedding. Theirs are usually in bfloat16.

**Positions.** A cache is made from a text at positions 0..k−1. Their data and their generation count the tokens after
it from 0 (`position_ids = arange(n)`), and their models then add the length of the cache (`position_ids +
cartridge_len` in models/llama/modeling_llama.py and models/qwen/modeling_qwen3.py). So the sequence continues at k, as
in PEFT and here, and the keys are the same numbers in both. Code that loads such a file into models of its own may
leave the addition out. Its sequence starts at 0. Rotary scores depend on differences of positions alone, so for
`first_query="0"` keys are moved:

    such a file → ours: keys by +k        ours → such a file: keys by −k

after which logits are equal. This needs a rotary embedding with fixed frequencies. A file does not say which of the two
it is made for. Their attention lets every token see the whole cache, so models whose layers have a sliding window are
refused.

What is written here has lists of plain tensors in place of `nn.ParameterList`, which their `from_pretrained` reads the
same way, and one more entry, a string with the record of the prompt. Frozen lists always have one tensor a layer,
without tokens where nothing is frozen, because `from_pretrained` refuses empty lists. It takes the number of heads for
the number of frozen tokens (their issue 23): the logits are right, and training there would freeze other tokens.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.content import Content, FirstQuery, dtype_name, kv_prompt
from softprompt_kernels.formats.torch_file import dense, saved_bytes
from softprompt_kernels.models import shift_keys
from softprompt_kernels.models.families import text_config
from softprompt_kernels.prompts import KVPrompt
from softprompt_kernels.prompts.weights import FLOATS, to_float_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINABLE, FROZEN = ("trainable_keys", "trainable_values"), ("frozen_keys", "frozen_values")
NOTE = "softprompt_kernels"


def to_bytes(content: Content, dtype: str) -> bytes:
    """The content of the file.

    Args:
        content: a KV prompt, with its keys where the code that reads the file expects them (see `moved`).
        dtype: "float32", "bfloat16" or "float16".

    Raises:
        SoftPromptError: another dtype, or a number is too large for it.
    """
    prompt = content.prompt
    check_kv(content)
    assert isinstance(prompt, KVPrompt)
    if dtype not in FLOATS:
        raise SoftPromptError(f"--dtype: got {dtype} for a cache of Cartridges, accepted are {', '.join(FLOATS)}")
    frozen = prompt.frozen_tokens
    lists: dict[str, Any] = {}
    for (trained, kept), numbers in zip(zip(TRAINABLE, FROZEN, strict=True), prompt.stacked(), strict=True):
        layers = to_float_dtype(numbers.detach().cpu(), dtype).unsqueeze(1)
        lists[trained] = [layer[:, :, frozen:].clone() for layer in layers]
        lists[kept] = [layer[:, :, :frozen].clone() for layer in layers]
    note = {"first_query": content.first_query, "base_model": content.base_model, "record": content.record}
    return saved_bytes({**lists, NOTE: json.dumps(note, sort_keys=True)})


def is_cache(loaded: Any) -> bool:
    """Whether what torch.load gave is a cache of Cartridges."""
    return isinstance(loaded, dict) and all(name in loaded for name in TRAINABLE)


def read(path: Path, loaded: Any, first_query: FirstQuery = "k") -> Content:
    """The cache in a file, with its keys as they are there (`moved` moves them).

    Args:
        path: the file, for the messages.
        loaded: what `load_tensors` gave for it.
        first_query: where the queries of this cache start. A file that this package wrote says it by itself.

    Raises:
        SoftPromptError: a list is missing, its tensors have wrong shapes, or numbers that are not finite.
    """
    layers: dict[str, list[Tensor]] = {}
    for name in (*TRAINABLE, *FROZEN):
        try:
            found = list(loaded.get(name))
        except (TypeError, AttributeError) as error:  # no list, or a ParameterList with a wrong size
            raise SoftPromptError(f"{path} has no list of tensors {name}, which a cache of Cartridges has") from error
        layers[name] = [dense(f"{path}: {name}[{index}]", tensor) for index, tensor in enumerate(found)]
        for index, tensor in enumerate(layers[name]):
            if tensor.dim() != 4 or tensor.shape[0] != 1 or not tensor.is_floating_point():
                raise SoftPromptError(
                    f"{path}: {name}[{index}] is {dtype_name(tensor)} of shape {tuple(tensor.shape)}, "
                    "accepted are floating-point numbers of shape [1, key heads, tokens, head size]"
                )
    joined = [join(path, kept, layers[kept], layers[trained]) for trained, kept in zip(TRAINABLE, FROZEN, strict=True)]
    frozen = layers[FROZEN[0]][0].shape[2] if layers[FROZEN[0]] else 0
    prompt = kv_prompt(str(path), joined[0], joined[1], frozen)
    note = note_of(loaded)
    record, base = note.get("record"), note.get("base_model")
    known: Any = note.get("first_query")
    return Content(
        "cartridges",
        prompt,
        known if known in ("0", "k") else first_query,
        dtype_name(joined[0][0]),
        base if isinstance(base, str) else None,
        record=record if isinstance(record, dict) else {},
    )


def join(path: Path, name: str, kept: list[Tensor], trained: list[Tensor]) -> list[Tensor]:
    """The frozen tokens and those behind them, `[Hkv, k, D]` a layer."""
    if not kept:
        return [tensor[0] for tensor in trained]
    if len(kept) != len(trained):
        raise SoftPromptError(f"{path}: {name} has {len(kept)} layers, accepted are 0 or {len(trained)}")
    for index, (first, rest) in enumerate(zip(kept, trained, strict=True)):
        if (first.shape[1], first.shape[3]) != (rest.shape[1], rest.shape[3]):
            raise SoftPromptError(
                f"{path}: {name}[{index}] has shape {tuple(first.shape)}, which does not fit {tuple(rest.shape)}"
            )
    return [torch.cat((first[0], rest[0]), dim=1) for first, rest in zip(kept, trained, strict=True)]


def note_of(loaded: dict[str, Any]) -> dict[str, Any]:
    """What this package added to a file; empty for one of Cartridges."""
    try:
        note = json.loads(loaded.get(NOTE, "{}"))
    except (TypeError, ValueError, RecursionError):
        return {}
    return note if isinstance(note, dict) else {}


def moved(content: Content, model: PreTrainedModel, first_query: FirstQuery) -> Content:
    """The same prompt with its keys moved, so that the sequence after it starts at k or at 0. Logits stay the same.

    Args:
        content: a KV prompt.
        model: that of the prompt; its rotary embedding is read.
        first_query: where the sequence is to start.

    Raises:
        SoftPromptError: it is no KV prompt; or the keys of this model cannot be moved, or it has sliding windows, which
            Cartridges' attention has not.
    """
    check_kv(content)
    check_windows(model)
    if content.first_query == first_query:
        return content
    prompt = content.prompt
    assert isinstance(prompt, KVPrompt)
    delta = prompt.length if first_query == "k" else -prompt.length
    try:
        prefix = shift_keys(model, prompt.prefix().detach(), delta)
    except SoftPromptError as error:
        raise SoftPromptError(f"--queries-at: 0 needs keys that can be moved; {error}") from error
    return replace(
        content, prompt=KVPrompt.from_prefix(prefix, frozen_tokens=prompt.frozen_tokens), first_query=first_query
    )


def check_kv(content: Content) -> None:
    """Raise a SoftPromptError unless the content is a KV prompt."""
    if not isinstance(content.prompt, KVPrompt):
        raise SoftPromptError(
            "cartridges: got an embedding prompt, accepted are keys and values; with --model they are made of its "
            "vectors"
        )


def check_windows(model: PreTrainedModel) -> None:
    """Raise a SoftPromptError for a model whose layers have a sliding window."""
    if has_window(text_config(model)):
        raise SoftPromptError(
            "cartridges: got a model with sliding windows, and Cartridges' attention has none; accepted are models "
            "whose layers all see the whole sequence"
        )


def has_window(config: Any) -> bool:
    """Whether some layers of a text model see only a window of the sequence."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return any("full" not in one for one in types)
    return bool(getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None))
