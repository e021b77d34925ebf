"""The configuration of each context's run, and the files that it reads."""

from __future__ import annotations

import json
from pathlib import Path

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.config_file import load_config
from softprompt_kernels.compress.sources.contexts import NamedContext
from softprompt_kernels.compress.sources.queries import Query, write_text
from softprompt_kernels.compress.text_file import read_utf8
from softprompt_kernels.errors import SoftPromptError


def context_config(config: CompressConfig, context: NamedContext, sources: Path, output: Path) -> CompressConfig:
    """The configuration of one context's run.

    A context from a folder is read where it is. One from a file of JSON Lines, and its own queries, are written to
    `sources`. Its own queries take the place of those of the configuration.

    Args:
        config: of the bank.
        context: the context.
        sources: the folder for files.
        output: the folder of the run.

    Raises:
        SoftPromptError: it has no queries, or an old file of its name has another content.
    """
    changes: dict[str, object] = {"output": output}
    begun = (output / "run.json").exists()
    if config.context.is_dir():
        changes["context"] = config.context / context.place
    else:
        changes["context"] = _written(sources / f"{context.name}.txt", context.text, context.place, begun)
    for field in ("queries", "heldout", "test"):
        queries: tuple[Query, ...] | None = getattr(context, field)
        if queries is not None:
            lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in map(_line, queries))
            changes[field] = _written(sources / f"{context.name}.{field}.jsonl", lines, context.place, begun)
    known = {name: value for name, value in config.model_dump().items() if value is not None}
    if not known["selfstudy"] and "queries" not in {*known, *changes}:  # which the check of the file's name let through
        raise SoftPromptError("queries: missing, and selfstudy=0 generates none")
    return load_config(None, {**known, **changes})


def _written(path: Path, text: str, place: str, begun: bool) -> Path:
    """The file with this content. It may not change once the run has begun."""
    # As read_utf8 would read it: the run compares by content.
    text = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    if begun and path.exists():
        if read_utf8(path, str(path)) != text:
            raise SoftPromptError(f"{place} has changed since its run began; give it another name")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def _line(query: Query) -> dict[str, object]:
    given = {"input": query.input, "output": query.output, "family": query.family, "references": query.references}
    return {name: value for name, value in given.items() if value}
