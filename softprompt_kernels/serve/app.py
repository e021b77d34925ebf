"""The routes: chats, plain text, the list of models, and whether the server lives.

A request passes the gate, is checked by its schema, becomes tokens on a worker thread, and waits in the engine. Its
answer is sent whole or as a stream. If the client goes away, the request is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from softprompt_kernels.compress.sources.model import check_ids
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.serve.bank import Bank, Served
from softprompt_kernels.serve.engine import Engine, Failed, Job, Ticket
from softprompt_kernels.serve.gate import Gate
from softprompt_kernels.serve.protocol import ChatRequest, CompletionRequest, Message, message_of
from softprompt_kernels.serve.replies import DONE, Reply, error_body, event

_LOG = logging.getLogger("softprompt_kernels.serve")
_COMPLETION_TOKENS = 16  # OpenAI's default for plain text
MOST_ANSWERS = 16


@dataclass(frozen=True)
class Options:
    """What the server accepts.

    Args:
        key: that requests must have; None: none.
        only_loopback: as in `Gate`.
        most_bytes: of a request's body.
        most_tokens: of an input and its answer together, without the prompt.
        system: what to do with system messages: "refuse" them, or "join" them to the user's first message. There is no
            turn for them, because the prompt stands where the context stood.
    """

    key: str | None = None
    only_loopback: bool = True
    most_bytes: int = 2**20
    most_tokens: int = 2048
    system: Literal["refuse", "join"] = "refuse"


def make_app(bank: Bank, engine: Engine, options: Options) -> FastAPI:
    """The ASGI application. The engine must have been started.

    Args:
        bank: model and prompts.
        engine: decodes behind the bank's prefix.
        options: limits and the key.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(
        Gate,
        refuse=_refusal,
        key=options.key,
        only_loopback=options.only_loopback,
        most_bytes=options.most_bytes,
    )
    service = _Service(bank, engine, options)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        return await service.answer(body, request)

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await service.answer(body, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [service.described(each) for each in bank.served.values()]})

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return JSONResponse(service.described(service.find(name)))

    @app.get("/health")
    async def health() -> Response:
        running, waiting = engine.counts
        status, code = ("ok", 200) if engine.alive else ("shutting down", 503)
        return JSONResponse({"status": status, "running": running, "waiting": waiting}, code)

    @app.exception_handler(Failed)
    async def failed(_: Request, error: Failed) -> Response:
        return _refusal(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        message, param = message_of(error.errors())
        return _refusal(Failed(message, 400, param=param))

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        shown = f"{request.method} {request.url.path[:80]}: {error.detail}"
        return JSONResponse(error_body(shown, error.status_code), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, __: Exception) -> Response:
        return _refusal(Failed("internal error, the server's log says why", 500))

    return app


def _refusal(failed: Failed) -> JSONResponse:
    headers = {} if failed.retry_after is None else {"Retry-After": str(failed.retry_after)}
    if failed.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    body = error_body(str(failed), failed.status, failed.param, failed.code)
    return JSONResponse(body, failed.status, headers)


@dataclass(frozen=True)
class _Input:
    """Token ids behind a row of the bank."""

    ids: Sequence[int]
    row: int


class _Service:
    """Turns requests into jobs, and what the engine gives into answers."""

    def __init__(self, bank: Bank, engine: Engine, options: Options) -> None:
        self._bank, self._engine, self._options = bank, engine, options
        self._worker = ThreadPoolExecutor(1, "softprompt tokens")
        self._preparing = 0
        self._since = int(time.time())

    def described(self, served: Served) -> dict[str, Any]:
        """A model as the list of models has it."""
        return {
            "id": served.name,
            "object": "model",
            "created": self._since,
            "owned_by": "softprompt-kernels",
            "prompt_tokens": served.tokens,
            "max_tokens": self._room(served.chat_row),
        }

    def find(self, name: str) -> Served:
        """What is served under a name.

        Raises:
            Failed: nothing is (404).
        """
        if name not in self._bank.served:
            names = list(self._bank.served)
            shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
            raise Failed(f"model: got {name[:80]!r}, served are {shown}", 404, param="model", code="model_not_found")
        return self._bank.served[name]

    async def answer(self, body: ChatRequest | CompletionRequest, request: Request) -> Response:
        """The response to a request of either kind.

        Raises:
            Failed: it cannot be answered.
        """
        served = self.find(body.model)
        try:
            inputs = await self._on_worker(lambda: self._inputs(body, served))
            jobs = self._jobs(body, served, inputs)
        except Failed:
            raise
        except Exception as error:
            _LOG.exception("a request could not be read", exc_info=error)
            raise Failed("internal error: the request could not be read, the server's log says why", 500) from error
        cached = sum(self._length(each.row) for each in inputs)
        ticket = self._engine.submit(jobs)
        is_chat = isinstance(body, ChatRequest)
        tokens = cached + sum(len(each.ids) for each in inputs)
        reply = Reply(is_chat, served.name, len(jobs), tokens, cached, self._bank.token_text)
        if body.stream:
            return _Stream(_events(ticket, reply, body.usage_in_stream), lambda: self._engine.cancel(ticket))
        return JSONResponse(await self._whole(request, ticket, reply))

    async def _whole(self, request: Request, ticket: Ticket, reply: Reply) -> dict[str, Any]:
        """Wait for all answers, or until the client has gone."""

        async def until_gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            ticket.put([Failed("the client has gone", 499)])

        watch = asyncio.create_task(until_gone())
        try:
            while not reply.finished:
                reply.add(await ticket.next())
            return reply.whole()
        finally:
            watch.cancel()
            self._engine.cancel(ticket)

    async def _on_worker(self, work: Callable[[], list[_Input]]) -> list[_Input]:
        """Run work on the thread that makes tokens. A long text takes long, and others must not wait for it here."""
        if self._preparing >= self._engine.capacity:
            raise Failed("too many requests at a time", 429, 1)
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, work)
        finally:
            self._preparing -= 1

    def _inputs(self, body: ChatRequest | CompletionRequest, served: Served) -> list[_Input]:
        name = "messages" if isinstance(body, ChatRequest) else "prompt"
        try:
            if isinstance(body, ChatRequest):
                turns = self._turns(body.messages)
                inputs = [_Input(served.chat.conversation_ids(turns), served.chat_row)]
            else:
                inputs = [_Input(self._text_ids(each, served), served.text_row) for each in body.prompt]
            for each in inputs:
                check_ids(self._bank.model, self._bank.tokenizer, each.ids, name)
        except SoftPromptError as error:
            raise Failed(str(error), 400, param=name) from error
        return inputs

    def _text_ids(self, prompt: str | list[int], served: Served) -> list[int]:
        if isinstance(prompt, str):
            prompt = self._bank.text_ids(prompt, served)
        elif not all(0 <= token < self._bank.vocabulary for token in prompt):
            raise SoftPromptError(f"prompt: accepted are token ids from 0 to {self._bank.vocabulary - 1}")
        if not prompt:
            raise SoftPromptError("prompt: got no tokens, accepted is at least one")
        return prompt

    def _turns(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        """The turns that the chat format takes: of user and assistant."""
        turns = [{"role": each.role.replace("developer", "system"), "content": each.text} for each in messages]
        system = [turn["content"] for turn in turns if turn["role"] == "system"]
        if self._options.system == "join" and system:
            turns = [turn for turn in turns if turn["role"] != "system"]
            if turns:
                turns[0] = {**turns[0], "content": "\n\n".join([*system, turns[0]["content"]])}
        elif system:
            raise SoftPromptError(
                "messages: got a system message, accepted are those of user and assistant: the prompt stands where a "
                "system message does. Say it in the first user message, or start the server with --system join"
            )
        return turns

    def _jobs(self, body: ChatRequest | CompletionRequest, served: Served, inputs: Sequence[_Input]) -> list[Job]:
        choices, most = body.n or 1, min(MOST_ANSWERS, self._engine.capacity)
        if choices * len(inputs) > most:
            raise Failed(
                f"n: got {choices} answers to {len(inputs)} inputs, accepted are {most} together", 400, param="n"
            )
        seed = secrets.randbits(63) if body.seed is None else body.seed % 2**64
        jobs = []
        for number, each in enumerate(inputs):
            limit = self._limit(body, each)
            jobs += [
                Job(
                    tuple(each.ids),
                    each.row,
                    limit,
                    1.0 if body.temperature is None else body.temperature,
                    1.0 if body.top_p is None else body.top_p,
                    (seed, number, choice),
                    served.ends,
                    tuple(body.stop or ()),
                    body.scores,
                )
                for choice in range(choices)
            ]
        return jobs

    def _limit(self, body: ChatRequest | CompletionRequest, given: _Input) -> int:
        """How many tokens an answer may have.

        Raises:
            Failed: the input is too long, or with the answer that is asked for.
        """
        asked, default = body.max_tokens, _COMPLETION_TOKENS
        room = self._room(given.row)
        left = room - len(given.ids)
        if isinstance(body, ChatRequest):
            default = left
            if body.max_completion_tokens is not None:
                if asked not in (None, body.max_completion_tokens):
                    raise Failed("max_tokens: got another number than max_completion_tokens, accepted is one", 400)
                asked = body.max_completion_tokens
        if left < 1 or (asked or 1) > left:
            raise Failed(
                f"the request is too long: {len(given.ids)} tokens and {asked or 1} new ones, accepted are {room} "
                "together behind this prompt",
                400,
                param="max_tokens" if left >= 1 else "messages" if isinstance(body, ChatRequest) else "prompt",
                code="context_length_exceeded",
            )
        return min(default, left) if asked is None else asked

    def _room(self, row: int) -> int:
        """Tokens of input and answer that are accepted behind a row of the bank."""
        return min(self._options.most_tokens, self._engine.room(row))

    def _length(self, row: int) -> int:
        """Tokens of a row of the bank."""
        prefix = self._bank.prefix
        return 0 if prefix is None or prefix.lengths is None else int(prefix.lengths[row])


async def _events(ticket: Ticket, reply: Reply, with_usage: bool) -> AsyncIterator[bytes]:
    """The events of a stream."""
    for chunk in reply.opening(with_usage):
        yield event(chunk)
    try:
        while not reply.finished:
            reply.add(await ticket.next())
            if chunks := reply.chunks(with_usage):
                yield b"".join(map(event, chunks))
        if with_usage:
            yield event(reply.closing())
    except Failed as failed:
        yield event(error_body(str(failed), failed.status))
    yield DONE


class _Stream(StreamingResponse):
    """A stream of events that says when it is over, for whatever reason."""

    def __init__(self, events: AsyncIterator[bytes], over: Callable[[], None]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. It ends early when the client has gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()
