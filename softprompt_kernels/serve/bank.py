"""The model and its prompts, from their folders. All prompts stand in one bank, which requests read by a row's number.

    row 0    nothing: plain text without a prompt
    row 1    what the chat template puts before a query without a context; left out if it puts nothing
    then     one row for each prompt

Cost: the bank holds R rows as long as the longest prompt, in the model's dtype.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat, load_model
from softprompt_kernels.compress.saved_prompt import recorded_arguments
from softprompt_kernels.compress.sources.model import embedding_count
from softprompt_kernels.compress.teacher.answers import end_tokens
from softprompt_kernels.compress.teacher.context import no_context_prefix
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import Prefix, load
from softprompt_kernels.prompts.adapter import CONFIG, describe

_NAME = re.compile(r"[\w.:/@+-]{1,128}")


@dataclass(frozen=True, eq=False)
class Served:
    """What requests of one name get.

    Args:
        name: the request's `model`.
        chat_row, text_row: rows of the bank, for chats and for plain text.
        chat: converts messages to tokens.
        tokens: of the prompt; 0 for the model without one.
        ends: the tokens that end an answer.
    """

    name: str
    chat_row: int
    text_row: int
    chat: ChatFormat
    tokens: int
    ends: frozenset[int]


@dataclass(frozen=True, eq=False)
class Bank:
    """A model, its prompts, and the names that requests call them by.

    Args:
        model, tokenizer: as loaded.
        prefix: the bank of prompts; None without prompts, if the chat template puts nothing before a query.
        served: by name; the first is the model without a prompt.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefix: Prefix | None
    served: Mapping[str, Served]

    @cached_property
    def _backend(self) -> Tokenizer:
        """A copy: the tokenizer's own may be changed by who else uses it, and requests come from several threads."""
        backend = Tokenizer.from_str(self.tokenizer.backend_tokenizer.to_str())
        backend.no_truncation()
        backend.no_padding()
        return backend

    @property
    def vocabulary(self) -> int:
        """How many tokens the model knows."""
        return embedding_count(self.model)

    def text_ids(self, text: str, served: Served) -> list[int]:
        """The token ids of a plain `text` for what is `served`. Only without a prompt the tokenizer adds its own."""
        return list(self._backend.encode(text, add_special_tokens=served.tokens == 0).ids)

    def decode(self, tokens: list[int]) -> str:
        """The text of `tokens`, token ids, without control tokens."""
        return str(self._backend.decode(tokens, skip_special_tokens=True))

    def token_text(self, token: int) -> str:
        """The text of one `token`, an id, control tokens too."""
        return str(self._backend.decode([token], skip_special_tokens=False))


def named_prompts(given: Sequence[str], folder: Path | None) -> dict[str, Path]:
    """The folders of prompts by name. Reads no tensors and no model.

    Args:
        given: each `NAME=FOLDER`, of a saved prompt or of a finished run.
        folder: each folder in it that is a saved prompt or a finished run gets its own name. None: there is none.

    Raises:
        SoftPromptError: a name is used twice or has odd characters, or a folder is not that of a prompt.
    """
    pairs = []
    for entry in given:
        name, _, place = entry.partition("=")
        if not place:
            raise SoftPromptError(f"--prompt: got {entry!r}, accepted is NAME=FOLDER")
        pairs.append((name, Path(place)))
    if folder is not None:
        if not folder.is_dir():
            raise SoftPromptError(f"--prompts: {folder} is not a folder")
        found = [(path.name, path) for path in sorted(folder.iterdir()) if _prompt_in(path) is not None]
        if not found:
            raise SoftPromptError(f"--prompts: {folder} has no folder of a saved prompt or of a finished run")
        pairs += found
    prompts: dict[str, Path] = {}
    for name, path in pairs:
        check_name("--prompt", name)
        if name in prompts:
            raise SoftPromptError(f"--prompt: got the name {name!r} twice, accepted are different names")
        prompts[name] = _prompt_in(path) or path
        describe(prompts[name])
    return prompts


def check_name(option: str, name: str) -> None:
    """Raise a SoftPromptError for a name that a request could not say."""
    if not _NAME.fullmatch(name):
        raise SoftPromptError(f"{option}: got the name {name!r}, accepted are letters, digits and _ . : / @ + -")


def _prompt_in(path: Path) -> Path | None:
    """The folder of the prompt: this one, or `prompt` in that of a run."""
    return next((each for each in (path, path / "prompt") if (each / CONFIG).is_file()), None)


@torch.no_grad()
def load_bank(
    model_name: str,
    prompts: Mapping[str, Path],
    *,
    base_name: str | None = None,
    template_arguments: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
) -> Bank:
    """Load a model and its prompts.

    Args:
        model_name, dtype, device: as in `load_model`.
        prompts: folders by name, from `named_prompts`.
        base_name: of the model without a prompt; None: the last part of `model_name`.
        template_arguments: of the chat template; None: for each prompt those that it was made with.
        force: as in `softprompt_kernels.prompts.load`.

    Raises:
        SoftPromptError: as `load_model` and `load`, or the model's name is that of a prompt.
    """
    base_name = base_name or re.sub(r"[^\w.:/@+-]", "-", Path(model_name).resolve().name or model_name)[:128]
    check_name("--base-name", base_name)
    if base_name in prompts:
        raise SoftPromptError(f"--base-name: got {base_name!r}, the name of a prompt too; accepted is another name")
    model, tokenizer = load_model(model_name, dtype, device)
    chats: dict[str, ChatFormat] = {}

    def chat_of(recorded: Mapping[str, Any]) -> ChatFormat:
        arguments = recorded if template_arguments is None else template_arguments
        key = repr(sorted(arguments.items()))
        if key not in chats:
            chats[key] = ChatFormat(tokenizer, arguments)
        return chats[key]

    chat = chat_of({})
    before = no_context_prefix(model, chat)
    rows = [] if before is None else [before]
    served = {base_name: Served(base_name, len(rows), 0, chat, 0, end_tokens(model, chat))}
    for name, folder in prompts.items():
        prompt, record = load(folder, model, tokenizer, force=force)
        rows.append(prefix_of(model, prompt).detach())
        chat = chat_of(recorded_arguments(record))
        served[name] = Served(name, len(rows), len(rows), chat, prompt.length, end_tokens(model, chat))
    prefix = Prefix.stack([rows[0].slice(0, 0), *rows]) if rows else None
    return Bank(model, tokenizer, prefix, served)
