"""The documents of a composition: finished runs of `compress`, loaded and checked against each other.

A prompt alone does not say what to ask behind it. So a composition starts from the folders of the runs that made the
prompts. Each names its context and its queries, and keeps the teacher's answers. All of it must still be what it was
when the run was made. What does not need the model is checked first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.config_file import load_config
from softprompt_kernels.compress.diagnose.collect import load_run
from softprompt_kernels.compress.distill.trainer import Prompt
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import Loaded, RunInputs, sha256
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import describe, load
from softprompt_kernels.prompts.adapter import CONFIG, RECORD
from softprompt_kernels.prompts.fingerprint import differences
from softprompt_kernels.prompts.json_file import integer

SEPARATOR = "\n\n"
"""Between the documents, where they stand in one text."""


@dataclass(frozen=True, eq=False)
class Source:
    """A finished run, before anything is loaded.

    Args:
        name: what tables call it: the name of its folder, with those above it where two have the same name.
        folder: of the run.
        config: of the run, on the device of the composition.
        adapter, record: adapter_config.json and softprompt.json of its prompt.
    """

    name: str
    folder: RunFolder
    config: CompressConfig
    adapter: dict[str, Any]
    record: dict[str, Any]

    @property
    def tokens(self) -> int:
        """k, the length of its prompt."""
        return integer(self.folder.prompt / CONFIG, self.adapter, "num_virtual_tokens", 1)

    @property
    def frozen(self) -> int:
        """Tokens at the start of its prompt that were not trained: its attention sink."""
        return integer(self.folder.prompt / RECORD, self.record, "frozen_tokens", 0)

    @property
    def digest(self) -> str:
        """A digest of the run and of its prompt."""
        hasher = hashlib.sha256(json.dumps(self.folder.identity, sort_keys=True).encode())
        for path in sorted(self.folder.prompt.glob("*.safetensors")):
            hasher.update(path.read_bytes())
        return hasher.hexdigest()


@dataclass(frozen=True, eq=False)
class Document:
    """A run with its inputs and its prompt.

    Args:
        source: where it comes from.
        inputs: of its run: context, queries, chat format.
        prompt: its prompt, on the model's device.
    """

    source: Source
    inputs: RunInputs
    prompt: Prompt


def sources_of(paths: Sequence[Path], *, device: str | None = None) -> tuple[Source, ...]:
    """The runs in these folders, compared with each other. No model is needed.

    Args:
        paths: folders of runs of `compress`, or of the prompts in them; two or more, none twice.
        device: instead of those in the configurations of the runs; None: as there.

    Raises:
        SoftPromptError: there are too few, one is named twice, is no finished run of `compress` in one piece, has no
            record, or differs from the first in the model, the tokenizer, the kind, the dtype or the chat template's
            arguments.
    """
    if len(paths) < 2:
        raise SoftPromptError(f"runs: got {len(paths)}, accepted are two or more folders of runs of `compress`")
    folders = [_run_folder(path) for path in paths]
    seen: dict[Path, Path] = {}
    for path, folder in zip(paths, folders, strict=True):
        if (other := seen.setdefault(folder.path.resolve(), path)) is not path:
            raise SoftPromptError(f"runs: got {path} twice (as {other}), accepted is each run once")
    # What a run's configuration asks of the machine is not for the composition.
    update = {"threads": None, "gradient_checkpointing": False} | ({} if device is None else {"device": device})
    names = _names([folder.path.resolve() for folder in folders])
    sources = tuple(_source(name, folder, update) for name, folder in zip(names, folders, strict=True))
    for source in sources[1:]:
        if found := _differences(sources[0], source):
            raise SoftPromptError(
                f"runs: {source.folder.path} and {sources[0].folder.path} do not fit together; the first against the "
                f"second: {'; '.join(found)}"
            )
    return sources


def load_documents(sources: Sequence[Source], loaded: Loaded) -> tuple[Document, ...]:
    """The inputs and the prompts of the runs.

    Args:
        sources: from `sources_of`.
        loaded: their model and tokenizer.

    Raises:
        SoftPromptError: a file that a run names has gone, or is another one now; or a prompt belongs to another model.
    """
    documents = []
    for source in sources:
        inputs = load_run(source.folder, source.config, loaded)
        prompt, _ = load(source.folder.prompt, *loaded)
        documents.append(Document(source, inputs, prompt))
    return tuple(documents)


def joined_text(documents: Sequence[Document]) -> str:
    """What the joined prompt stands for: the texts one after the other in one context, with a blank line between."""
    return SEPARATOR.join(document.inputs.text.strip("\n") for document in documents)


def recorded_contexts(documents: Sequence[Document], kept: Sequence[int]) -> dict[str, Any]:
    """The contexts of the joined prompt, for softprompt.json.

    Args:
        documents: in the order of their prompts.
        kept: how many tokens of the joined prompt come from each.
    """
    arguments = documents[0].inputs.config.template_arguments
    return {
        "sha256": sha256(joined_text(documents)),
        "tokens": sum(document.inputs.context_tokens for document in documents),
        "contexts": [
            {
                "sha256": sha256(document.inputs.text),
                "tokens": document.inputs.context_tokens,
                "prompt_tokens": tokens,
            }
            for document, tokens in zip(documents, kept, strict=True)
        ],
        **({"template_arguments": arguments} if arguments else {}),
    }


def _run_folder(path: Path) -> RunFolder:
    """The folder of the run at `path`, or of the run that holds the prompt at `path`."""
    if (path / CONFIG).is_file() and not (path / "run.json").exists():
        parent = path.resolve().parent
        if not (parent / "run.json").is_file():
            raise SoftPromptError(
                f"runs: {path} holds a prompt without its run, and so without its text and queries; accepted are "
                "folders of runs of `compress`. Prompts alone are joined by `join_prompts` in Python"
            )
        return RunFolder(path.parent if path.name else parent)
    return RunFolder(path)


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of different paths that are different."""
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def _source(name: str, folder: RunFolder, update: dict[str, Any]) -> Source:
    path = folder.path
    if not folder.identity or not (path / "config.yaml").is_file():
        raise SoftPromptError(f"runs: {path} holds no run, accepted are folders that `softprompt compress` wrote")
    if "runs" in folder.identity:
        raise SoftPromptError(
            f"runs: {path} is a composition, accepted are runs of `compress`: name the runs that it was made of"
        )
    if folder.read_evaluation() is None:
        raise SoftPromptError(f"runs: {path} is not finished; run its `softprompt compress` again")
    config = load_config(path / "config.yaml", {"output": path, **update})
    if config.segment_tokens is not None:  # its queries and teachers are those of its segments
        raise SoftPromptError(
            f"runs: {path} compressed a text in segments, accepted are runs without segment_tokens. Prompts alone are "
            "joined by `join_prompts` in Python"
        )
    adapter, record = describe(folder.prompt)
    if record is None:
        raise SoftPromptError(
            f"runs: {folder.prompt} has no {RECORD}, which says what the prompt was made from; accepted is the folder "
            "as `compress` wrote it"
        )
    return Source(name, folder, config, adapter, record)


def _differences(first: Source, other: Source) -> list[str]:
    """What keeps two prompts from being joined, in words: the second run's value, then that of the first."""
    kinds = [source.adapter["peft_type"] == "PROMPT_TUNING" for source in (other, first)]
    found = [] if kinds[0] == kinds[1] else ["kind " + " against ".join("embedding" if is_ else "kv" for is_ in kinds)]
    for what in ("model", "tokenizer"):
        saved, now = other.record.get(what), first.record.get(what)
        if not isinstance(saved, dict) or not isinstance(now, dict):
            found += [f"no fingerprint of the {what}"] if saved != now else []
        elif phrases := differences(saved, now):
            found.append(f"another {what} ({', '.join(phrases)})")
    for name in ("dtype", "template_arguments"):
        mine, others = (getattr(source.config, name) for source in (other, first))
        if mine != others:
            found.append(f"{name} {mine} against {others}")
    return found
