"""Clients of an endpoint: OpenAI's own, many in one process, each compares its answers with the ones it expects."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import httpx
import openai

NEAR = 1e-3
"""Nats. Two tokens that are closer may change places by rounding, which depends on the batch."""


@dataclass(frozen=True)
class Question:
    """A question to one prompt, and its greedy answer of so many tokens at most."""

    model: str
    text: str
    tokens: int
    answer: str = ""


@dataclass
class Count:
    """What clients got."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0
    wrong: list[tuple[Question, str]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def client_of(address: str) -> openai.AsyncOpenAI:
    """OpenAI's client, which tries nothing twice. Without certificates, whose loading takes longer than an answer."""
    plain = openai.DefaultAsyncHttpxClient(verify=False, timeout=120)
    return openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, http_client=plain)


async def known_answers(address: str, questions: Sequence[Question], count: int) -> tuple[list[Question], int]:
    """Ask one question at a time until so many have answers without a near tie. Also: how many had one.

    Raises:
        ValueError: there are too few such questions.
    """
    found: list[Question] = []
    ties = 0
    async with client_of(address) as client:
        for question in questions:
            if len(found) == count:
                break
            reply = await client.chat.completions.create(
                model=question.model,
                messages=[{"role": "user", "content": question.text}],
                max_tokens=question.tokens,
                temperature=0,
                logprobs=True,
                top_logprobs=2,
            )
            scores = [each.top_logprobs for each in reply.choices[0].logprobs.content]
            if min(first.logprob - second.logprob for first, second in scores) < NEAR:
                ties += 1
            else:
                found.append(replace(question, answer=reply.choices[0].message.content))
    if len(found) < count:
        raise ValueError(f"questions: {len(found)} of {len(questions)} have an answer without a near tie, not {count}")
    return found, ties


async def ask(client: openai.AsyncOpenAI, question: Question, stream: bool) -> tuple[str, int]:
    """The answer, and its number of tokens."""
    request = {
        "model": question.model,
        "messages": [{"role": "user", "content": question.text}],
        "max_tokens": question.tokens,
        "temperature": 0,
    }
    if not stream:
        reply = await client.chat.completions.create(**request)
        return reply.choices[0].message.content, reply.usage.completion_tokens
    text, tokens = [], 0
    async for chunk in await client.chat.completions.create(
        **request, stream=True, stream_options={"include_usage": True}
    ):
        text += [choice.delta.content or "" for choice in chunk.choices]
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return "".join(text), tokens


async def load(address: str, questions: Sequence[Question], clients: int, seconds: float) -> Count:
    """So many clients ask at once, again and again. Every second answer is streamed."""
    count, ready = Count(), [client_of(address) for _ in range(clients)]
    start = time.perf_counter()
    end = start + seconds

    async def one(number: int) -> None:
        draw = random.Random(number)
        async with ready[number] as client:
            asked = 0
            while time.perf_counter() < end:
                question = draw.choice(questions)
                text, tokens = await ask(client, question, stream=asked % 2 == 1)
                asked += 1
                count.answers += 1
                count.tokens += tokens
                if text != question.answer:
                    count.wrong.append((question, text))

    await asyncio.gather(*(one(number) for number in range(clients)))
    count.seconds = time.perf_counter() - start
    return count


DYING = """
import http.client, json, sys
host, port, model, tokens = sys.argv[1:]
body = {"model": model, "messages": [{"role": "user", "content": "Go on."}], "max_tokens": int(tokens), "stream": True,
        "n": 4}
connection = http.client.HTTPConnection(host, int(port))
connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
reply = connection.getresponse()
for _ in range(8):
    reply.readline()
print("streaming", flush=True)
while reply.readline():
    pass
"""


def killed_client(address: str, model: str, tokens: int) -> float:
    """A process asks for four long answers and is killed in the middle. Seconds until the server is empty again.

    Nobody else may use the server.

    Raises:
        RuntimeError: the answers have ended by themselves, or the place is not free after 20 seconds.
    """
    url = httpx.URL(address)
    command = [sys.executable, "-I", "-c", DYING, url.host, str(url.port), model, str(tokens)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        if not occupied(address):
            process.kill()
            raise RuntimeError("the answers have ended before their client was killed: ask for more tokens")
        process.send_signal(signal.SIGKILL)
        start = time.perf_counter()
    while occupied(address):
        if time.perf_counter() - start > 20:
            raise RuntimeError("the place of a killed client is not free after 20 seconds")
        time.sleep(0.005)
    return time.perf_counter() - start


def occupied(address: str) -> int:
    """Answers that the server works on, or that wait."""
    health = httpx.get(httpx.URL(address).join("/health")).json()
    return int(health["running"] + health["waiting"])
