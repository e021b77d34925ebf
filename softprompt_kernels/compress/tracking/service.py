"""What a service has to do to follow a run, and the check that it can, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.errors import SoftPromptError

INSTALL = 'pip install --editable ".[tracking]"'


class Service(Protocol):
    """Receives figures. Any call may fail."""

    def log(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """The figures of a step, which are on disk or sent when this returns, or soon after."""

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """The final figures, after the last step of training."""

    def close(self, finished: bool) -> None:
        """The run ends, or is interrupted."""


def check_service(name: str | None) -> None:
    """Check that a service can follow a run: its package is there, and for W&B a login or its offline mode.

    Args:
        name: as in `CompressConfig.track`; None for none.

    Raises:
        SoftPromptError: it cannot.
    """
    if name is None:
        return
    found = find_spec(name)
    if found is None or found.origin is None:  # a folder of this name, such as that of offline runs, is no package
        raise SoftPromptError(f"track: {name} needs a package that is not installed; {INSTALL}")
    _module(name).check()


def open_service(config: CompressConfig, folder: RunFolder, track: str) -> Service:
    """The service of `config.track`, with a new track or the one of this name.

    Args:
        config: of the run; its `track` is a service.
        folder: of the run.
        track: names the run's track for good.
    """
    assert config.track is not None
    service: Service = _module(config.track).open_track(config, folder, track)
    return service


def _module(name: str):  # type: ignore[no-untyped-def]  # a module of this package
    return import_module(f"softprompt_kernels.compress.tracking.{name}_service")
