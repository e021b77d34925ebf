"""The folder of a bank: a run for each context, and what they have in common.

    bank.json                 the configuration, and the summary (see `summary.py`)
    checkpoint.safetensors    the training that is under way
    sources/                  contexts and queries of a file of JSON Lines, as files of their own
    runs/NAME/                the folder of a context's run, as of a single run (see `compress/folder.py`)

The same command on the same folder resumes the bank. With more contexts it adds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.inputs import WITHOUT_EFFECT
from softprompt_kernels.compress.process.lock import LOCK
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.errors import SoftPromptError

_PATHS = {"model", "context", "queries", "heldout", "test", "init_text"}
"""Fields that the runs compare by content."""


@dataclass(frozen=True)
class BankFolder:
    """Paths of a bank."""

    path: Path

    @property
    def summary(self) -> Path:
        """The summary of the bank."""
        return self.path / "bank.json"

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of the training that is under way."""
        return self.path / "checkpoint.safetensors"

    @property
    def sources(self) -> Path:
        """The folder of contexts and queries that came in one file."""
        return self.path / "sources"

    def run(self, name: str) -> RunFolder:
        """The run of a context."""
        return RunFolder(self.path / "runs" / name)

    def claim(self, config: CompressConfig) -> None:
        """Make the folder that of this bank, or check that it already is.

        Raises:
            SoftPromptError: the folder holds something else, or a bank of another configuration; the message names the
                fields that differ.
        """
        wanted = json.loads(config.model_dump_json(exclude={*WITHOUT_EFFECT, *_PATHS}))
        saved = self.read()
        if saved is not None:
            known = saved.get("config")
            if not isinstance(known, dict):
                raise SoftPromptError(f"output: {self.summary} cannot be read; choose another folder")
            names = sorted(name for name in wanted if known.get(name, wanted[name]) != wanted[name])
            if names:
                raise SoftPromptError(
                    f"output: {self.path} holds another bank, which differs in {', '.join(names)}; choose another "
                    "folder"
                )
            return
        if self.path.exists() and not self.path.is_dir():
            raise SoftPromptError(f"output: {self.path} is a file, accepted is a folder")
        if self.path.exists() and any(entry.name != LOCK for entry in self.path.iterdir()):
            raise SoftPromptError(
                f"output: {self.path} holds files that do not belong to a bank; choose another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write({"config": wanted})
        except OSError as error:
            raise SoftPromptError(f"output: {self.path} cannot be written ({error.strerror})") from error

    def read(self) -> dict[str, Any] | None:
        """The content of bank.json; None if there is none. It is empty if it cannot be read."""
        try:
            content = json.loads(self.summary.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def write(self, content: Mapping[str, Any]) -> None:
        """Write bank.json."""
        write_text(self.summary, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
