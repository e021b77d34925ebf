"""Text files of the user: UTF-8, with or without a byte order mark (BOM).

A BOM is not part of the text. Some editors and PowerShell write one. Files in UTF-16, which they also write, are
refused by that name.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from softprompt_kernels.errors import SoftPromptError

BOM = "\ufeff"
_CENTRED = 20
_WIDE = {  # UTF-32 first: its mark starts with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_utf8(path: Path, name: str) -> str:
    """The text of a file, without a BOM and with every end of line as a line feed.

    Args:
        path: the file.
        name: what it is, at the start of an error message: "context: notes.txt".

    Raises:
        SoftPromptError: the file is missing, cannot be read or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise SoftPromptError(f"{name} cannot be read ({error.strerror or error})") from error
    except ValueError as error:  # a path with a null character or half of a surrogate pair
        raise SoftPromptError(f"{name} cannot be read ({error})") from error
    if wide := wide_encoding(content):
        raise SoftPromptError(f"{name} is {wide} text, accepted is UTF-8; save it in that encoding")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SoftPromptError(f"{name} is not UTF-8 text (byte {error.start})") from error
    return text.lstrip(BOM).replace("\r\n", "\n").replace("\r", "\n")


def wide_encoding(content: bytes) -> str | None:
    """ "UTF-16" or "UTF-32" if the bytes are that, by their mark or by the zeros of its Latin letters; else None."""
    marked = next((name for mark, name in _WIDE.items() if content.startswith(mark)), None)
    if marked is not None:
        return marked
    start = content[:1024]
    zeros = max(start[0::2].count(0), start[1::2].count(0))
    return "UTF-16" if zeros > len(start) // 4 else None


def trim(text: str) -> str:
    """A text without blank lines around it and blanks at its end; the first of several lines keeps its indentation.

    More than `_CENTRED` blanks are no indentation: they centre a title.
    """
    lines = text.rstrip().split("\n")
    while len(lines) > 1 and not lines[0].strip():
        del lines[0]
    if len(lines) == 1 or len(lines[0]) - len(lines[0].lstrip()) > _CENTRED:
        lines[0] = lines[0].lstrip()
    return "\n".join(lines)
