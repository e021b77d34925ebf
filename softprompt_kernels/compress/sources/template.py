"""A chat as text: the chat template of a tokenizer, or plain text for one without a template.

A template is kept as its source, its arguments and the time that it may print, so that a run can store them and render
the same chat on another day.
"""

from __future__ import annotations

import inspect
import string
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import product
from typing import Any

from transformers import PreTrainedTokenizerBase

from softprompt_kernels.errors import SoftPromptError

_CODES = "strftime_codes"
_STRFTIME = (
    "{%- macro strftime_now(format) -%}{%- set at = namespace(text=true) -%}{%- for piece in format.split('%') -%}"
    "{%- if at.text -%}{{ piece }}{%- set at.text = false -%}"
    "{%- elif not piece -%}{{ '%' }}{%- set at.text = true -%}"
    f"{{%- else -%}}{{%- set n = 2 if piece[:2] in {_CODES} else 1 -%}}"
    f"{{{{ {_CODES}.get(piece[:n], '%' ~ piece[:n]) }}}}{{{{ piece[n:] }}}}{{%- endif -%}}"
    "{%- endfor -%}{%- endmacro %}\n"
)
"""In front of a template that asks for the time. transformers gives it a function of the present time, and takes no
functions as arguments."""


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """Renders a chat: at most one context, then turns of user and assistant.

    Args:
        tokenizer: renders.
        source: of its chat template; "" for plain text.
        arguments: of the template, such as `{"enable_thinking": False}`.
        time: that the template prints, if it prints one.
        system: the context is a system turn; otherwise it starts the user turn.
        parts: the template gets the content of a turn as a list of parts, as for a model that reads images too.
    """

    tokenizer: PreTrainedTokenizerBase
    source: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    time: datetime = field(default_factory=lambda: datetime.now())
    system: bool = True
    parts: bool = False

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> ChatTemplate:
        """The template of a tokenizer, at this time.

        Raises:
            SoftPromptError: it has none of that name, or does not use one of the arguments.
        """
        source = ""
        if tokenizer.chat_template:
            try:
                source = tokenizer.get_chat_template()
            except ValueError as error:
                raise SoftPromptError(
                    "tokenizer: it has several chat templates, accepted is one, or a default"
                ) from error
        taken = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
        taken |= {"messages", "raise_exception", "strftime_now", _CODES}
        used = _variables(source) if arguments else None
        for name in arguments or {}:
            if not source:
                raise SoftPromptError(f"template_arguments: got {name!r} for a tokenizer without a chat template")
            if name in taken:
                raise SoftPromptError(
                    f"template_arguments: got {name!r}, which every chat template is given already, "
                    "accepted are other variables that the chat template uses"
                )
            if used is not None and name not in used:
                raise SoftPromptError(
                    f"template_arguments: got {name!r}, accepted are variables that the chat template uses"
                )
        return cls(tokenizer, source, dict(arguments or {}))

    @property
    def in_user_turn(self) -> ChatTemplate:
        """The same with the context at the start of the user turn."""
        return replace(self, system=False)

    @property
    def in_parts(self) -> ChatTemplate:
        """The same with the content of a turn as a list of parts."""
        return replace(self, parts=True)

    @property
    def prints_time(self) -> bool:
        """Whether a chat of today is another than that of another day."""
        if "strftime_now" not in self.source:
            return False
        chats = [(a, b, c) for a in ("a", None) for b in ("b", None) for c in ("c", None) if a or b]
        # They differ in every part that a template may print.
        times = datetime(2003, 2, 1, 4, 5, 6), datetime(1987, 9, 17, 19, 27, 38, 1)
        one, two = (replace(self, time=time) for time in times)
        pairs = ((one, two), (one.in_user_turn, two.in_user_turn))
        return any(first.render(*chat) != second.render(*chat) for first, second in pairs for chat in chats)

    def render(self, context: str | None, *turns: str | None) -> str | None:
        """The chat up to the start of the next answer, or to its end if that is an answer or the context.

        None if the template refuses this chat.

        Args:
            context: stands before the turns; None for none.
            turns: of user and assistant in turn, the user's first. None leaves one out.

        Raises:
            SoftPromptError: jinja2 is missing or too old.
        """
        try:
            return self._rendered(context, turns)
        except SoftPromptError:
            raise
        except Exception:  # a template may raise anything: jinja's errors, or its own for a role it does not support
            return None

    def refusal(self, context: str | None, *turns: str | None) -> str:
        """Why the template refuses a chat; "" if it does not."""
        try:
            self._rendered(context, turns)
        except Exception as error:
            return " ".join(str(error).split()) or type(error).__name__
        return ""

    def _rendered(self, context: str | None, turns: Sequence[str | None]) -> str:
        if self.source and not self.system and context is not None:
            context, turns = None, (f"{context}\n\n{turns[0] if turns else None}", *turns[1:])
        roles = ("system", *(("user", "assistant")[number % 2] for number in range(len(turns))))
        pairs = [(role, text) for role, text in zip(roles, (context, *turns), strict=True) if text is not None]
        if not self.source:
            return self._plain(pairs)
        messages: list[Any] = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.parts else text} for role, text in pairs
        ]
        timed = "strftime_now" in self.source
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=(_STRFTIME if timed else "") + self.source,
                    tokenize=False,
                    add_generation_prompt=pairs[-1][0] == "user",
                    **(self._codes if timed else {}),
                    **self.arguments,
                )
            )
        except ImportError as error:
            raise SoftPromptError(f"jinja2: chat templates need it ({' '.join(str(error).split())})") from error

    @cached_property
    def _codes(self) -> dict[str, Any]:
        """The time in each code of strftime, also with a flag as in `%-d`."""
        codes = {}
        for code in map("".join, product(("", *"-_0^#EO"), string.ascii_letters)):
            with suppress(ValueError):  # the C library has no such code
                codes[code] = self.time.strftime(f"%{code}")
        return {_CODES: codes}

    def _plain(self, pairs: Sequence[tuple[str, str]]) -> str:
        text, before = str(self.tokenizer.bos_token or ""), ""
        for role, content in pairs:
            text += {
                "system": f"{content}\n\n",
                "user": f"{before}Question: {content}\nAnswer:",
                "assistant": f" {content}",
            }[role]
            before = "\n\n" if role == "assistant" else ""
        return text


def _variables(source: str) -> set[str] | None:
    """The variables that a chat template reads and does not set; None if it is not a template.

    Raises:
        SoftPromptError: jinja2 is missing.
    """
    try:
        from jinja2 import TemplateSyntaxError, ext, meta, nodes
        from jinja2.parser import Parser
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise SoftPromptError(f"jinja2: chat templates need it ({error})") from error

    class Generation(ext.Extension):
        """The marks of transformers around what a model writes."""

        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(extensions=[Generation, ext.loopcontrols])
    try:
        return meta.find_undeclared_variables(environment.parse(source))
    except TemplateSyntaxError:
        return None
