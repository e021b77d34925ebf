"""Follows a run in a service: every step of matching and training, and the final figures.

`tracking.json` in the run's folder holds the id of the track and the last step of each stage that was logged. A resumed
run continues the track: it logs the steps of metrics.jsonl that are missing, and not again those that it repeats from
its checkpoint, which have the same figures.

A service that fails does not end the run: there is one warning, and the run goes on without it.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.compress.report.metrics import read_metrics
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.queries import write_text
from softprompt_kernels.compress.tracking.service import Service, open_service

NOT_FIGURES = ("stage", "step", "first_layer", "layers")


@contextmanager
def tracked(config: CompressConfig, folder: RunFolder, reporter: Reporter) -> Iterator[Tracker]:
    """`with tracked(...) as tracker:` follows a run in the service of `config.track`, if it names one.

    Args:
        config: of the run, whose service was checked by `check_service`.
        folder: of the run. It exists.
        reporter: receives the warning.
    """
    tracker = Tracker(config, folder, reporter)
    try:
        yield tracker
    finally:
        tracker.close()


class Tracker:
    """See `tracked`."""

    def __init__(self, config: CompressConfig, folder: RunFolder, reporter: Reporter) -> None:
        self._name, self._steps = config.track, config.steps
        self._file, self._reporter = folder.path / "tracking.json", reporter
        self._service: Service | None = None
        self._finished = False
        if self._name is None:
            return
        self._id, self._logged = self._read()
        self._attempt(lambda: self._open(config, folder))

    def log(self, record: Mapping[str, Any]) -> None:
        """Log a record of metrics.jsonl, unless it was."""
        if self._service is not None:
            self._attempt(lambda: self._log(record))

    def finish(self, figures: Mapping[str, Any]) -> None:
        """Log the content of evaluation.json."""
        self._finished = True
        service = self._service
        if service is not None:
            self._attempt(lambda: service.finish(self._steps, dict(_flat(figures))))

    def close(self) -> None:
        """End the track, or interrupt it."""
        service, self._service = self._service, None
        if service is not None:
            self._attempt(lambda: service.close(self._finished))

    def _open(self, config: CompressConfig, folder: RunFolder) -> None:
        self._service = open_service(config, folder, self._id)
        if folder.has_metrics:
            matching, training = read_metrics(folder.metrics)
            for record in (*matching, *training):
                self._log(record)

    def _log(self, record: Mapping[str, Any]) -> None:
        assert self._service is not None
        stage, step = str(record["stage"]), int(record["step"])
        if "first_layer" in record:
            stage += f" from layer {record['first_layer']}"
        if step <= self._logged.get(stage, 0):
            return
        figures = {
            name: float(value) for name, value in record.items() if name not in NOT_FIGURES and value is not None
        }
        self._service.log(stage, step, figures)
        self._logged[stage] = step
        self._write()

    def _attempt(self, call: Callable[[], None]) -> None:
        """Call, and give the service up if that fails."""
        try:
            call()
        except Exception as error:
            self._service = None
            reason = " ".join(str(error).split()) or type(error).__name__
            self._reporter.message(f"Warning: {self._name} failed ({reason}). The run goes on without it.")

    def _read(self) -> tuple[str, dict[str, int]]:
        """The id of the track, new if there is none, and the last logged step of each stage."""
        try:
            saved = json.loads(self._file.read_text(encoding="utf-8"))[self._name]
            return str(saved["id"]), {str(stage): int(step) for stage, step in saved["logged"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return uuid.uuid4().hex[:12], {}

    def _write(self) -> None:
        write_text(self._file, json.dumps({self._name: {"id": self._id, "logged": self._logged}}))


def _flat(figures: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of nested mappings, by their path."""
    for key, value in figures.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}{key}/")
        elif isinstance(value, (int, float)):
            yield f"{name}{key}", float(value)
