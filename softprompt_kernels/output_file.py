"""Files that a command writes: checked before the work, and there only when they are complete."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softprompt_kernels.errors import SoftPromptError


def check_output(option: str, target: Path) -> None:
    """Check that a file can be written, without writing it.

    Args:
        option: the option or argument that names the file, for the message.
        target: the file; it may exist.

    Raises:
        SoftPromptError: the target is a folder or a device, or its folder is missing or cannot be written to.
    """
    if target.is_dir():
        raise SoftPromptError(
            f"{option}: got {target}, which is a folder; accepted is a file such as {target / 'new.json'}"
        )
    if target.exists() and not target.is_file():
        raise SoftPromptError(f"{option}: got {target}, which is a device or a pipe; accepted is a file")
    if not target.parent.is_dir():
        raise SoftPromptError(f"{option}: got {target}, but {target.parent} is not a folder")
    try:
        with tempfile.TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise SoftPromptError(f"{option}: {target.parent} cannot be written to ({error.strerror})") from error


@contextmanager
def written_when_complete(option: str, target: Path | None) -> Iterator[Path | None]:
    """A temporary file beside the target, renamed to it at the end, or removed after an exception.

    Its name ends as the target's does. None: no file.

    Raises:
        SoftPromptError: as `check_output`, before the body runs.
    """
    if target is None:
        yield None
        return
    check_output(option, target)
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=f"-{target.name}")
    temporary = Path(name)
    try:
        os.chmod(temporary, 0o666 & ~_umask())
        os.close(descriptor)
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replaced_when_complete(target: Path, *, flush: bool = False) -> Iterator[Path]:
    """The temporary file `NAME.partial` beside the target, renamed to it at the end, or removed after an exception.

    Args:
        target: the file. What was there stays until the new one is complete.
        flush: wait until the data is on the disk. Otherwise the rename may reach it first, and a machine that loses its
            power leaves a file without content.

    Raises:
        OSError: the disk is full, or cannot be written for another reason. It names the target, which neither Python
            nor safetensors does when a write fails.
    """
    temporary = target.with_name(target.name + ".partial")
    try:
        with disk_errors_named(target):
            yield temporary
            if flush:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
            temporary.replace(target)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def disk_errors_named(target: Path) -> Iterator[None]:
    """Within the context, an error of the disk becomes an OSError that names the file."""
    try:
        yield
    except Exception as error:
        if (reason := _disk_error(error)) is None:
            raise
        raise OSError(reason, os.strerror(reason), str(target)) from error


def _disk_error(error: Exception) -> int | None:
    """The error number of the operating system in an exception of Python or of safetensors, which are known by name
    here so that this module needs no package; None if it has none."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
