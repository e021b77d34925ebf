"""The socket, the signals and the end of the server.

The socket is bound before the model is loaded, so that a port in use is noticed at once. It takes connections when
everything is ready. At the first signal no more requests are taken, and running answers may end; after the grace period
they are cut with an error. A second Ctrl-C does not wait.
"""

from __future__ import annotations

import errno
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import DecodingBatch
from softprompt_kernels.models.families import attention_modules, head_size, text_config
from softprompt_kernels.serve.app import Options, make_app
from softprompt_kernels.serve.bank import Bank
from softprompt_kernels.serve.engine import Engine

_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass(frozen=True)
class Work:
    """How much the server does at a time.

    Args:
        batch_size: answers that are decoded together.
        queue: answers that may wait for that.
        grace_seconds: that running answers have to end after a signal.
    """

    batch_size: int = 32
    queue: int = 256
    grace_seconds: float = 10.0


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound, and does not listen yet.

    Args:
        host: a name or an address.
        port: 0 for any free one.

    Raises:
        SoftPromptError: the host is not known here, or the port is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise SoftPromptError(f"--host: got {host!r}, which is not known here ({error})") from error
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise _not_bound(host, port, error) from error
    return opened


def _not_bound(host: str, port: int, error: OSError) -> SoftPromptError:
    if error.errno == errno.EADDRINUSE:
        return SoftPromptError(f"--port: {port} of {host} is in use; choose another one, or 0 for any that is free")
    if error.errno == errno.EACCES:
        return SoftPromptError(f"--port: got {port}, which this user may not open, accepted are 1024 to 65535")
    return SoftPromptError(f"--host: cannot listen on port {port} of {host!r} ({error.strerror})")


def cache_bytes(bank: Bank, batch_size: int, tokens: int) -> int:
    """Bytes of the keys and values of a batch whose rows have so many tokens."""
    config = text_config(bank.model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    layers = sum(1 for _ in attention_modules(bank.model))
    return 2 * layers * heads * head_size(bank.model) * bank.model.dtype.itemsize * batch_size * tokens


class _Uvicorn(uvicorn.Server):
    """uvicorn that ends the engine first, and leaves the choice of an exit code to its caller."""

    def __init__(self, config: uvicorn.Config, engine: Engine, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine, self._grace, self._ready = engine, grace, ready
        self.stopped_by: int | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handles signals while the server runs. One that is ignored, as by nohup, stays so."""
        here = threading.current_thread() is threading.main_thread()
        ours = [number for number in _SIGNALS if here and signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in ours}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The handler."""
        if self.stopped_by is not None:
            self.force_exit = True
        self.stopped_by = self.stopped_by or sig
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take connections."""
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more of them, and let answers end."""
        self._engine.drain(self._grace)
        await super().shutdown(sockets)


class Server:
    """An endpoint on a socket.

    Args:
        bank: model and prompts.
        listener: from `open_socket`.
        options: what is accepted.
        work: how much is done at a time.
        access_log: whether each request gets a line on standard error.
        ready: called when connections are taken.
    """

    def __init__(
        self,
        bank: Bank,
        listener: socket.socket,
        options: Options,
        work: Work,
        *,
        access_log: bool = False,
        ready: Callable[[], None] = lambda: None,
    ) -> None:
        batch = DecodingBatch(bank.model, bank.prefix, work.batch_size, longest=options.most_tokens)
        self.engine = Engine(batch, bank.decode, work.queue)
        self._listener = listener
        config = uvicorn.Config(
            make_app(bank, self.engine, options),
            log_config=None,
            log_level="warning",
            access_log=access_log,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(work.grace_seconds) + 2,
        )
        if access_log:
            log = logging.getLogger("uvicorn.access")
            log.setLevel(logging.INFO)
            log.handlers = [logging.StreamHandler()]
        self._uvicorn = _Uvicorn(config, self.engine, work.grace_seconds, ready)

    @property
    def address(self) -> str:
        """Where it is, as a client's `base_url`."""
        host, port = self._listener.getsockname()[:2]
        return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"

    def run(self) -> int | None:
        """Serve until `stop` or a signal, whose number is returned.

        Raises:
            SoftPromptError: another program has taken the port meanwhile.
        """
        try:
            self._listener.listen(2048)
        except OSError as error:
            host, port = self._listener.getsockname()[:2]
            raise _not_bound(host, port, error) from error
        self.engine.start()
        try:
            self._uvicorn.run(sockets=[self._listener])
        finally:
            self.engine.drain(0)
            self.engine.join(5)
            self._listener.close()
        return self._uvicorn.stopped_by

    def stop(self) -> None:
        """End `run`, which is in another thread."""
        self._uvicorn.should_exit = True


@contextmanager
def serving(bank: Bank, options: Options | None = None, work: Work | None = None, port: int = 0) -> Iterator[Server]:
    """A server on 127.0.0.1 in a thread of this process, for programs and notebooks. It ends with the context.

    Args:
        bank: from `load_bank`.
        options, work: limits; None: the usual ones.
        port: 0 for any that is free.

    Raises:
        SoftPromptError: the port is in use.
    """
    ready = threading.Event()
    listener = open_socket("127.0.0.1", port)
    server = Server(bank, listener, options or Options(), work or Work(), ready=ready.set)
    failures: list[Exception] = []

    def run() -> None:
        try:
            server.run()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run, name="softprompt serve", daemon=True)
    thread.start()
    while not ready.wait(0.1) and thread.is_alive():
        pass
    if failures:
        raise failures[0]
    try:
        yield server
    finally:
        server.stop()
        thread.join()
