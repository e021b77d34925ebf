"""Loads a model and its tokenizer: frozen, in evaluation mode, prepared for prefixes."""

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
        dtype: "float32", "bfloat16", "float16", or "auto": float32 on a CPU, where it is fastest, else as stored.
        device: a torch device, or "auto": "cuda" if there is one, else "cpu".

    Raises:
        SoftPromptError: nothing can be loaded under that name, the model family is not supported, the tokenizer does
            not fit the model, or the device does not exist.
    """
    resolved = resolve_device(device)
    torch_dtype = DTYPES.get(dtype) or (torch.float32 if resolved.type == "cpu" else "auto")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = cast(PreTrainedModel, AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype))
    except MemoryError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise many types for broken files
        first = str(error).strip().split("\n")[0]
        raise SoftPromptError(f"model: cannot load {name!r} ({first})") from error
    check_tokenizer(model, tokenizer)
    prepare(model)
    torch.nn.Module.to(model, resolved)  # the type of transformers' own `to` is wrong
    return model.eval().requires_grad_(False), tokenizer


def resolve_device(device: str) -> torch.device:
    """The torch device of a name; "auto" is "cuda" if there is one, else "cpu".

    Raises:
        SoftPromptError: not a device name, or a device that does not exist here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        if resolved.type != "cuda" or torch.cuda.is_available():
            torch.empty(0, device=resolved)  # a valid name may still be a device that does not exist
    except (RuntimeError, AssertionError, ImportError) as error:
        raise SoftPromptError(
            f'device: got {device!r}, which torch cannot use here; accepted are "auto", "cpu", "cuda", "cuda:1", …'
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise SoftPromptError(f'device: got {device!r}, but torch sees no CUDA device here; accepted is "cpu"')
    return resolved


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the model has an embedding for every token of the tokenizer.

    Raises:
        SoftPromptError: a token has no embedding.
    """
    embeddings = cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1  # not the number of tokens: ids may have gaps
    if tokens > embeddings:
        raise SoftPromptError(
            f"tokenizer: got one of {tokens} tokens, accepted are at most {embeddings}, the model's embeddings"
        )
