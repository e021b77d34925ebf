"""What an answer looks like: whole, or as chunks of a stream. The shapes are those of OpenAI's API.

chat         {"choices": [{"message": {...}}]}     chunks: {"choices": [{"delta": {...}}]}
plain text   {"choices": [{"text": ...}]}          chunks: the same
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from softprompt_kernels.models import TokenScore
from softprompt_kernels.serve.engine import Piece

DONE = b"data: [DONE]\n\n"


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    writable = [None if part is None else part.encode(errors="backslashreplace").decode() for part in (message, param)]
    return {"error": {"message": writable[0], "type": kind, "param": writable[1], "code": code}}


def event(body: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


@dataclass
class _Choice:
    """What was gathered of one answer. `length` counts the characters of scored tokens that were sent before."""

    text: list[str] = field(default_factory=list)
    tokens: list[tuple[int, TokenScore]] = field(default_factory=list)
    finish: str | None = None
    length: int = 0


class Reply:
    """The answers to one request.

    Args:
        chat: whether it is a chat.
        model: the name that the request called.
        answers: how many it asks for.
        prompt_tokens: of prompts and inputs together.
        cached_tokens: of the prompts, whose keys and values are there already.
        token_text: gives the text of a token.
    """

    def __init__(
        self,
        chat: bool,
        model: str,
        answers: int,
        prompt_tokens: int,
        cached_tokens: int,
        token_text: Callable[[int], str],
    ) -> None:
        self._chat, self._token_text = chat, token_text
        self._prompt_tokens, self._cached_tokens, self._new_tokens = prompt_tokens, cached_tokens, 0
        self._choices = [_Choice() for _ in range(answers)]
        self._left = answers
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    @property
    def finished(self) -> bool:
        """Whether all answers have ended."""
        return self._left == 0

    def add(self, pieces: Sequence[Piece]) -> None:
        """Gather pieces."""
        for piece in pieces:
            choice = self._choices[piece.choice]
            choice.text.append(piece.text)
            if piece.score is not None:
                choice.tokens.append((piece.token, piece.score))
            choice.finish = piece.finish
            self._new_tokens += 1
            self._left -= piece.finish is not None

    def whole(self) -> dict[str, Any]:
        """All that was gathered, as the answer of a request that does not stream."""
        choices = []
        for index, choice in enumerate(self._choices):
            text = "".join(choice.text)
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
            )
            choices.append(
                {"index": index, **content, "logprobs": self._logprobs(choice), "finish_reason": choice.finish}
            )
        return {**self._head, "object": self._object(False), "choices": choices, "usage": self._usage()}

    def opening(self, with_usage: bool) -> list[dict[str, Any]]:
        """The first chunks of a stream: a chat says who speaks."""
        if not self._chat:
            return []
        delta = {"role": "assistant", "content": "", "refusal": None}
        return [self._chunk(index, {"delta": delta}, None, None, with_usage) for index in range(len(self._choices))]

    def chunks(self, with_usage: bool) -> list[dict[str, Any]]:
        """What was gathered since the last call, as chunks: one for each answer that has something new."""
        found = []
        for index, choice in enumerate(self._choices):
            text = "".join(choice.text)
            if text or choice.tokens:
                content = {"delta": {"content": text}} if self._chat else {"text": text}
                found.append(self._chunk(index, content, self._logprobs(choice), None, with_usage))
            if choice.finish is not None:
                end: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
                found.append(self._chunk(index, end, None, choice.finish, with_usage))
            self._choices[index] = _Choice(
                length=choice.length + sum(len(self._token_text(token)) for token, _ in choice.tokens)
            )
        return found

    def closing(self) -> dict[str, Any]:
        """The last chunk, with the usage."""
        return {**self._head, "object": self._object(True), "choices": [], "usage": self._usage()}

    def _object(self, streamed: bool) -> str:
        if self._chat:
            return "chat.completion.chunk" if streamed else "chat.completion"
        return "text_completion"

    def _chunk(
        self, index: int, content: dict[str, Any], logprobs: Any, finish: str | None, with_usage: bool
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        usage = {"usage": None} if with_usage else {}
        return {**self._head, "object": self._object(True), "choices": [choice], **usage}

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._new_tokens,
            "total_tokens": self._prompt_tokens + self._new_tokens,
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens},
        }

    def _logprobs(self, choice: _Choice) -> dict[str, Any] | None:
        if not choice.tokens:
            return None
        if self._chat:
            content = [
                {**self._scored(token, score.logprob), "top_logprobs": [self._scored(*pair) for pair in score.top]}
                for token, score in choice.tokens
            ]
            return {"content": content, "refusal": None}
        texts = [self._token_text(token) for token, _ in choice.tokens]
        offsets, place = [], choice.length
        for text in texts:
            offsets.append(place)
            place += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [score.logprob for _, score in choice.tokens],
            "top_logprobs": [{self._token_text(token): p for token, p in score.top} for _, score in choice.tokens],
            "text_offset": offsets,
        }

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        """A token of a chat with its log-probability. Bytes that are no whole character are not known."""
        text = self._token_text(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}
