"""The answers of a server to all queries: many requests at a time, kept as they come, and checked against the model.

Each answer is a line of `server-answers.jsonl` as soon as it is there, so an interrupted run asks only what is left.

**Whether the answers are the teacher's.** A server may hold another model or revision, or round its weights. For a
token that a model samples from its own distribution p, the mean of −log p(y) is the entropy of p. So over the first
answers

    gap = mean over tokens of (−log p_t(y) − H(p_t)),    p_t: the local teacher's, at the temperature of sampling

is 0 up to its standard error if the server samples from p_t, and KL(p_server ‖ p_t) + H(p_server) − H(p_t) otherwise. A
greedy answer has a gap below 0. Where the gap is more than `LARGEST_GAP` beyond `ERRORS` standard errors, the answers
are refused: the student would learn what the teacher does not say.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.model import embedding_count
from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import end_tokens, hidden_states
from softprompt_kernels.compress.teacher.moments_cache import row_entropies
from softprompt_kernels.compress.teacher.server.client import Client, Completion, ServerOptions, served_model
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import head_of
from softprompt_kernels.prompts import Prefix

CHECKED_TOKENS = 256
"""The first answers with so many tokens together are checked."""
LARGEST_GAP, ERRORS = 0.3, 4.0  # nats a token; standard errors
_ROWS = 256  # rows of logits in memory at once


@dataclass(frozen=True, eq=False)
class Asking:
    """What the server is asked.

    Args:
        options: of the server.
        context_ids: the tokens of the context.
        new_tokens, temperature, seed: as in `answer` of teacher/answers.py.
        file: where answers are kept until the run has stored them all.
    """

    options: ServerOptions
    context_ids: Sequence[int]
    new_tokens: int
    temperature: float
    seed: int
    file: Path


def server_answers(
    model: PreTrainedModel,
    chat: ChatFormat,
    context: Prefix,
    queries: Sequence[Query],
    asking: Asking,
    reporter: Reporter,
) -> list[Example]:
    """The queries as examples, in the same order. The server answers those without an output.

    Args:
        model, chat: the local model and its chat format.
        context: the teacher's prefix, for the check of the answers.
        queries: any number.
        asking: what the server is asked.
        reporter: receives the progress.

    Raises:
        SoftPromptError: the server cannot be reached, fails again and again, gives no completion or an empty one, or
            gives text that is not the local model's. The answers that have come are kept.
    """
    inputs = [tuple(chat.query_ids(query.input, answered=query.output is not None)) for query in queries]
    outputs = [None if query.output is None else tuple(chat.output_ids(query.output)) for query in queries]
    unanswered = [index for index, output in enumerate(outputs) if output is None]
    name = served_model(asking.options) if unanswered else ""
    digests = _digests(asking, name, [inputs[index] for index in unanswered])
    stored = stored_answers(asking.file)
    found = {i: stored[digest] for i, digest in zip(unanswered, digests, strict=True) if digest in stored}
    missing = [(i, digest) for i, digest in zip(unanswered, digests, strict=True) if i not in found]
    ends, told = end_tokens(model, chat), False
    check = _Check(model, context, asking.temperature, name, asking.options.address, found, inputs)
    with reporter.progress("Answers of the server", len(unanswered), "query") as advance:
        advance(len(found))
        prompts = [(*asking.context_ids, *inputs[index]) for index, _ in missing]
        seeds = [int(digest[:8], 16) >> 1 for _, digest in missing]
        as_text = partial(_as_text, chat.tokenizer)
        client = Client(asking.options, name, asking.new_tokens, asking.temperature, ends, as_text)
        with closing(_ask(client, prompts, seeds)) as completions:
            for number, completion in completions:
                index, digest = missing[number]
                tokens = answer_tokens(chat, completion, ends, asking.new_tokens)
                _check_tokens(tokens, model, len(prompts[number]), asking)
                _keep(asking.file, digest, tokens)
                found[index] = tokens
                if completion.model != name and not told:
                    told = True
                    reporter.message(f"The server calls its model {completion.model}, and not {name}.")
                check.look()
                advance(1)
    check.look(last=True)
    for index in unanswered:
        outputs[index] = found[index]
    return [Example(x, y) for x, y in zip(inputs, outputs, strict=True) if y is not None]


def _as_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str | None:
    """The text that a server's tokenizer turns into these tokens, with or without the token that it puts before."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    start = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else ""
    return next((t for t in (text, text.removeprefix(start)) if tokenizer(t)["input_ids"] == list(ids)), None)


def answer_tokens(chat: ChatFormat, completion: Completion, ends: frozenset[int], new_tokens: int) -> tuple[int, ...]:
    """The tokens of an answer, as the local model would have sampled them: up to its end token, or cut.

    Args:
        chat: the chat format.
        completion: of the server.
        ends: tokens that end an answer.
        new_tokens: at most so many.
    """
    if completion.token_ids is None:
        tokens = tuple(chat.output_ids(completion.text)) if completion.text or completion.ended else ()
    else:
        tokens = completion.token_ids
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    body = tokens[:end]
    if completion.ended and len(body) < new_tokens:
        closing = tokens[end] if end < len(tokens) else chat.output_ids(completion.text or ".")[-1]
        return (*body, closing)
    return body[:new_tokens]


def _check_tokens(tokens: Sequence[int], model: PreTrainedModel, asked: int, asking: Asking) -> None:
    """Refuse an answer that is not one. `asked` is how many tokens the question has, with the context.

    Raises:
        SoftPromptError: it is empty, or the model has no embedding for a token.
    """
    address, embeddings = asking.options.address, embedding_count(model)
    if not tokens:
        raise SoftPromptError(
            f"server: {address} cut an answer off before its first token; accepted is a server with room for "
            f"{asked + asking.new_tokens} tokens, {asked} of context and question and {asking.new_tokens} of the answer"
        )
    if strange := next((token for token in tokens if not 0 <= token < embeddings), None):
        raise SoftPromptError(
            f"server: {address} gives the token {strange}, accepted are those below {embeddings}, the local model's "
            "embeddings: it holds another model"
        )


def _ask(client: Client, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> Generator[tuple[int, Completion]]:
    """The completions with the numbers of their prompts, as they come. An error or a signal cancels all requests.

    The requests run in an event loop of another thread, so that this works within a running loop too.
    """
    import anyio
    from anyio.from_thread import start_blocking_portal

    done: SimpleQueue[tuple[int, Completion] | BaseException] = SimpleQueue()

    async def ask_all() -> None:
        free = anyio.Semaphore(client.options.requests)

        async def ask(number: int) -> None:
            async with free:
                done.put((number, await client.complete(prompts[number], seeds[number])))

        try:
            async with anyio.create_task_group() as group:
                for number in range(len(prompts)):
                    group.start_soon(ask, number)
        except BaseExceptionGroup as errors:
            done.put(errors.exceptions[0])
        finally:
            with anyio.CancelScope(shield=True):
                await client.close()

    with start_blocking_portal() as portal:
        task = portal.start_task_soon(ask_all)
        try:
            for _ in prompts:
                item = done.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            task.cancel()
            with suppress(CancelledError):
                task.result()


class _Check:
    """Compares the first answers with the local teacher's distribution, once."""

    def __init__(
        self,
        model: PreTrainedModel,
        context: Prefix,
        temperature: float,
        name: str,
        address: str,
        found: dict[int, tuple[int, ...]],
        inputs: Sequence[tuple[int, ...]],
    ) -> None:
        self.model, self.context, self.temperature = model, context, temperature
        self.name, self.address, self.found, self.inputs = name, address, found, inputs
        self.done = False

    def look(self, last: bool = False) -> None:
        """Check, if there are enough tokens or no more will come.

        Raises:
            SoftPromptError: the answers are not the local model's.
        """
        tokens = sum(map(len, self.found.values()))
        if self.done or not tokens or (tokens < CHECKED_TOKENS and not last):
            return
        self.done = True
        examples = [Example(self.inputs[index], output) for index, output in self.found.items() if output]
        hidden = hidden_states(self.model, self.context, examples, SilentReporter(), "")
        labels = torch.tensor([token for example in examples for token in example.output_ids])
        surprise, entropy = surprises_and_entropies(self.model, torch.cat(hidden), labels, self.temperature or 1.0)
        excess = (surprise - entropy).double()
        error = float(excess.std()) / math.sqrt(len(excess)) if len(excess) > 1 else math.inf
        if float(excess.mean()) > LARGEST_GAP + ERRORS * error:
            raise SoftPromptError(
                f"server: the text of {self.name} at {self.address} is not that of the local model: over "
                f"{len(excess)} tokens it takes {surprise.mean():.2f} nats a token there, and text of its own would "
                f"take {entropy.mean():.2f}; accepted is a server of the same model"
            )


@torch.no_grad()
def surprises_and_entropies(
    model: PreTrainedModel, hidden: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """−log p of each label, and the entropy of its distribution, nats, `[n]` on the CPU."""
    head, surprises, entropies = head_of(model), [], []
    for start in range(0, len(labels), _ROWS):
        logits = head.logits(hidden[start : start + _ROWS]).float() / temperature
        chosen = labels[start : start + _ROWS].to(logits.device)
        surprises.append(torch.nn.functional.cross_entropy(logits, chosen, reduction="none").cpu())
        entropies.append(row_entropies(logits).cpu())
    return torch.cat(surprises), torch.cat(entropies)


def _digests(asking: Asking, name: str, inputs: Sequence[tuple[int, ...]]) -> list[str]:
    """What names each question: all that decides its answer, and how many equal ones come before it."""
    same = repr((tuple(asking.context_ids), asking.new_tokens, asking.temperature, asking.seed, name))
    start, seen, found = hashlib.sha256(same.encode()), Counter[tuple[int, ...]](), []
    for ids in inputs:
        digest = start.copy()
        digest.update(repr((ids, seen[ids])).encode())
        seen[ids] += 1
        found.append(digest.hexdigest())
    return found


def _keep(file: Path, digest: str, tokens: tuple[int, ...]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"question": digest, "tokens": tokens}) + "\n")


def stored_answers(file: Path) -> dict[str, tuple[int, ...]]:
    """The answers that an earlier call has kept. A line that a crash cut off is dropped, from the file too."""
    found: dict[str, tuple[int, ...]] = {}
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            question, tokens = record["question"], tuple(map(int, record["tokens"]))
            if not line.endswith(b"\n"):
                raise ValueError("a line without an end")
        except (ValueError, KeyError, TypeError):
            temporary = file.with_name(file.name + ".partial")
            temporary.write_bytes(b"".join(lines[:number]))
            temporary.replace(file)
            break
        found[question] = tokens
    return found
