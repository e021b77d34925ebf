"""Writes a folder of files as a whole, or leaves what was there.

A new folder is written beside the old one, flushed to the disk, and renamed into its place, so a full disk, an
interrupt or a lost machine never costs the last good one. A folder cannot be swapped for another in one step on every
system: for an instant between two renames the old one is called `.NAME.previous`. Should the machine stop right
there, `recover` gives it its name back.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from softprompt_kernels.errors import SoftPromptError


def replace_folder(path: str | Path, files: Mapping[str, bytes], mark: str) -> None:
    """Makes `path` a folder with exactly `files` (name to content).

    Args:
        path: the folder; parents are created.
        files: what it will hold.
        mark: the file by which a folder that may be replaced is known.

    Raises:
        SoftPromptError: `path` holds something else (see `check_replaceable`), or cannot be written; what was there
            is unchanged.
    """
    target = Path(os.path.realpath(path))
    recover(path)
    check_replaceable(path, files, mark)
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


def check_replaceable(path: str | Path, names: Collection[str], mark: str) -> None:
    """Refuses a path that holds anything but nothing, an empty folder, or a folder of ours.

    Ours has the file `mark` and no file beyond `names`.

    Raises:
        SoftPromptError: it holds something else, named.
    """
    target = Path(os.path.realpath(path))
    try:
        if not target.exists():
            return
        if not target.is_dir():
            raise SoftPromptError(f"{path} is a file; accepted is a new or empty folder, or a saved prompt to replace")
        found = {entry.name for entry in target.iterdir()}
    except OSError as error:
        raise SoftPromptError(f"{path} cannot be looked into: {error.strerror or error}") from error
    if found and (mark not in found or found - set(names)):
        other = sorted(found - set(names)) or sorted(found)
        raise SoftPromptError(
            f"{path} holds something else ({', '.join(other[:3])}{', …' if len(other) > 3 else ''}); "
            "accepted is a new or empty folder, or a saved prompt to replace"
        )


def recover(path: str | Path) -> None:
    """Gives a folder its name back if the machine stopped between the two renames of `swap`.

    Raises:
        SoftPromptError: the place cannot be looked into.
    """
    target = Path(os.path.realpath(path))
    previous = previous_name(target)
    try:
        if previous.is_dir() and not target.exists():
            os.rename(previous, target)
    except OSError as error:
        raise SoftPromptError(f"{path} cannot be looked into: {error.strerror or error}") from error


def swap(new: Path, target: Path) -> None:
    """Renames `new` to `target`; a folder that was there is gone afterwards, or back if that failed."""
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
    """Writes and waits until the disk has it: a rename may otherwise overtake the data."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def previous_name(target: Path) -> Path:
    """What a folder is called while its successor takes its place."""
    return target.with_name(f".{target.name}.previous")
