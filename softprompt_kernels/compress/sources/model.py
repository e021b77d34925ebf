"""Load a model and its tokenizer, frozen, in evaluation mode, prepared for prefixes."""

from __future__ import annotations

from typing import cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prepare

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(name: str, dtype: str = "auto", device: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer.

    Args:
        name: a folder in transformers' layout, or a name on the hub.
        dtype: "float32", "bfloat16", "float16"; "auto": as stored on a GPU, float32 on a CPU, where it is fastest.
        device: as torch names them; "auto": "cuda" where there is one, else "cpu".

    Raises:
        SoftPromptError: nothing loadable under that name, a family that is not served, a tokenizer that does not fit
            the model, or a device that is not there.
    """
    place = resolve_device(device)
    kind = DTYPES.get(dtype) or (torch.float32 if place.type == "cpu" else "auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(name, dtype=kind))
    except MemoryError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise whatever they like for broken files
        first = str(error).strip().split("\n")[0]
        raise SoftPromptError(f"model: nothing that can be loaded under {name!r} ({first})") from error
    check_tokenizer(model, tokenizer)
    prepare(model)
    torch.nn.Module.to(model, place)  # transformers' own `to` is typed as if it took a model
    return model.eval().requires_grad_(False), tokenizer


def resolve_device(device: str) -> torch.device:
    """The torch device of a name, "auto" included.

    Raises:
        SoftPromptError: not a device, or a CUDA device where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        if place.type != "cuda" or torch.cuda.is_available():
            torch.empty(0, device=place)  # a name that torch knows may still be a device that is not there
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise SoftPromptError(
            f'device: got {device!r}, which torch cannot use here; accepted are "auto", "cpu", "cuda", "cuda:1", …'
        ) from error
    if place.type == "cuda" and not torch.cuda.is_available():
        raise SoftPromptError(f'device: got {device!r}, but torch sees no CUDA device here; accepted is "cpu"')
    return place


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that makes tokens the model has no embedding for."""
    table = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1  # ids may have holes, so not how many there are
    if tokens > table:
        raise SoftPromptError(
            f"tokenizer: got one of {tokens} tokens, accepted is at most {table}, the model's embeddings"
        )
