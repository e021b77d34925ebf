"""A lock on the folder of a run: one process at a time works in it.

It is a lock of the operating system on the file `.lock`, so it ends with its process, however that ends: a file that a
killed process left behind locks nothing. The file names the process that holds the lock. Where locks or writing are not
possible (Windows, some network drives, a folder that is read only), there is none.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from softprompt_kernels.errors import SoftPromptError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The name of the file in the folder."""

TRIES, PAUSE = 10, 0.02
"""How often a lock is tried, and the seconds between: another process may be looking at the file."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it does not exist.

    Raises:
        SoftPromptError: another process holds the lock; the message names it.
    """
    file = _lock(folder, os.O_CREAT)
    if file is None:
        yield
        return
    try:
        with suppress(OSError):  # a full disk: the message to others lacks the process
            os.ftruncate(file, 0)
            os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()  # while the lock is held: `_lock` sees that the file is gone
        os.close(file)


def check_unlocked(folder: Path) -> None:
    """Raise if another process works in a folder. For use before anything is loaded. Writes nothing.

    Raises:
        SoftPromptError: another process holds the lock; the message names it.
    """
    file = _lock(folder, 0)
    if file is not None:
        os.close(file)


def _lock(folder: Path, create: int) -> int | None:
    """The locked file of a folder, opened; None if there can be none, or none yet without `O_CREAT`."""
    if fcntl is None:
        return None
    for left in reversed(range(TRIES)):
        try:
            if create:
                folder.mkdir(parents=True, exist_ok=True)
            file = _open(folder / LOCK, create)
        except OSError:
            return None  # the first file that is written says why
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(folder / LOCK)):
                    return file
        except BlockingIOError:
            if left:
                os.close(file)
                time.sleep(PAUSE)
                continue
            holder = os.pread(file, 200, 0).decode(errors="replace") or "another process"
            os.close(file)
            raise SoftPromptError(
                f"output: {folder} is in use by {holder}; wait until it ends, or choose another folder"
            ) from None
        except OSError:  # the file system has no locks
            os.close(file)
            return None
        os.close(file)  # the process that held it has deleted the file: try the new one
    return None


def _open(path: Path, create: int) -> int:
    """The file, opened for writing, or for reading alone where it belongs to another user."""
    try:
        return os.open(path, os.O_RDWR | create, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY)
