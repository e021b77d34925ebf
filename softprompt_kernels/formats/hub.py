"""Upload a saved prompt to the Hugging Face hub.

What is uploaded is written anew from what was read, never the folder itself: the numbers, adapter_config.json with the
fields that PEFT needs, softprompt.json, and a model card. Of the record go the fingerprints, the digest and the length
of the context, the objective and the figures. Texts and local paths stay here: a context, queries, and any text in
these parts of the record or in the arguments of the chat template that is long or has a slash in it.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.card import card_text
from softprompt_kernels.formats.content import Content
from softprompt_kernels.formats.inspection import mapping
from softprompt_kernels.formats.peft import clean_config
from softprompt_kernels.prompts.adapter import README, RECORD, write
from softprompt_kernels.prompts.weights import INT8, WEIGHTS, StoredDtype

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LONGEST_TEXT = 64
"""Characters of a text in the record that is uploaded."""

_PATH = re.compile(r"[/\\]|^~")
_OF_CONTEXT = ("sha256", "tokens", "contexts", "template_arguments")
_FREE = {".gitattributes", README}


def push(
    folder: Path, content: Content, repository: str, *, private: bool = False, base_model: str | None = None
) -> str:
    """Upload a saved prompt, and make the repository if there is none.

    Args:
        folder: the folder of the prompt; its README.md is the card, if it has one.
        content: what was read from it.
        repository: USER/NAME on the hub.
        private: make the repository private if it is new.
        base_model: the name of the base model on the hub; None: the one in the prompt.

    Returns:
        The address of the repository.

    Raises:
        SoftPromptError: no name of a repository; a base model without a name on the hub; a card with a local path; no
            token; a repository that holds something else; or the hub refuses or cannot be reached.
    """
    check_repository(repository)
    if content.format not in ("folder", "peft"):
        raise SoftPromptError(
            f"PROMPT: got {content.format}, accepted is a folder (`softprompt export` or `softprompt import` makes one)"
        )
    named = replace(content, base_model=hub_name(content, base_model), record=public_record(content.record))
    dtype = cast(StoredDtype, content.dtype)
    readme = card_of(folder, content, named, repository)
    config = clean_config(named, content.config.get("peft_type"))

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if get_token() is None:
        raise SoftPromptError(
            "no token for the hub was found; accepted are `hf auth login`, or the environment variable HF_TOKEN, with "
            "a token that may write"
        )
    api = HfApi(library_name="softprompt-kernels")
    try:
        there = files_of(api, repository)
        check_free(repository, there)
        with tempfile.TemporaryDirectory() as temporary:
            ready = Path(temporary) / "prompt"
            write(ready, content.prompt, config, named.record or None, dtype=dtype, readme=readme)
            api.create_repo(repository, private=private, exist_ok=True)
            written = {file.name: file for file in ready.iterdir()}
            stale = there & {WEIGHTS, INT8} - written.keys()  # of another dtype, from an earlier upload
            api.create_commit(
                repository,
                [
                    *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in written.items()),
                    *(CommitOperationDelete(path_in_repo=name) for name in stale),
                ],
                commit_message=f"Upload a soft prompt of {content.prompt.length} tokens",
            )
    except SoftPromptError:
        raise
    except Exception as error:  # of the hub, of the network, of the HTTP client that huggingface_hub uses
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise SoftPromptError(f"--repo: {repository} could not be written ({reason})") from error
    return f"{api.endpoint}/{repository}"


def check_repository(repository: str) -> None:
    """Raise a SoftPromptError unless `repository` is a name USER/NAME as the hub accepts it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise SoftPromptError(f"--repo: got {repository!r}, accepted is USER/NAME, such as ada/handbook-prompt")


def hub_name(content: Content, base_model: str | None) -> str:
    """The base model's name on the hub.

    Raises:
        SoftPromptError: the given name, or that in the prompt, is none.
    """
    name = base_model if base_model is not None else content.base_model
    if name is not None and not is_local(name):
        return name
    where = "--base-model" if base_model is not None else "PROMPT"
    found = "does not name its base model" if name is None else f"names the local folder {name} as its base model"
    raise SoftPromptError(
        f"{where}: {found}, which tells others nothing; accepted is --base-model with its name on the hub, such as "
        "HuggingFaceTB/SmolLM2-135M-Instruct"
    )


def is_local(name: str) -> bool:
    """Whether the name of a model is a path on this machine rather than a name on the hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return True
    return os.path.exists(name)


def card_of(folder: Path, content: Content, named: Content, repository: str) -> str:
    """The text of the card: the folder's own, or a new one where it has none, or one that `export` made.

    Raises:
        SoftPromptError: the folder's card names a local path.
    """
    fresh = card_text(named, content.dtype, repository)
    file = folder / README
    if not file.is_file():
        return fresh
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SoftPromptError(f"{file} cannot be read as text ({error})") from error
    if text in (card_text(content, content.dtype, folder.name), card_text(named, content.dtype, folder.name)):
        return fresh
    local = [name for name in (content.base_model, str(folder.resolve()), str(Path.home())) if name and is_local(name)]
    for name in local:
        if len(name) > 1 and name in text:
            raise SoftPromptError(
                f"{file} has the local path {name}; accepted is a card without it, or none, and one is made"
            )
    return text


def public_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a prompt as it may be published. Texts that are left out are named in a warning."""
    if not record:
        return {}
    left_out: list[str] = []
    context = {name: value for name, value in mapping(record, "context").items() if name in _OF_CONTEXT}
    parts: dict[str, Any] = {
        name: public(name, value, left_out)
        for name, value in (
            ("model", record.get("model")),
            ("tokenizer", record.get("tokenizer")),
            ("context", context),
            ("objective", mapping(record, "objective")),
            ("figures", mapping(record, "figures")),
        )
    }
    if left_out:
        warnings.warn(f"not uploaded, as it is text or a path: {', '.join(left_out)}", stacklevel=3)
    numbers = {name: record.get(name) for name in ("format", "positions", "prompt_tokens", "frozen_tokens")}
    return {**numbers, **parts}


def public(name: str, value: Any, left_out: list[str]) -> Any:
    """A value of the record without texts that are long or have a path; `left_out` receives their names."""
    if isinstance(value, dict):
        if hidden := [key for key in value if is_private(key)]:
            left_out.append(f"{len(hidden)} names in {name}")
        kept = {key: public(f"{name}.{key}", item, left_out) for key, item in value.items() if key not in hidden}
        return {key: item for key, item in kept.items() if item is not None or value[key] is None}
    if isinstance(value, list):
        items = [public(f"{name}[{index}]", item, left_out) for index, item in enumerate(value)]
        return [item for item, before in zip(items, value, strict=True) if item is not None or before is None]
    if isinstance(value, str) and is_private(value):
        left_out.append(name)
        return None
    return value


def is_private(text: str) -> bool:
    """Whether a text of the record may be part of the context, a query or a path."""
    return len(text) > LONGEST_TEXT or _PATH.search(text) is not None


def files_of(api: HfApi, repository: str) -> set[str]:
    """The files of a repository on the hub; empty if there is none."""
    return set(api.list_repo_files(repository)) if api.repo_exists(repository) else set()


def check_free(repository: str, files: set[str]) -> None:
    """Raise a SoftPromptError if a repository holds something else than a prompt of this package."""
    if files - _FREE and RECORD not in files:
        raise SoftPromptError(
            f"--repo: {repository} holds something else ({', '.join(sorted(files - _FREE)[:3])}); accepted is a new or "
            "empty repository, or one with a prompt of this package"
        )
