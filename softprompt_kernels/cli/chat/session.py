"""A conversation of several turns behind one of several prefixes, without a terminal.

    prefix ‖ user₁ answer₁ … userₙ  →  answerₙ

The turns are kept once, whatever the model has read before them, so the prefix can change between two turns. If prefix,
turns and answer are longer than the model's window, the oldest turns are left out of what the model reads, and the
answer says how many. They stay in the conversation: a shorter prefix may have room for them.

Cost: the tokens of a turn go through the model once when they are written and once when they are read as part of the
chat. What was read is kept as a longer prefix, `prefix ‖ user₁ answer₁ …`, and the next answer begins where its tokens
still agree: all turns are read again only after the oldest one was left out. A prefix of more than `_LARGE` tokens is
not copied, and then each answer reads all turns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList, TextStreamer

from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.model import check_ids
from softprompt_kernels.compress.teacher.context import CAPTURE_TOKENS
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, generate
from softprompt_kernels.models.families import max_positions
from softprompt_kernels.prompts import Prefix

_LARGE = 16384
Source = Callable[[], Prefix | None]


@dataclass(frozen=True)
class Answer:
    """What the model wrote.

    Args:
        text: without blanks around it.
        left_out: how many of the oldest turns the model has not read, because its window is full.
        end: "end" if the model ended it, "length" at the largest number of new tokens, "stopped" by the user.
    """

    text: str
    left_out: int
    end: str


@dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Args:
        question, answer: both sides.
        read: what the model has read before the turns: the name of a source.
        seed: of sampling.
    """

    question: str
    answer: Answer
    read: str
    seed: int


class Session:
    """A conversation.

    Args:
        model: prepared.
        chat: its chat format.
        sources: what the model may read before the turns, by name. Each is called once, when it is first needed; the
            first one is in use.
        settings: of generation, with `max_new_tokens`.
        seed: of the first turn's answer. Each further turn has the next number, so that an answer can be repeated.

    Attributes:
        turns: from the oldest to the newest.
        reads: the name of the source in use.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        sources: Mapping[str, Source],
        settings: GenerationConfig,
        seed: int = 0,
    ) -> None:
        self.model, self.chat, self.settings = model, chat, settings
        self.turns: list[Turn] = []
        self.reads = next(iter(sources))
        self._sources, self._prefixes = dict(sources), dict[str, Prefix | None]()
        self._heard: dict[str, tuple[list[int], Prefix]] = {}  # by source: tokens behind its prefix, and both together
        self._seed = seed

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(self._sources)

    def read(self, name: str) -> None:
        """Use another source from the next turn on. The turns so far stay."""
        self._prefix(name)
        self.reads = name

    def ask(
        self, question: str, write: Callable[[str], None] | None = None, stopped: Callable[[], bool] | None = None
    ) -> Turn:
        """Answer a question after the turns so far, and keep both.

        Args:
            question: of the user.
            write: receives the parts of the answer as they come.
            stopped: asked after each token; the answer ends where it says so, and is kept.

        Raises:
            SoftPromptError: the question is empty, has a token that the model lacks, is changed by the chat template or
                does not fit the model's window. The conversation is as before.
        """
        answer = self._answer(self.reads, self.turns, question, self._seed, write, stopped)
        turn = Turn(question, answer, self.reads, self._seed)
        self.turns.append(turn)
        self._seed += 1
        return turn

    def compare(self, question: str | None = None, stopped: Callable[[], bool] | None = None) -> dict[str, Answer]:
        """The answers behind each source, by name, with the same random numbers. The conversation stays as it is.

        Args:
            question: asked after the turns so far; None: the last question, after those before it.
            stopped: as in `ask`. The answers after the one that it stops are left out.

        Raises:
            SoftPromptError: as `ask`, or there is no last question.
        """
        history, seed = self.turns, self._seed
        if question is None:
            if not self.turns:
                raise SoftPromptError("there is no question yet that could be compared")
            *history, last = self.turns
            question, seed = last.question, last.seed
        answers = {}
        for name in self.names:
            answers[name] = self._answer(name, history, question, seed, None, stopped)
            if answers[name].end == "stopped":
                break
        return answers

    def undo(self) -> Turn | None:
        """Forget the last turn, and return it; None if there is none."""
        return self.turns.pop() if self.turns else None

    def reset(self) -> int:
        """Forget all turns, and return how many there were."""
        count = len(self.turns)
        self.turns.clear()
        self._heard.clear()
        return count

    def messages(self) -> list[dict[str, Any]]:
        """The turns as messages with `role` and `content`; those of the model say what it had read and its end."""
        found: list[dict[str, Any]] = []
        for turn in self.turns:
            found.append({"role": "user", "content": turn.question})
            answer = {"role": "assistant", "content": turn.answer.text}
            found.append({**answer, "read": turn.read, "seed": turn.seed, "end": turn.answer.end})
        return found

    def _answer(
        self,
        name: str,
        history: Sequence[Turn],
        question: str,
        seed: int,
        write: Callable[[str], None] | None,
        stopped: Callable[[], bool] | None,
    ) -> Answer:
        prefix = self._prefix(name)
        input_ids, left_out = self._fitting(name, prefix, history, question)
        check_ids(self.model, self.chat.tokenizer, input_ids, f"question: {question[:40]!r}")
        prefix, rest = self._listen(name, prefix, input_ids)
        ids = torch.tensor([rest], device=self.model.device)
        ends = self.settings.eos_token_id or []
        torch.manual_seed(seed)
        new = generate(
            self.model,
            ids,
            prefix,
            generation_config=self.settings,
            streamer=None if write is None else _Stream(self.chat.tokenizer, write, ends),
            stopping_criteria=StoppingCriteriaList([] if stopped is None else [_Stopped(stopped)]),
        )[0, ids.shape[1] :].tolist()
        ended = bool(new) and new[-1] in ends
        text = str(self.chat.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True)).strip()
        full = len(new) >= self._new_tokens
        return Answer(text, left_out, "end" if ended else "length" if full else "stopped")

    def _listen(self, name: str, prefix: Prefix | None, ids: list[int]) -> tuple[Prefix | None, list[int]]:
        """A prefix of as many tokens as possible, and the tokens behind it: at least one."""
        base = 0 if prefix is None else prefix.length
        if base > _LARGE:
            return prefix, ids
        known, heard = self._heard.get(name, ([], prefix))
        common = 0
        while common < min(len(known), len(ids) - 1) and known[common] == ids[common]:
            common += 1
        if heard is not None:
            heard = heard.slice(0, base + common) if base + common else None
        if new := ids[common:-1]:
            heard = capture(self.model, torch.tensor([new], device=self.model.device), CAPTURE_TOKENS, before=heard)
        if heard is not None:
            self._heard[name] = (ids[:-1], heard)
        return heard, ids[-1:]

    def _fitting(
        self, name: str, prefix: Prefix | None, history: Sequence[Turn], question: str
    ) -> tuple[list[int], int]:
        """The tokens of the newest turns that fit the window with the answer, and how many turns are left out."""
        window = max_positions(self.model.config)
        left = window - (0 if prefix is None else prefix.length)

        def ids_from(first: int) -> list[int]:
            messages = [
                {"role": role, "content": text}
                for turn in history[first:]
                for role, text in (("user", turn.question), ("assistant", turn.answer.text))
            ]
            return self.chat.conversation_ids([*messages, {"role": "user", "content": question}])

        def fits(first: int) -> bool:
            return len(ids_from(first)) + self._new_tokens <= left

        first = 0 if fits(0) else bisect_left(range(len(history)), True, lo=1, key=fits) if history else 0
        ids = ids_from(first)
        if len(ids) + self._new_tokens > left:
            raise SoftPromptError(
                f"question: it has {len(ids)} tokens and its answer up to {self._new_tokens}, but the model's window "
                f"of {window} has {left} left ({name}); accepted are a shorter question or a smaller --max-new-tokens"
            )
        return ids, first

    @property
    def _new_tokens(self) -> int:
        return int(self.settings.max_new_tokens or 0)

    @torch.no_grad()
    def _prefix(self, name: str) -> Prefix | None:
        if name not in self._prefixes:
            self._prefixes[name] = self._sources[name]()
        return self._prefixes[name]


class _Stream(TextStreamer):
    """Hands out the text of new tokens, without the one that ends the answer."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], ends: Sequence[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write, self._ends = write, frozenset(ends)

    def put(self, value: Tensor) -> None:
        """A new token, or first those of the input."""
        if value.numel() != 1 or int(value) not in self._ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that later tokens do not change."""
        if text:
            self._write(text)


class _Stopped(StoppingCriteria):
    """Ends the answer after the token at which `stopped` says so."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self._stopped(), device=input_ids.device)
