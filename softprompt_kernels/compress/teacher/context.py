"""What the model reads before a query, as a prefix of keys and values: the whole context, k of its tokens, or none."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.parallel import ranks
from softprompt_kernels.compress.reporter import Advance, Reporter, SilentReporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.teacher.context_file import ContextFile
from softprompt_kernels.models import MemoryStore, TokenStore, capture, shift_keys
from softprompt_kernels.models.families import rope_parameters
from softprompt_kernels.prompts import Prefix, initialise
from softprompt_kernels.prompts.fingerprint import json_hash, model_fingerprint

CAPTURE_TOKENS = 1024
"""Tokens of a context that go through the model at once."""


@dataclass(frozen=True)
class ContextStorage:
    """Where the keys and values of a context are kept, and in which dtype.

    Args:
        dtype: None: the model's. The model computes in its own dtype, and rounds what it keeps. A layer is cast back
            whenever it is read.
        file: of safetensors; its folder exists. None: the memory of the model's device. The keys and values of a file
            are on the CPU, and a layer of a model on another device is moved there whenever it is read.
        made_from: what the content of the file depends on beside the tokens and this dtype, by name, in strings. None:
            the model alone.
        reporter: receives the progress, and a message where a file cannot be used.
    """

    dtype: torch.dtype | None = None
    file: Path | None = None
    made_from: Mapping[str, str] | None = None
    reporter: Reporter = field(default_factory=SilentReporter)


def capture_context(
    model: PreTrainedModel, ids: Tensor, *, before: Prefix | None = None, storage: ContextStorage | None = None
) -> Prefix:
    """The keys and values of a context: the prefix that makes the model the teacher.

    Args:
        model: a prepared model.
        ids: `[1, C]` int64.
        before: a prompt of P tokens that the context follows, as the state of the segments before it. The result has
            P + C tokens then, the prompt's first. None: the context is first.
        storage: None: memory, in the model's dtype. A file that holds this context is read back, and one that was
            interrupted goes on. Of many ranks the first writes it, and the others read it then. In memory each computes
            its own.

    Raises:
        SoftPromptError: as `models.capture` and `ContextFile`.
    """
    storage, ids = storage or ContextStorage(), ids.to(model.device)
    total = ids.shape[1] + (0 if before is None else before.length)
    if storage.file is None:
        return _capture(model, ids, before, MemoryStore(total, storage.dtype, "context_dtype"), storage.reporter)
    made_from = {
        **(storage.made_from or {"model": json_hash(model_fingerprint(model))}),
        "model_dtype": str(model.dtype),
        "context": hashlib.sha256(ids.cpu().contiguous().numpy().tobytes()).hexdigest(),
        "prefix": _digest(before),
        "chunk": str(CAPTURE_TOKENS),
    }
    first = capture(model, ids[:, :1])
    if not ranks.is_first():
        ranks.barrier(storage.file)
    file = ContextFile(storage.file, made_from, first, total, storage.dtype or first.dtype)
    try:
        if file.remark is not None:
            storage.reporter.message(file.remark)
        if 0 < file.length < total:
            storage.reporter.message(f"Resuming the context from token {file.length} of {total}.")
        found = _capture(model, ids, before, file, storage.reporter)
        if ranks.is_first():
            ranks.barrier()
        return found
    finally:
        file.close()


def _capture(
    model: PreTrainedModel, ids: Tensor, before: Prefix | None, store: TokenStore, reporter: Reporter
) -> Prefix:
    """`capture` in chunks, with a bar if there is more than one."""
    if ids.shape[1] <= CAPTURE_TOKENS:
        return capture(model, ids, CAPTURE_TOKENS, before, store)
    total = ids.shape[1] + (0 if before is None else before.length)
    with reporter.progress("Reading the context", total, "token") as advance:
        advance(store.length)
        return capture(model, ids, CAPTURE_TOKENS, before, _Shown(store, advance))


class _Shown:
    """A store that shows its progress. A `TokenStore`."""

    def __init__(self, store: TokenStore, show: Advance) -> None:
        self.store, self.show, self.length = store, show, store.length
        self.put, self.prefix = store.put, store.prefix

    def advance(self, tokens: int) -> None:
        self.store.advance(tokens)
        self.length = self.store.length
        self.show(tokens)


def _digest(prefix: Prefix | None) -> str:
    """SHA-256 of the numbers of a prefix."""
    hasher = hashlib.sha256()
    for pair in () if prefix is None else prefix.layers:
        for tensor in pair:
            hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def select_tokens(model: PreTrainedModel, context: Prefix, k: int, how: str) -> Prefix:
    """k tokens of a captured context as a prefix of length k.

    Args:
        model: rotates the keys to their new positions.
        context: the captured context, C tokens.
        k: from 1 to C.
        how: "first", or "strided": spread evenly over the context.

    Raises:
        SoftPromptError: "strided" for a model whose rotary frequencies depend on the length: its keys cannot be moved.
    """
    return initialise.from_prefix(context, k, how, rotate=partial(move_keys, model))


def move_keys(model: PreTrainedModel, prefix: Prefix, delta: int | Tensor) -> Prefix:
    """`shift_keys`, but the keys of a model with learned positions stay: positions cannot be taken out of them."""
    return shift_keys(model, prefix, delta) if rope_parameters(model.config) else prefix


def no_context_prefix(model: PreTrainedModel, chat: ChatFormat) -> Prefix | None:
    """What the chat template puts before a query when there is neither context nor prompt; None if it puts nothing."""
    ids = chat.no_context_ids()
    return None if ids is None else capture(model, ids.to(model.device))
