"""Replace a folder of files atomically: either all new files are written, or the old folder is unchanged.

The new folder is written next to the old one, flushed to the disk, and renamed to the old name. A full disk, an
interrupt or a crash therefore never loses the last good folder.

Not every system can exchange two folders in one step. Between two renames the old folder is called `.NAME.previous`. If
the machine stops at that moment, `recover` renames it back.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from softprompt_kernels.errors import SoftPromptError


def replace_folder(path: str | Path, files: Mapping[str, bytes], marker: str, others: Collection[str] = ()) -> None:
    """Make `path` a folder with exactly `files` (name to content).

    Args:
        path: the folder; parents are created.
        files: the new content.
        marker: name of a file. Only a folder that has this file, or an empty one, is replaced.
        others: names of files that such a folder may have besides `files`; they are not kept.

    Raises:
        SoftPromptError: `path` holds something else (see `check_replaceable`), or cannot be written. Its content is
            unchanged.
    """
    target = Path(os.path.realpath(path))
    recover(path)
    check_replaceable(path, {*files, *others}, marker)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.mkdir(parents=True)
        for name, content in files.items():
            write_file(partial / name, content)
        swap(partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            kept = "what was there is unchanged" if target.exists() else "nothing was left there"
            raise SoftPromptError(f"{path} could not be written: {error.strerror or error}; {kept}") from error
        raise


def check_replaceable(path: str | Path, names: Collection[str], marker: str) -> None:
    """Raise unless `path` is free, an empty folder, or a folder that may be replaced.

    A folder may be replaced if it has the file `marker` and no other files than `names`.

    Raises:
        SoftPromptError: the path holds something else; the message names it.
    """
    target = Path(os.path.realpath(path))
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise SoftPromptError(f"{path} is a file; accepted is a new or empty folder, or a saved prompt to replace")
        found = {entry.name for entry in target.iterdir()}
    except OSError as error:
        raise SoftPromptError(f"{path} cannot be read: {error.strerror or error}") from error
    if found and (marker not in found or found - set(names)):
        other = sorted(found - set(names)) or sorted(found)
        raise SoftPromptError(
            f"{path} holds something else ({', '.join(other[:3])}{', …' if len(other) > 3 else ''}); "
            "accepted is a new or empty folder, or a saved prompt to replace"
        )


def recover(path: str | Path) -> None:
    """Rename a folder back if the machine stopped between the two renames of `swap`.

    Raises:
        SoftPromptError: the parent folder cannot be read.
    """
    target = Path(os.path.realpath(path))
    previous = previous_name(target)
    try:
        if previous.is_dir() and not target.exists():
            os.rename(previous, target)
    except OSError as error:
        raise SoftPromptError(f"{path} cannot be read: {error.strerror or error}") from error


def swap(new: Path, target: Path) -> None:
    """Rename `new` to `target`. The old `target` is deleted; if a rename fails, it is restored."""
    if not target.exists():
        os.rename(new, target)
        return
    previous = previous_name(target)
    shutil.rmtree(previous, ignore_errors=True)
    os.rename(target, previous)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(previous, target)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def write_file(path: Path, content: bytes) -> None:
    """Write a file and wait until its data is on the disk. Otherwise a rename may reach the disk before the data."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def previous_name(target: Path) -> Path:
    """The name of the old folder between the two renames of `swap`."""
    return target.with_name(f".{target.name}.previous")
