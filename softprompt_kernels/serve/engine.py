"""The thread that owns the model. Requests wait in a queue, join the batch when it has room, and get text at each step.

    submit → waiting (bounded) → join → step, step, ... → an end token, a stop string, the limit, or cancelled

One turn of the thread: take cancelled answers out, let waiting ones join (as many as `DecodingBatch.fitting` says),
then one step for all. What the step gave goes to the event loop of each request in one call. An answer that fails ends
alone. If a step fails, all answers in the batch end with an error, and the thread goes on with the next ones.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from softprompt_kernels.errors import is_out_of_memory
from softprompt_kernels.models import DecodingBatch, DecodingRow, TokenScore
from softprompt_kernels.models.finite import not_finite
from softprompt_kernels.serve.text import AnswerText

_LOG = logging.getLogger("softprompt_kernels.serve")
_KEPT_COLUMNS = 512  # tokens of a row: a cache of longer ones is given back when nothing runs


@dataclass(frozen=True)
class Job:
    """One answer that a request asks for.

    Args:
        input: token ids behind the prompt.
        prompt: the row of the bank.
        max_tokens: the answer ends after so many.
        temperature, top_p, seed, top_scores: as in `DecodingRow`.
        ends: tokens that end the answer.
        stops: strings that end the answer before them.
    """

    input: tuple[int, ...]
    prompt: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: tuple[int, ...]
    ends: frozenset[int]
    stops: tuple[str, ...] = ()
    top_scores: int | None = None


@dataclass(frozen=True)
class Piece:
    """What one step adds to an answer.

    Args:
        choice: the number of the answer in its request.
        text: may be empty.
        token: the new token.
        score: of the token, if the job asks for it.
        finish: why the answer ends with this piece, "stop" or "length"; None if it does not.
    """

    choice: int
    text: str
    token: int
    score: TokenScore | None
    finish: str | None


class Failed(Exception):
    """A request that gets no answer, or no more of it.

    Args:
        message: for the client.
        status: of HTTP.
        retry_after: seconds after which it may be sent again; None if that does not help.
        param, code: the parameter at fault, and OpenAI's name of the error; None if there is none.
    """

    def __init__(
        self,
        message: str,
        status: int,
        retry_after: int | None = None,
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after, self.param, self.code = status, retry_after, param, code


class Ticket:
    """A request in the engine, for the task that submitted it.

    Args:
        loop: the event loop of that task.
        answers: how many it asks for.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, answers: int) -> None:
        self.loop, self.answers = loop, answers
        self._events: asyncio.Queue[Piece | Failed] = asyncio.Queue()

    def put(self, events: Iterable[Piece | Failed]) -> None:
        """Hand events to the task. Only for the thread of its loop."""
        for event in events:
            self._events.put_nowait(event)

    async def next(self) -> list[Piece]:
        """The pieces that there are, in their order; waits for the first.

        Raises:
            Failed: the request ends here.
        """
        pieces: list[Piece] = []
        event = await self._events.get()
        while True:
            if isinstance(event, Failed):
                raise event
            pieces.append(event)
            if self._events.empty():
                return pieces
            event = self._events.get_nowait()


class _Answer:
    """One answer in the engine."""

    def __init__(self, job: Job, ticket: Ticket, choice: int, decode: Callable[[list[int]], str]) -> None:
        self.job, self.ticket, self.choice = job, ticket, choice
        self.row = DecodingRow(job.input, job.prompt, job.seed, job.temperature, job.top_p, job.top_scores)
        self.text = AnswerText(decode, job.stops)
        self.finished = False

    def advance(self) -> Piece:
        """What the row's last token adds."""
        row, job = self.row, self.job
        token = row.tokens[-1]
        finish = None
        if token in job.ends:
            text, finish = self.text.rest(), "stop"
        else:
            text = self.text.put(token)
            if self.text.stopped:
                finish = "stop"
            elif len(row.tokens) >= job.max_tokens:
                text, finish = text + self.text.rest(), "length"
        self.finished = finish is not None
        return Piece(self.choice, text, token, row.scores[-1] if row.scores else None, finish)


class Engine:
    """Decodes the answers of many requests together, on a thread of its own.

    Args:
        batch: empty; used by the thread alone from `start` on.
        decode: gives the text of token ids; called on the thread.
        queue: how many answers may wait for room in the batch.
    """

    def __init__(self, batch: DecodingBatch, decode: Callable[[list[int]], str], queue: int) -> None:
        self._batch, self._decode, self._queue = batch, decode, queue
        self._changed = threading.Condition()
        self._waiting: deque[_Answer] = deque()
        self._running: list[_Answer] = []
        self._cancelled: set[Ticket] = set()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._work, name="softprompt engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread takes requests."""
        return self._thread.is_alive() and self._deadline is None

    @property
    def counts(self) -> tuple[int, int]:
        """Answers in the batch, and answers that wait for room in it."""
        return len(self._running), len(self._waiting)

    def room(self, prompt: int) -> int:
        """As `DecodingBatch.room`."""
        return self._batch.room(prompt)

    @property
    def capacity(self) -> int:
        """Answers that there may be at a time, waiting or not."""
        return self._batch.size + self._queue

    def submit(self, jobs: Sequence[Job]) -> Ticket:
        """Queue the answers of one request. To be called in an event loop, which gets what they become.

        Raises:
            Failed: there is no room in the queue (429), or the server ends (503).
        """
        ticket = Ticket(asyncio.get_running_loop(), len(jobs))
        with self._changed:
            if not self.alive:
                raise Failed("the server is shutting down", 503, 10)
            if len(self._running) + len(self._waiting) + len(jobs) > self.capacity:
                raise Failed(f"too many requests: {self.capacity} answers are in work or wait already", 429, 1)
            self._waiting += (_Answer(job, ticket, choice, self._decode) for choice, job in enumerate(jobs))
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Give up a request, finished or not. Its places in queue and batch are free before the next step."""
        with self._changed:
            self._waiting = deque(answer for answer in self._waiting if answer.ticket is not ticket)
            self._cancelled.add(ticket)
            self._changed.notify()

    def drain(self, seconds: float) -> None:
        """Take no more requests, and end. Answers that are not finished after `seconds` are cut."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()

    def join(self, seconds: float) -> None:
        """Wait at most `seconds` for the thread to end, after `drain`."""
        self._thread.join(seconds)

    def _work(self) -> None:
        while True:
            try:
                if not self._has_work():
                    return
                self._turn()
            except Exception as error:  # a bug must not end the server
                self._lose_batch(error)

    def _has_work(self) -> bool:
        """Waits for work. False: the engine ends."""
        with self._changed:
            while True:
                if self._cancelled:
                    gone = [answer for answer in self._running if answer.ticket in self._cancelled]
                    self._cancelled.clear()
                    self._remove(gone)
                left = None if self._deadline is None else self._deadline - time.monotonic()
                if left is not None and (left <= 0 or not (self._waiting or self._running)):
                    self._fail([*self._running, *self._waiting], Failed("the server is shutting down", 503, 10))
                    self._waiting.clear()
                    self._remove(self._running)
                    return False
                if self._waiting or self._running:
                    return True
                if self._batch.cache.columns > _KEPT_COLUMNS:
                    self._batch.clear()
                self._changed.wait(left)

    def _turn(self) -> None:
        with self._changed:
            count = self._batch.fitting(answer.row for answer in self._waiting)
            new = [self._waiting.popleft() for _ in range(count)]
            self._running += new
        if new:
            self._join(new)
            self._publish(new)
        if self._batch.rows:
            try:
                self._batch.step()
            except Exception as error:
                self._lose_batch(error)
            self._publish(self._running)

    def _join(self, new: Sequence[_Answer]) -> None:
        """Let answers join the batch. If that fails, each is tried alone, so that only the one at fault ends.

        Raises:
            Exception: the cache could not grow, and all answers in the batch are lost.
        """
        try:
            self._batch.join([answer.row for answer in new])
        except Exception as error:
            if not self._batch.cache.whole:
                raise  # what the answers in the batch have there is lost
            if len(new) > 1:
                for answer in new:
                    self._join([answer])
                return
            _LOG.exception("an answer could not begin", exc_info=error)
            self._fail(new, _failure(error))
            self._remove(new)

    def _publish(self, answers: Sequence[_Answer]) -> None:
        """Send what the last step gave these answers, and take out those that have ended."""
        ended: list[_Answer] = []
        events: list[tuple[Ticket, Piece | Failed]] = []
        for answer in answers:
            if not answer.row.tokens and not answer.row.failed:
                continue  # it could not join, and has been told so
            try:
                if answer.row.failed:
                    raise not_finite(self._batch.model, f"logits after {len(answer.row.tokens)} new tokens")
                events.append((answer.ticket, answer.advance()))
                if answer.finished:
                    ended.append(answer)
            except Exception as error:
                _LOG.exception("an answer failed", exc_info=error)
                events.append((answer.ticket, _failure(error)))
                ended.append(answer)
        self._remove(ended)
        _hand_over(events)

    def _remove(self, answers: Sequence[_Answer]) -> None:
        if answers:
            self._batch.leave(answer.row for answer in answers)
            gone = {id(answer) for answer in answers}
            self._running = [answer for answer in self._running if id(answer) not in gone]

    def _lose_batch(self, error: Exception) -> None:
        """End all answers in the batch, and begin with an empty one."""
        _LOG.exception("all answers in the batch were lost", exc_info=error)
        lost, self._running = self._running, []
        self._batch.clear()
        self._fail(lost, _failure(error))

    def _fail(self, answers: Sequence[_Answer], failure: Failed) -> None:
        _hand_over([(answer.ticket, failure) for answer in answers])


def _failure(error: Exception) -> Failed:
    """What the client is told. The log has the rest."""
    if is_out_of_memory(error):
        return Failed("the server is out of memory", 503, 10)
    return Failed("internal error: the answer could not be computed, the server's log says why", 500)


def _hand_over(events: Sequence[tuple[Ticket, Piece | Failed]]) -> None:
    """Give events to the tasks that wait for them, with one call for each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Piece | Failed]]] = {}
    for ticket, event in events:
        loops.setdefault(ticket.loop, []).append((ticket, event))
    for loop, of_loop in loops.items():
        try:
            loop.call_soon_threadsafe(_put_all, of_loop)
        except RuntimeError:  # the loop is closed: nobody waits any more
            _LOG.debug("an event loop is gone")


def _put_all(events: Sequence[tuple[Ticket, Piece | Failed]]) -> None:
    for ticket, event in events:
        ticket.put([event])
