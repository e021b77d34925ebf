"""The folder of a run: where its parts lie, and whose it is.

    config.yaml  run.json  queries.jsonl  cache/  checkpoint.safetensors  metrics.jsonl
    curves.png  prompt/  evaluation.json

`run.json` holds the identity of the run. The same command on the same folder goes on where it was; another one is
refused before anything is touched.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.errors import SoftPromptError


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def queries(self) -> Path:
        """Queries with their outputs, once the teacher has been asked."""
        return self.path / "queries.jsonl"

    @property
    def examples(self) -> Path:
        """The same in tokens, as sampled."""
        return self.path / "cache" / "examples.json"

    @property
    def cache(self) -> Path:
        """The teacher's targets."""
        return self.path / "cache"

    @property
    def checkpoint(self) -> Path:
        """The last state of training."""
        return self.path / "checkpoint.safetensors"

    @property
    def metrics(self) -> Path:
        """One object a step."""
        return self.path / "metrics.jsonl"

    @property
    def curves(self) -> Path:
        """The plot."""
        return self.path / "curves.png"

    @property
    def prompt(self) -> Path:
        """The saved prompt."""
        return self.path / "prompt"

    @property
    def evaluation(self) -> Path:
        """The figures; written last, so its presence means that the run is finished."""
        return self.path / "evaluation.json"

    def claim(self, identity: dict[str, Any], config_yaml: str) -> None:
        """Make the folder this run's, or find that it already is.

        Raises:
            SoftPromptError: it holds something else, or another run, whose differences are named.
        """
        record = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise SoftPromptError(f"output: {self.path} is a file, accepted is a folder")
        if record.exists():
            try:
                saved = json.loads(record.read_text(encoding="utf-8"))["identity"]
                names = sorted(name for name in {*saved, *identity} if saved.get(name) != identity.get(name))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SoftPromptError(f"output: {record} cannot be read; choose another folder") from error
            if names:
                raise SoftPromptError(
                    f"output: {self.path} holds another run, which differs in {', '.join(names)}; choose another folder"
                )
            self._write(config_yaml, record=None)
            return
        if self.path.exists() and any(self.path.iterdir()):
            raise SoftPromptError(f"output: {self.path} holds something that is no run; choose another folder")
        self._write(config_yaml, json.dumps({"identity": identity}, indent=1))

    def _write(self, config_yaml: str, record: str | None) -> None:
        """The record first: with it alone the folder is known as ours, and the same call puts the rest there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if record is not None:
                write_text(self.path / "run.json", record)
            if not (self.path / "config.yaml").exists():
                write_text(self.path / "config.yaml", config_yaml)
        except OSError as error:
            raise SoftPromptError(f"output: {self.path} cannot be written ({error.strerror})") from error

    def read_evaluation(self) -> dict[str, Any] | None:
        """The figures of a finished run, None where it is not finished."""
        try:
            figures: dict[str, Any] = json.loads(self.evaluation.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return figures

    def cut_metrics(self, step: int) -> float:
        """Drop what was recorded after `step` (the run will do it again); seconds spent on the steps that stay."""
        if not self.metrics.exists():
            return 0.0
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # a line that was being written when the run was killed
                break
            if record["step"] > step:
                break
            kept.append(record)
        write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return float(sum(record["seconds"] for record in kept))
