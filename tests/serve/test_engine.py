"""The engine without a network: places are freed, the queue is bounded, and one failure is not that of others."""

import asyncio
from collections.abc import Iterator

import pytest

from softprompt_kernels.models import DecodingBatch
from softprompt_kernels.models.decode.rows import OwnRows
from softprompt_kernels.serve.engine import Engine, Failed, Job, Ticket

TOKENS = 12


@pytest.fixture
def batch(bank) -> DecodingBatch:
    return DecodingBatch(bank.model, bank.prefix, 3)


@pytest.fixture
def engine(bank, batch) -> Iterator[Engine]:
    made = Engine(batch, bank.decode, queue=4)
    made.start()
    yield made
    made.drain(0)
    made.join(10)
    assert not made.alive


def job(number: int = 0, tokens: int = TOKENS, **changes) -> Job:
    settings = {"temperature": 0.0, "top_p": 1.0, "seed": (0,), "ends": frozenset()} | changes
    return Job((65 + number, 66, 67), 1 + number % 3, tokens, **settings)


async def text_of(ticket: Ticket) -> str:
    text, left = [""] * ticket.answers, ticket.answers
    while left:
        for piece in await ticket.next():
            text[piece.choice] += piece.text
            left -= piece.finish is not None
    return "|".join(text)


async def empty(engine: Engine) -> None:
    """Wait until nothing runs or waits."""
    async with asyncio.timeout(20):
        while any(engine.counts):
            await asyncio.sleep(0.002)


def test_answers_that_wait_get_what_they_get_alone(engine):
    async def run() -> None:
        alone = [await text_of(engine.submit([job(number)])) for number in range(7)]
        together = await asyncio.gather(*(text_of(engine.submit([job(number)])) for number in range(7)))
        assert together == alone
        assert len(set(alone)) > 3
        both = await text_of(engine.submit([job(0), job(1, 5)]))
        assert both.partition("|")[0] == alone[0] and alone[1].startswith(both.partition("|")[2][:-1])

    asyncio.run(run())


def test_a_full_queue_is_refused_and_a_cancelled_request_frees_its_places(engine, batch):
    async def run() -> None:
        tickets = [engine.submit([job(number, 120)]) for number in range(7)]
        with pytest.raises(Failed, match="too many requests: 7 answers") as refused:
            engine.submit([job()])
        assert (refused.value.status, refused.value.retry_after) == (429, 1)
        await tickets[0].next()
        rows = list(batch.rows)
        engine.cancel(tickets[0])
        engine.cancel(tickets[-1])  # one that waits
        async with asyncio.timeout(10):
            while sum(engine.counts) > 5:
                await asyncio.sleep(0.002)
        assert any(len(row.tokens) < 120 and row not in batch.rows for row in rows), "it was not waited for"
        assert await text_of(engine.submit([job(), job()]))
        for ticket in tickets:
            engine.cancel(ticket)
        await empty(engine)

    asyncio.run(run())


def test_an_end_token_and_a_stop_string_end_an_answer(engine, bank):
    async def run() -> None:
        pieces = []
        ticket = engine.submit([job()])
        while len(pieces) < TOKENS:
            pieces += await ticket.next()
        assert [piece.finish for piece in pieces] == [None] * (TOKENS - 1) + ["length"]
        token = pieces[3].token
        first = next(index for index, piece in enumerate(pieces) if piece.token == token)
        ended = []
        ticket = engine.submit([job(ends=frozenset([token]))])
        while not ended or ended[-1].finish is None:
            ended += await ticket.next()
        assert [piece.token for piece in ended] == [piece.token for piece in pieces[: first + 1]]
        assert ended[-1].finish == "stop"
        whole = "".join(piece.text for piece in pieces)
        stopped = await text_of(engine.submit([job(stops=(whole[2:4],))]))
        assert stopped == whole[: whole.index(whole[2:4])]

    asyncio.run(run())


def test_an_answer_that_cannot_begin_fails_alone(engine, batch, monkeypatch):
    join = batch.join

    def refusing(rows) -> None:
        if any(row.input[0] == 66 for row in rows):
            raise RuntimeError("broken")
        join(rows)

    monkeypatch.setattr(batch, "join", refusing)

    async def run() -> None:
        found = await asyncio.gather(
            *(text_of(engine.submit([job(number)])) for number in range(3)), return_exceptions=True
        )
        assert [type(each) for each in found] == [str, Failed, str]
        assert found[1].status == 500 and "broken" not in str(found[1])
        await empty(engine)

    asyncio.run(run())


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("broken"), 500), (MemoryError(), 503)])
def test_a_step_that_fails_ends_its_answers_and_later_ones_are_right(engine, batch, monkeypatch, error, status):
    step, failing = batch.step, [False]

    def sometimes() -> None:
        if failing.pop() if failing else False:
            raise error
        step()

    monkeypatch.setattr(batch, "step", sometimes)

    async def run() -> None:
        expected = await text_of(engine.submit([job()]))
        failing.append(True)
        with pytest.raises(Failed) as failed:
            await text_of(engine.submit([job()]))
        assert failed.value.status == status
        assert batch.free == batch.size
        assert await text_of(engine.submit([job()])) == expected
        await empty(engine)

    asyncio.run(run())


def test_a_cache_that_could_not_grow_is_not_used_again(engine, batch, monkeypatch):
    """It grows layer by layer. If the memory ends at the second, the rows of the batch no longer fit together."""
    make, calls = OwnRows._empty, []

    def ending(cache, like):
        calls.append(len(cache.layers))
        if len(calls) == 3:
            raise MemoryError
        return make(cache, like)

    async def run() -> None:
        expected = await text_of(engine.submit([job()]))
        running = engine.submit([job(0, 100)])
        await running.next()
        monkeypatch.setattr(OwnRows, "_empty", ending)
        long = engine.submit([Job((65,) * 400, 0, 10, 0.0, 1.0, (0,), frozenset())])
        for ticket in (running, long):
            with pytest.raises(Failed) as failed:
                await text_of(ticket)
            assert failed.value.status == 503
        assert len(calls) == 3 and batch.free == batch.size
        assert await text_of(engine.submit([job()])) == expected

    asyncio.run(run())


def test_logits_that_are_not_finite_end_one_answer(engine, bank, monkeypatch):
    monkeypatch.setattr(engine._batch, "prefix", bank.prefix.to())
    layers = [(key.clone(), value.clone()) for key, value in bank.prefix.layers]
    layers[0][1][1] = float("nan")
    object.__setattr__(engine._batch.prefix, "layers", tuple(layers))

    async def run() -> None:
        found = await asyncio.gather(
            *(text_of(engine.submit([job(number)])) for number in range(3)), return_exceptions=True
        )
        assert [type(each) for each in found] == [Failed, str, str]

    asyncio.run(run())


def test_a_long_cache_is_given_back_when_nothing_runs(engine, batch, monkeypatch):
    monkeypatch.setattr("softprompt_kernels.serve.engine._KEPT_COLUMNS", 256)

    async def run() -> None:
        await text_of(engine.submit([job()]))
        await empty(engine)
        kept = batch.cache.columns
        assert 0 < kept <= 128
        ticket = engine.submit([Job((65,) * 480, 0, 100, 0.0, 1.0, (0,), frozenset())])
        await ticket.next()
        engine.cancel(ticket)
        async with asyncio.timeout(10):
            while batch.cache.columns:
                await asyncio.sleep(0.002)

    asyncio.run(run())


@pytest.mark.parametrize("seconds", [0.0, 20.0])
def test_at_the_end_answers_finish_or_are_cut(bank, batch, seconds):
    async def run() -> None:
        engine = Engine(batch, bank.decode, queue=4)
        engine.start()
        tokens = 20 if seconds else 450
        ticket = engine.submit([job(0, tokens)])
        await ticket.next()
        engine.drain(seconds)
        with pytest.raises(Failed, match="shutting down") as refused:
            engine.submit([job()])
        assert refused.value.status == 503
        if seconds:
            await text_of(ticket)
        else:
            with pytest.raises(Failed, match="shutting down"):
                await text_of(ticket)
        engine.join(5)
        assert not engine.alive and not any(engine.counts)

    asyncio.run(run())
