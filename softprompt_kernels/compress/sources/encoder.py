"""Text to tokens with their places, so that a chat can be encoded whole and cut afterwards.

Encoding the pieces of a chat one by one gives other tokens than encoding the chat: a tokenizer may put a blank before
the first word it gets, or merge characters across a cut. So the whole is encoded, and the tokens of a piece are those
that lie in it.

Parts of the text may be declared plain: what a user wrote. Names of control tokens there, such as `<|im_end|>`, are
text like any other. Control tokens are the special ones, and the added ones that the chat template writes.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.errors import SoftPromptError


@dataclass(frozen=True)
class Tokens:
    """Tokens and their places.

    Args:
        ids: of the tokens.
        spans: the characters `[start, end)` of each token. Tokens of one character share its place.
    """

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def cut(self, place: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The tokens before and behind a place; None if a token reaches across it."""
        first = next((index for index, (start, _) in enumerate(self.spans) if start >= place), len(self.ids))
        if any(end > place for _, end in self.spans[:first]):
            return None
        return self.ids[:first], self.ids[first:]

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.ids + other.ids, self.spans + other.spans)

    def shifted(self, by: int) -> Tokens:
        """The same tokens, `by` characters later."""
        return Tokens(self.ids, tuple((start + by, end + by) for start, end in self.spans))


class Encoder:
    """Encodes texts with one tokenizer. The tokenizer is copied, and never changed.

    Args:
        tokenizer: one that is backed by the tokenizers library.
        template: the source of its chat template, or "".

    Raises:
        SoftPromptError: another kind of tokenizer, which does not know the places of its tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise SoftPromptError(
                f"tokenizer: got {type(tokenizer).__name__}, which does not say where its tokens are in the text; "
                "accepted is one with a tokenizer.json"
            )
        # Private characters, drawn anew each time: no text has them. They are a control token to put before a text, and
        # they hide the names of others.
        self._mark = "".join(chr(0xE000 + byte) for byte in secrets.token_bytes(12))
        self._saved = backend.to_str()
        self._control = {
            index: token.content
            for index, token in backend.get_added_tokens_decoder().items()
            if token.special or (token.content in template and not token.content.isspace())
        }
        self._backend = self._prepared(self._saved)

    def encode(self, text: str, *plain: tuple[int, int]) -> Tokens:
        """The tokens of a whole text. In its plain parts no control token is recognised.

        Args:
            text: to be encoded.
            plain: the characters `[start, end)` of each plain part, from left to right. An empty one is none.
        """
        found = _tokens(self._backend, text)
        if not any(self._has_control(text, found, part) for part in plain):
            return found
        # Texts between control tokens are encoded each on its own anyway. So those around the plain parts are encoded
        # by a tokenizer that knows no control tokens, and what is left and right of them by the other.
        tokens, place = Tokens((), ()), 0
        for left, right in self._around([(start, end) for start, end in plain if start < end], text):
            tokens += self._between(self._backend, text, place, left) + self._between(self._plain, text, left, right)
            place = right
        return tokens + self._between(self._backend, text, place, len(text))

    def encode_behind(self, text: str, *plain: tuple[int, int]) -> Tokens:
        """The tokens of a text that does not start the chat, encoded without what is before it."""
        moved = [(start + len(self._mark), end + len(self._mark)) for start, end in plain]
        found = self.encode(self._mark + text, *moved)
        return Tokens(found.ids[1:], found.spans[1:]).shifted(-len(self._mark))

    def first_control(self, tokens: Tokens, place: int) -> int | None:
        """The number of the first control token at or behind a place; None if there is none."""
        pairs = enumerate(zip(tokens.ids, tokens.spans, strict=True))
        return next((n for n, (index, (start, _)) in pairs if start >= place and index in self._control), None)

    def controls(self, tokens: Tokens, start: int = 0, end: int = sys.maxsize) -> list[int]:
        """The control tokens in the characters `[start, end)`."""
        return [index for index, (begin, _) in self._control_places(tokens) if start <= begin < end]

    def _around(self, plain: Sequence[tuple[int, int]], text: str) -> list[tuple[int, int]]:
        """The texts between control tokens that have plain parts: each start and end, from left to right."""
        edges = [0, *(edge for part in plain for edge in part), len(text)]
        found, left = [], 0
        for number, (start, end) in enumerate(zip(edges[::2], edges[1::2], strict=True)):  # what is not plain
            places = [span for _, span in self._control_places(self._between(self._backend, text, start, end))]
            if number and (places or end == len(text)):
                found.append((left, places[0][0] if places else len(text)))
            if places:
                left = places[-1][1]
        return found

    def _between(self, backend: Tokenizer, text: str, start: int, end: int) -> Tokens:
        """The tokens of `text[start:end]`, which starts the text or stands behind a control token."""
        if start == 0:
            return _tokens(backend, text[:end])
        found = _tokens(backend, self._mark + text[start:end])
        return Tokens(found.ids[1:], found.spans[1:]).shifted(start - len(self._mark))

    def _has_control(self, text: str, tokens: Tokens, plain: tuple[int, int]) -> bool:
        for index, (start, end) in self._control_places(tokens):
            piece = text[start:end]
            # Some tokens take the blanks beside them along, which may be the user's.
            first, last = start + len(piece) - len(piece.lstrip()), end - len(piece) + len(piece.rstrip())
            # The token of unknown characters is not written, and stands for others than its name.
            written = piece.strip().casefold() == self._control[index].strip().casefold()
            if written and first < plain[1] and last > plain[0]:
                return True
        return False

    def _control_places(self, tokens: Tokens) -> list[tuple[int, tuple[int, int]]]:
        return [(i, span) for i, span in zip(tokens.ids, tokens.spans, strict=True) if i in self._control]

    @cached_property
    def _plain(self) -> Tokenizer:
        """The tokenizer without its control tokens."""
        saved: dict[str, Any] = json.loads(self._saved)
        names = set(self._control.values())
        hidden = {name: self._mark + name for name in names}
        for token in saved["added_tokens"]:  # renamed, not removed: the ids of the others count on them
            token["content"] = hidden.get(token["content"], token["content"])
        model = saved["model"]
        if isinstance(model.get("vocab"), dict):
            model["vocab"] = {hidden.get(token, token): index for token, index in model["vocab"].items()}
        elif isinstance(model.get("vocab"), list):
            model["vocab"] = [[hidden.get(token, token), score] for token, score in model["vocab"]]
        if model.get("unk_token"):
            model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
        if model.get("merges"):
            pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
            model["merges"] = [pair for pair in pairs if not names & {*pair, "".join(pair)}]
        saved["post_processor"] = None
        return self._prepared(json.dumps(saved))

    def _prepared(self, saved: str) -> Tokenizer:
        """A copy that gives the whole text, with the places before any trimming, and that knows the mark."""
        backend = Tokenizer.from_str(saved)
        backend.no_truncation()
        backend.no_padding()
        backend.post_processor = None
        backend.encode_special_tokens = False
        backend.add_special_tokens([AddedToken(self._mark, special=True, normalized=False)])
        return backend


def _tokens(backend: Tokenizer, text: str) -> Tokens:
    found = backend.encode(text, add_special_tokens=False)
    return Tokens(tuple(found.ids), tuple(found.offsets))
