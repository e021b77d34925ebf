"""Weights & Biases: a run whose charts have the step of their stage as x axis, and the final figures as summary.

WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY and other variables of the package count. In offline mode its files are in
`wandb/` of the run's folder, and `wandb sync` sends them. A resumed run has the id of the run that it continues.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.errors import SoftPromptError

PROJECT = "softprompt"


def check() -> None:
    """Check that the package can be imported, and that there is a login or no need of one."""
    try:
        import wandb

        if wandb.setup().settings.mode in ("offline", "disabled", "dryrun") or wandb.login(prompt=False):
            return
    except Exception as error:  # of the installation, of its settings, of the network, of the login
        raise SoftPromptError(f"track: wandb cannot be used ({' '.join(str(error).split())})") from error
    raise SoftPromptError("track: wandb is not logged in; run `wandb login`, or set WANDB_MODE=offline")


def open_track(config: CompressConfig, folder: RunFolder, track: str) -> Wandb:
    """The run of this id, new or continued."""
    return Wandb(config, folder, track)


class Wandb:
    """Logs to one run of W&B. A `Service`."""

    def __init__(self, config: CompressConfig, folder: RunFolder, track: str) -> None:
        import wandb

        options: dict[str, Any] = config.model_dump(mode="json")
        self._run = wandb.init(
            project=wandb.setup().settings.project or PROJECT,
            name=folder.path.resolve().name,
            id=track,
            resume="allow",
            dir=str(folder.path),
            config=options,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """As in `Service`."""
        if stage not in self._stages:
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
            self._stages.add(stage)
        self._run.log({f"{stage}/step": step, **{f"{stage}/{name}": value for name, value in figures.items()}})

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """As in `Service`."""
        self._run.summary.update({f"evaluation/{name}": value for name, value in figures.items()})

    def close(self, finished: bool) -> None:
        """As in `Service`."""
        self._run.finish(exit_code=0 if finished else 1)
