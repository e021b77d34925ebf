"""Text between the terminal and the commands, where one of them is not UTF-8."""

from __future__ import annotations

import codecs
import io
import os
import sys

from softprompt_kernels.errors import SoftPromptError


def prepare_streams() -> None:
    """Let standard output show what its encoding lacks as an escape, such as \\xe9, and read ASCII input as UTF-8.

    Python does the first for standard error. ASCII is what Python assumes if the environment does not say more.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper) and codecs.lookup(sys.stdin.encoding).name == "ascii":
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")


def as_text(argument: str, name: str) -> str:
    """An argument or a line of standard input as text. `name` is what it is.

    Python keeps bytes that the terminal's encoding lacks as surrogates. They are read as UTF-8 here.

    Raises:
        SoftPromptError: it is not UTF-8.
    """
    try:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            return os.fsencode(argument).decode()
        return argument
    except UnicodeError as error:
        raise SoftPromptError(f"{name}: got {argument[:40]!a}, accepted is UTF-8 text") from error
