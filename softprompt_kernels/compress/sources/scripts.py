"""Scripts without blanks between words: Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese.

A text of such a script cannot be cut into words at blanks. It is counted and cut by characters.
"""

from __future__ import annotations

import re
import unicodedata

UNSPACED = (
    "\u0e00-\u0eff\u0f00-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
"""Their characters, as the inside of a class of a regular expression."""

MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c) in ("Mn", "Mc"))
"""Marks that belong to the letter before them, such as the vowel signs of Hindi and Thai; for the same use."""

_WORD = re.compile(rf"[{UNSPACED}][{MARKS}]*|[^\s{UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text: what stands between blanks, and of a script without blanks each letter with its marks."""
    return _WORD.findall(text)
