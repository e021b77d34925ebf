"""What is refused before a request is read: a wrong host, no key, a body that is not JSON, too large or too slow.

The body is read here as a whole, so that no route has to think of its size. Nothing of a request is logged.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from softprompt_kernels.serve.engine import Failed

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Refuse = Callable[[Failed], App]

_LOG = logging.getLogger("softprompt_kernels.serve")
_SECONDS = 30  # in which a body must have come


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host of this name or address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Gate:
    """The outermost layer of the app.

    Args:
        app: what comes behind it.
        refuse: gives the answer to a request that is refused.
        key: that requests must have; None: none.
        only_loopback: whether the request must call the server by a name of this machine. A page in a browser may
            point a name of its own at 127.0.0.1, and would reach a server without a key.
        most_bytes: of a body.
    """

    def __init__(self, app: App, *, refuse: Refuse, key: str | None, only_loopback: bool, most_bytes: int) -> None:
        self._app, self._refuse, self._only_loopback, self._most_bytes = app, refuse, only_loopback, most_bytes
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = dict(scope["headers"])
            self._check_host(headers)
            if scope["path"] != "/health":
                self._check_key(headers)
            if scope["method"] == "POST":
                receive = _replayed(await self._body(headers, receive), receive)
            await self._app(scope, receive, send)
        except Failed as failed:
            await self._refuse(failed)(scope, receive, send)
        except asyncio.CancelledError:  # by uvicorn, at the end of the grace period
            _LOG.warning("a request was cut: its client did not send or read")

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
        if self._only_loopback and not is_loopback(name.strip("[]")):
            raise Failed(f"Host: got {host[:80]!r}, accepted are names of this machine, or start with an API key", 403)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"authorization", b"")
        if self._expected is not None and not hmac.compare_digest(given, self._expected):
            raise Failed("the API key is missing or wrong: send it as `Authorization: Bearer KEY`", 401)

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        kind = headers.get(b"content-type", b"").decode("latin-1")
        if kind.partition(";")[0].strip().lower() != "application/json":
            raise Failed(f"Content-Type: got {kind[:80]!r}, accepted is application/json", 400)
        too_large = Failed(f"the body is larger than {self._most_bytes} bytes, the most that is accepted", 413)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._most_bytes:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Failed("the client has gone", 400)
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._most_bytes:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Failed(f"the body did not come within {_SECONDS} seconds", 408) from None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` that gives the body first, and then what comes behind it: that the client has gone."""
    read = False

    async def again() -> MutableMapping[str, Any]:
        nonlocal read
        if read:
            return await receive()
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
