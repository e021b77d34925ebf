"""TensorBoard: event files in `tensorboard/` of the run's folder, written by PyTorch's SummaryWriter.

A resumed run adds a file to them. Each step is flushed, so that a killed run keeps all that it logged.
"""

from __future__ import annotations

from collections.abc import Mapping

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.errors import SoftPromptError


def check() -> None:
    """Check that the writer can be imported."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401
    except Exception as error:  # of an installation that does not fit together
        raise SoftPromptError(f"track: tensorboard cannot be imported ({' '.join(str(error).split())})") from error


def open_track(config: CompressConfig, folder: RunFolder, track: str) -> TensorBoard:
    """A writer of the run's events, which begins with its configuration."""
    return TensorBoard(config, folder)


class TensorBoard:
    """Writes tags such as `training/loss`. A `Service`."""

    def __init__(self, config: CompressConfig, folder: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder.path / "tensorboard"))
        self._writer.add_text("config", "".join(f"    {line}\n" for line in config.to_yaml().splitlines()))

    def log(self, stage: str, step: int, figures: Mapping[str, float]) -> None:
        """As in `Service`."""
        for name, value in figures.items():
            self._writer.add_scalar(f"{stage}/{name}", value, step)
        self._writer.flush()

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """As in `Service`."""
        self.log("evaluation", step, figures)

    def close(self, finished: bool) -> None:
        """As in `Service`."""
        self._writer.close()
