"""The folder of a run: its files, and a record of which run they belong to.

    config.yaml  run.json  chat.json  queries.jsonl  cache/  checkpoint.safetensors  metrics.jsonl
    stages.json  curves.png  prompt/  answers.md  details.json  evaluation.json  report.html

`best.safetensors` comes from `save_best`, and `checkpoint.before-1.safetensors`, … from `keep_checkpoints`.

`diagnosis.json` comes from `softprompt diagnose`; `tracking.json`, `tensorboard/` and `wandb/` from `track`.

`run.json` holds the identity of the run, and what it was made with. The same command on the same folder resumes the
run. A command of another identity is refused before it changes anything. While a process works in the folder, it has a
`.lock` (see `process/lock.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.process.lock import LOCK
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.output_file import disk_errors_named

AFTER_DIVERGENCE = ("learning_rate", "max_grad_norm")
"""The options that may change after the training has diverged. The run goes on from its last good state with them."""


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run."""

    path: Path

    @property
    def queries(self) -> Path:
        """The queries with the teacher's answers, as text."""
        return self.path / "queries.jsonl"

    @property
    def examples(self) -> Path:
        """The queries with the teacher's answers, as token ids."""
        return self.path / "cache" / "examples.json"

    @property
    def server_answers(self) -> Path:
        """The answers of a server, as they come."""
        return self.path / "cache" / "server-answers.jsonl"

    @property
    def cache(self) -> Path:
        """The folder of what the teacher left, and of matched layers."""
        return self.path / "cache"

    @property
    def context(self) -> Path:
        """The keys and values of the context, where they are not kept in memory."""
        return self.cache / "context.safetensors"

    @property
    def targets(self) -> Path:
        """The folder of the targets of training."""
        return self.cache / "targets"

    @property
    def states(self) -> Path:
        """The folder of the teacher's hidden states of evaluated examples."""
        return self.cache / "states"

    @property
    def rounds(self) -> Path:
        """The folder of the student's answers, by round, with the teacher's targets of them."""
        return self.cache / "rounds"

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint of training."""
        return self.path / "checkpoint.safetensors"

    @property
    def best(self) -> Path:
        """The prompt of the best held-out evaluation during training."""
        return self.path / "best.safetensors"

    @property
    def metrics(self) -> Path:
        """One JSON object for each step, of matching (by groups of layers) and of training."""
        return self.path / "metrics.jsonl"

    @property
    def stages(self) -> Path:
        """The seconds of the stages that are finished."""
        return self.path / "stages.json"

    @property
    def curves(self) -> Path:
        """The plot of the training curves."""
        return self.path / "curves.png"

    @property
    def prompt(self) -> Path:
        """The saved prompt."""
        return self.path / "prompt"

    @property
    def answers(self) -> Path:
        """The answers to the held-out and test questions, with the full context and with the prompt."""
        return self.path / "answers.md"

    @property
    def details(self) -> Path:
        """The evaluation token by token."""
        return self.path / "details.json"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.path / "report.html"

    @property
    def diagnosis(self) -> Path:
        """What `softprompt diagnose` found."""
        return self.path / "diagnosis.json"

    @property
    def evaluation(self) -> Path:
        """The figures. Written after all other results: where it exists, the run is finished."""
        return self.path / "evaluation.json"

    @property
    def identity(self) -> dict[str, Any]:
        """The identity in run.json; empty if there is none that can be read."""
        saved = self._record.get("identity")
        return saved if isinstance(saved, dict) else {}

    @property
    def current(self) -> dict[str, Any]:
        """The identity, with the options as they are after all changes."""
        found = dict(self.identity)
        for change in self.changes:
            found |= {name: value for name, value in change.items() if name != "step"}
        return found

    @property
    def changes(self) -> list[dict[str, Any]]:
        """The options that were changed after the training had diverged: each with "step", from which they hold."""
        saved = self._record.get("changes")
        return saved if isinstance(saved, list) else []

    @property
    def _record(self) -> dict[str, Any]:
        """The content of run.json; empty if it cannot be read."""
        try:
            saved = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return saved if isinstance(saved, dict) else {}

    def mark_diverged(self, step: int) -> None:
        """Record that the training cannot go on as it is. Then the options in `AFTER_DIVERGENCE` may change.

        Args:
            step: of the last good state.
        """
        write_text(self.path / "run.json", json.dumps(self._record | {"diverged": step}, indent=1))

    @property
    def made_with(self) -> dict[str, str]:
        """The versions and the machine that began the run; empty if they were not recorded."""
        saved = self._record.get("made_with")
        return {str(name): str(value) for name, value in saved.items()} if isinstance(saved, dict) else {}

    def claim(self, identity: dict[str, Any], config_yaml: str, made_with: Mapping[str, str] | None = None) -> None:
        """Make the folder this run's, or check that it already is.

        Args:
            identity: from `inputs.identity`.
            config_yaml: the content of config.yaml, written unless the file exists.
            made_with: from `report.versions.made_with`, recorded with the identity. It may differ in a resumed run.

        Raises:
            SoftPromptError: the folder holds other files, or another run. The message names the options that differ.
        """
        record = self.path / "run.json"
        if self.path.exists() and not self.path.is_dir():
            raise SoftPromptError(f"output: {self.path} is a file, accepted is a folder")
        if record.exists():
            saved = self.current
            if not saved:
                raise SoftPromptError(f"output: {record} cannot be read; choose another folder")
            names = sorted(name for name in {*saved, *identity} if saved.get(name) != identity.get(name))
            content = self._record
            if names and "diverged" in content and set(names) <= set(AFTER_DIVERGENCE):
                change = {"step": content.pop("diverged"), **{name: identity.get(name) for name in names}}
                content["changes"] = [*self.changes, change]
                write_text(self.path / "config.yaml", config_yaml)
                write_text(record, json.dumps(content, indent=1))
            elif names:
                raise SoftPromptError(
                    f"output: {self.path} holds another run, which differs in {', '.join(names)}; choose another folder"
                )
            self._write(config_yaml, record=None)
            return
        if self.path.exists() and any(entry.name != LOCK for entry in self.path.iterdir()):
            raise SoftPromptError(f"output: {self.path} holds files that do not belong to a run; choose another folder")
        made = {"made_with": dict(made_with)} if made_with else {}
        self._write(config_yaml, json.dumps({"identity": identity, **made}, indent=1))

    def _write(self, config_yaml: str, record: str | None) -> None:
        """Write run.json first: with it the folder is this run's, and the same call can write config.yaml later."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if record is not None:
                write_text(self.path / "run.json", record)
            if not (self.path / "config.yaml").exists():
                write_text(self.path / "config.yaml", config_yaml)
        except OSError as error:
            raise SoftPromptError(f"output: {self.path} cannot be written ({error.strerror})") from error

    def read_evaluation(self) -> dict[str, Any] | None:
        """The figures of a finished run; None if it is not finished."""
        try:
            figures: dict[str, Any] = json.loads(self.evaluation.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return figures

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Write evaluation.json, which marks the run as finished."""
        write_text(self.evaluation, json.dumps(figures, indent=1) + "\n")

    @property
    def has_metrics(self) -> bool:
        """Whether a step is recorded."""
        return self.metrics.exists() and self.metrics.stat().st_size > 0

    def add_metrics(self, record: Mapping[str, Any]) -> None:
        """Append the record of a step to the metrics. Of many ranks the first does."""
        from softprompt_kernels.compress.parallel import ranks  # it imports torch

        if not ranks.is_first():
            return
        with disk_errors_named(self.metrics), self.metrics.open("a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(record) + "\n")

    def drop_metrics_after(self, step: int) -> float:
        """Delete the metrics of training steps after `step`, which the run repeats, and a line that a crash cut off.

        Returns:
            Seconds that the remaining training steps took.
        """
        if not self.metrics.exists():
            return 0.0
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the run was killed while it wrote this line
                break
            if record["stage"] == "training" and record["step"] > step:
                break
            kept.append(record)
        from softprompt_kernels.compress.parallel import ranks

        if ranks.is_first():
            write_text(self.metrics, "".join(json.dumps(record) + "\n" for record in kept))
        return float(sum(record["seconds"] for record in kept if record["stage"] == "training"))
