"""Text of an answer, piece by piece, while its tokens come.

A character may take several tokens, and a stop string may begin in one token and end in another. What may still change
is held back: an end that is no character yet, and one that may become a stop string. Some decoders write one mark for
each byte of a run of bytes until all of it is text, so all marks at the end are held. The pieces together are the text
of all tokens up to the first stop string.

Cost: two decodings of the last few tokens for each token, whatever the length of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
_LONGEST = 3  # bytes of a character that is not complete
_KEPT, _MOST = 8, 32  # tokens that are decoded again while nothing but broken characters comes


class TokenText:
    """The text of tokens, without half characters.

    Args:
        decode: gives the text of token ids.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._tokens: list[int] = []  # the last ones, from where a character began
        self._whole = 0  # how many of them end with a whole character
        self._sent = 0  # characters of their text that were given out

    def put(self, token: int) -> str:
        """Add a token. The text that is complete now and was not before."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        held = len(text) - len(text.rstrip(_BROKEN))
        if not held:
            piece = self._until(text, len(text))
            self._tokens = self._tokens[self._whole :]
            self._whole = len(self._tokens)
            self._sent = len(self._decode(self._tokens))
        elif len(self._tokens) > _MOST:  # no character is that long: all but the end stays broken
            held = min(held, _LONGEST)
            piece = self._until(text, len(text) - held)
            self._tokens, self._whole = self._tokens[-_KEPT:], 0
            self._sent = len(self._decode(self._tokens)) - held
        else:
            piece = self._until(text, len(text) - held)
        return piece

    def rest(self) -> str:
        """What is still held back. No token follows."""
        text = self._decode(self._tokens)
        return self._until(text, len(text))

    def _until(self, text: str, end: int) -> str:
        piece = text[self._sent : end]
        self._sent = max(self._sent, end)
        return piece


class StopStrings:
    """Cuts a text that comes in pieces before the first of some strings.

    Args:
        stops: none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def put(self, piece: str) -> str:
        """Add a piece. The text that belongs to the answer for certain. Nothing comes after a stop string."""
        if self.found:
            return ""
        text = self._held + piece
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def rest(self) -> str:
        """What was held back, and is no stop string. No piece follows."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of the text are the beginning of a stop string that is not complete."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class AnswerText:
    """The text of one answer: whole characters, up to a stop string.

    Args:
        decode: gives the text of token ids.
        stops: as in `StopStrings`.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str]) -> None:
        self._text, self._stops = TokenText(decode), StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stops.found

    def put(self, token: int) -> str:
        """Add a token. What can be sent."""
        return self._stops.put(self._text.put(token))

    def rest(self) -> str:
        """What can be sent when no token follows."""
        return self._stops.put(self._text.rest()) + self._stops.rest()
