"""The chat format: the tokens of a context, of a query and of an answer.

The teacher reads `c ‖ z` and the student `σ ‖ z`, so a chat is cut behind the context, and again before the answer:

    before  CONTEXT  between₁ │ between₂  QUERY  after │ lead  ANSWER  end

With a chat template, the context is the system turn, after a line of instruction, and the query is the user turn with
the opening of the model's answer. If the template has no system role, the context stands at the start of the user turn.
Without a template, the context is plain text and the query a "Question / Answer" pair.

The chat is rendered whole, encoded whole and cut at places in the text. The pieces that a call does not know are
stand-ins. Where to cut `between` is decided once: the query must follow the context, and also what the template puts
there without one, with the same tokens as in the rendered chat. The end of the system turn is preferred. If a token
still reaches across a cut, both sides are encoded on their own, as the tokens of one must not depend on the other. What
stands before an answer and what ends it are those of a rendered assistant turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress.sources.conversation import conversation
from softprompt_kernels.compress.sources.encoder import Encoder, Tokens
from softprompt_kernels.compress.sources.template import ChatTemplate
from softprompt_kernels.compress.text_file import trim
from softprompt_kernels.errors import SoftPromptError

INSTRUCTION = "Answer from this text.\n\n"
_CONTEXT = "«the context goes here»"
_QUERY = "«the query goes here»"
_ANSWER = "«the answer goes here»"


@dataclass(frozen=True)
class _Answer:
    """What stands around an answer in a rendered assistant turn.

    Args:
        after: the text from the query to the cut before the answer.
        lead: the text from that cut to the answer.
        end: the text behind the answer.
    """

    after: str
    lead: str
    end: str


class ChatFormat:
    """Converts texts to tokens, for one tokenizer.

    Args:
        tokenizer: one that is backed by the tokenizers library.
        arguments: of its chat template, such as `{"enable_thinking": False}`.
        template: instead of the tokenizer's template and arguments.

    Raises:
        SoftPromptError: the chat template cannot be rendered, or does not put the context before the query.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
        template: ChatTemplate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self._template = template or ChatTemplate.of(tokenizer, arguments)
        self._encoder = Encoder(tokenizer, self._template.source)
        self._before, self._between, self._after = self._split_template()
        self._cut = self._choose_cut()

    @classmethod
    def pinned(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        path: Path,
        arguments: Mapping[str, Any] | None,
        needed: bool = False,
    ) -> ChatFormat:
        """The format whose `rendered_from` was stored, or that of the tokenizer if nothing is, or other arguments are.

        Args:
            tokenizer, arguments: as in `ChatFormat`.
            path: of the stored `rendered_from`.
            needed: tokens of chats of that format are stored too.

        Raises:
            SoftPromptError: it is needed and cannot be read, and the chat template prints the time.
        """
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            time, given = datetime.fromisoformat(saved["time"]), dict(saved["arguments"])
            template = ChatTemplate(tokenizer, str(saved["template"]), given, time)
        except (OSError, ValueError, KeyError, TypeError) as error:
            chat = cls(tokenizer, arguments)
            if needed and chat._template.prints_time:
                raise SoftPromptError(
                    f"output: {path} cannot be read, which holds the time that the stored chats were rendered at; "
                    "choose another folder"
                ) from error
            return chat
        return cls(tokenizer, template=template) if given == dict(arguments or {}) else cls(tokenizer, arguments)

    @property
    def rendered_from(self) -> str:
        """What the chat is rendered from, for `pinned`: the template, its arguments and the time of its first use."""
        template = self._template
        saved = {"template": template.source, "arguments": dict(template.arguments), "time": template.time.isoformat()}
        return json.dumps(saved, indent=1)

    def context_ids(self, text: str) -> Tensor:
        """`[1, C]` int64: the tokens of the context `text`, which the teacher reads before every query.

        Raises:
            SoftPromptError: the text is empty or blank.
        """
        return torch.tensor([self.context_tokens(text).ids])

    def context_tokens(self, text: str) -> Tokens:
        """The tokens of `context_ids`, and their places in `trim(text)`. Those of what stands before it are below 0.

        Raises:
            SoftPromptError: as `context_ids`.
        """
        if not text.strip():
            raise SoftPromptError("context: got an empty text, accepted is text with at least one word")
        rest = self._between + _QUERY + self._after
        chat = self._rendered("context", self._before, rest, f"{INSTRUCTION}{trim(text)}", _QUERY)
        end = len(chat) - len(rest)
        found = self._head(chat, end + self._cut, (len(self._before), end))
        return found.shifted(-chat.index(INSTRUCTION, len(self._before)) - len(INSTRUCTION))

    def no_context_ids(self) -> Tensor | None:
        """`[1, n]` int64: the tokens that the template puts before a query without a context; None if there are none.

        These may be the BOS token, the opening of the user turn, and the default system turn of some templates. They
        make the baseline "no context" the chat that the template renders for the query alone.
        """
        alone = self._alone
        ids = self._head(alone, alone.index(_QUERY) - len(self._query_start)).ids if _QUERY in alone else ()
        return torch.tensor([ids]) if ids else None

    def query_ids(self, text: str, answered: bool = False) -> list[int]:
        """The tokens of one query, up to the start of the answer.

        Args:
            text: the query.
            answered: an output of `output_ids` follows. It matters for a template that opens the model's answer in
                another way than that of a given one, as with a thought.
        """
        before = self._before + _CONTEXT + self._between
        chat = self._rendered("query", before, self._after, _CONTEXT, trim(text))
        start, end = len(before) - len(self._query_start), len(chat) - len(self._after)
        plain = (len(before), end)
        if not answered or self._answer_turn is None:
            return list(self._tail(chat, start, plain))
        # As it stands before an answer: a tokenizer may join two line feeds at the end of a text only.
        whole, place = chat[:end] + self._answer_turn, end + len(self._answer.after)
        if self._encoder.encode(whole, plain).cut(place) is None:
            return list(self._tail(chat[:end] + self._answer.after, start, plain))
        behind = len(self._tail(whole, place, plain))
        return list(self._tail(whole, start, plain)[:-behind])

    def conversation_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The tokens of several turns behind a context, a prompt or nothing, up to the start of the next answer.

        They are those of the rendered chat from the cut on. For one turn they are `query_ids`. Given answers stand as
        the template renders those of earlier turns: some leave out their thoughts.

        Args:
            messages: turns with the keys `role` and `content`, alternately of "user" and "assistant". The first and
                the last are the user's. An answer may be empty.

        Raises:
            SoftPromptError: there are no messages, their roles do not alternate, the last one is not the user's, or
                one has no text; or the template changes a text of the user.
        """
        head = self._before + _CONTEXT + self._between
        chat, plain = conversation(self._template, self._encoder, _CONTEXT, head, messages)
        return list(self._tail(chat, len(head) - len(self._query_start), *plain))

    def output_ids(self, text: str) -> list[int]:
        """The tokens of the given answer `text`, to the one that ends the model's turn, or to EOS if there is none.

        Raises:
            SoftPromptError: the template splits the answer into a thought and the rest, and it has names of other
                control tokens too.
        """
        answer = self._answer
        before = self._before + _CONTEXT + self._between + _QUERY + answer.after
        if not answer.end and not answer.lead and self._answer_turn is None:
            chat = before + trim(text)
        else:
            chat = self._rendered("output", before, answer.end, _CONTEXT, _QUERY, trim(text))
        start, end = len(before), len(chat) - len(answer.end)
        lead = start + len(answer.lead)
        # A template may split an output into a thought and an answer; then the marks around the thought are its own.
        whole = chat.startswith(answer.lead, start) and chat[lead:end].strip() == text.strip()
        plain = (lead, end) if whole else (0, 0)
        tokens = self._encoder.encode(chat, plain)
        marks = self._encoder.encode(before + answer.lead)
        if not whole and self._encoder.controls(tokens, start, end) != self._encoder.controls(marks, start, lead):
            raise SoftPromptError(
                f"output: got {_start(text)!r}, which has a thought and names of other control tokens, "
                "accepted is an output without one of both"
            )
        if tokens.cut(start) is None:
            tokens = self._encoder.encode_behind(chat[start:], _shifted(plain, -start)).shifted(start)
        last = self._encoder.first_control(tokens, end)
        if last is not None:
            first = next(number for number, (begin, _) in enumerate(tokens.spans) if begin >= start)
            return list(tokens.ids[first : last + 1])
        eos = self.tokenizer.eos_token_id
        return [*self._tail(chat[:end], start, plain), *([] if eos is None else [int(eos)])]

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer: that of a rendered assistant turn, and the tokenizer's EOS token."""
        ends = [self.tokenizer.eos_token_id]
        if self._answer.end:
            turn = self._before + _CONTEXT + self._between + _QUERY + (self._answer_turn or "")
            tokens = self._encoder.encode(turn)
            last = self._encoder.first_control(tokens, len(turn) - len(self._answer.end))
            ends += [] if last is None else [tokens.ids[last]]
        return frozenset(int(end) for end in ends if end is not None)

    @property
    def _query_start(self) -> str:
        return self._between[self._cut :]

    def _split_template(self) -> tuple[str, str, str]:
        """The text before the context, between context and query, and behind the query."""
        texts = (self._template, self._template.in_user_turn)
        for template in (*texts, *(each.in_parts for each in texts)):
            before, found, rest = (template.render(_CONTEXT, _QUERY) or "").partition(_CONTEXT)
            between, found_query, after = rest.partition(_QUERY)
            if found and found_query:
                self._template = template
                return before, between, after
        reason = next(filter(None, (each.refusal(_CONTEXT, _QUERY) for each in reversed(texts))), "")
        raise SoftPromptError(
            "tokenizer: its chat template keeps neither a system turn nor a user turn intact"
            + (f" ({reason})" if reason else "")
        )

    @cached_property
    def _alone(self) -> str:
        """The chat of a query without a context."""
        return self._template.render(None, _QUERY) or ""

    def _choose_cut(self) -> int:
        """Where `between` is cut.

        From the cut on, the chat must be that of a query without a context, in text and, if possible, in tokens.
        """
        between, before_alone = self._between, self._alone.partition(_QUERY)[0]
        whole = self._encoder.encode(self._before + _CONTEXT + between + _QUERY + self._after)
        alone = self._encoder.encode(self._alone)
        turn = (self._template.render(_CONTEXT) if self._template.system else None) or ""
        turn_end = turn.partition(_CONTEXT)[2]
        places = [len(turn_end)] if turn_end and between.startswith(turn_end) else []
        places = [place for place in [*places, *range(len(between) + 1)] if before_alone.endswith(between[place:])]
        for place in places:
            query = whole.cut(len(self._before) + len(_CONTEXT) + place)
            same = alone.cut(len(before_alone) - len(between) + place)
            if query is not None and same is not None and query[1] == same[1]:
                return place
        return places[0]

    @cached_property
    def _answer_turn(self) -> str | None:
        """What stands behind the query in a chat with an answer; None if the template shows no answer."""
        before = self._before + _CONTEXT + self._between + _QUERY
        turn = self._template.render(_CONTEXT, _QUERY, _ANSWER) or ""
        return turn[len(before) :] if turn.startswith(before) and _ANSWER in turn[len(before) :] else None

    @cached_property
    def _answer(self) -> _Answer:
        if self._answer_turn is None:
            return _Answer(self._after, "", "")
        opening, _, end = self._answer_turn.partition(_ANSWER)
        if opening.startswith(self._after):
            return _Answer(self._after, opening[len(self._after) :], end)
        # The template opens the model's answer in another way than a given one.
        before = self._before + _CONTEXT + self._between + _QUERY
        given = self._encoder.encode(before + self._answer_turn)
        asked = self._encoder.encode(before + self._after)
        common = next(n for n in range(len(self._after), -1, -1) if opening.startswith(self._after[:n]))
        for place in range(common, 0, -1):
            cuts = given.cut(len(before) + place), asked.cut(len(before) + place)
            if cuts[0] is not None and cuts[1] is not None and cuts[0][0] == cuts[1][0]:
                return _Answer(opening[:place], opening[place:], end)
        return _Answer("", opening, end)

    def _rendered(self, name: str, before: str, after: str, *texts: str) -> str:
        """A chat that starts and ends as that of the stand-ins, with the whole text between."""
        chat, text = self._template.render(*texts), texts[0 if name == "context" else -1]
        if chat is None or not chat.startswith(before) or not chat[len(before) :].endswith(after):
            raise SoftPromptError(
                f"{name}: got {_start(text)!r}, which the chat template renders in another way than other texts"
            )
        found = chat[len(before) : len(chat) - len(after)]
        if not self._same(found, text, self._answer.lead if name == "output" else ""):
            raise SoftPromptError(
                f"{name}: got {_start(text)!r}, which the chat template changes or drops in part, "
                "accepted is text that it keeps"
            )
        return chat

    @staticmethod
    def _same(found: str, text: str, lead: str) -> bool:
        """Whether a text is found whole behind the lead, or as a thought and an answer with the marks of the lead."""
        if found.startswith(lead) and found[len(lead) :].strip() == text.strip():
            return True
        marks = lead.split()
        if len(marks) != 2 or marks[1] not in text:
            return False
        pairs = [each.strip().removeprefix(marks[0]).split(marks[1]) for each in (found, text)]
        return [part.strip() for part in pairs[0]] == [part.strip() for part in pairs[1]]

    def _head(self, chat: str, place: int, plain: tuple[int, int] = (0, 0)) -> Tokens:
        whole = self._encoder.encode(chat, plain)
        cut = whole.cut(place)
        if cut is None:
            return self._encoder.encode(chat[:place], plain)
        return Tokens(cut[0], whole.spans[: len(cut[0])])

    def _tail(self, chat: str, place: int, *plain: tuple[int, int]) -> tuple[int, ...]:
        cut = self._encoder.encode(chat, *plain).cut(place)
        shifted = [_shifted(part, -place) for part in plain]
        return self._encoder.encode_behind(chat[place:], *shifted).ids if cut is None else cut[1]


def _start(text: str) -> str:
    return " ".join(text.split())[:40]


def _shifted(plain: tuple[int, int], by: int) -> tuple[int, int]:
    return max(0, plain[0] + by), max(0, plain[1] + by)
