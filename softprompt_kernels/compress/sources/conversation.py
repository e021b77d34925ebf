"""A chat of several turns as text, with the places of what user and model wrote.

    context  user₁  answer₁  user₂  answer₂ … userₙ │ the next answer

A template may treat earlier answers in its own way: some leave out a thought. So the places are found with stand-ins.
The chat is rendered with a stand-in for every text, with stand-ins for the user's texts only, and with none. The second
says what stands between the user's texts, and the first what stands around an answer in it. The user's texts must be
whole in the third.

Cost: three renders of the chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from softprompt_kernels.compress.sources.encoder import Encoder
from softprompt_kernels.compress.sources.template import ChatTemplate
from softprompt_kernels.compress.text_file import trim
from softprompt_kernels.errors import SoftPromptError

Span = tuple[int, int]
_ROLES = ("user", "assistant")


def conversation(
    template: ChatTemplate, encoder: Encoder, context: str, head: str, messages: Sequence[Mapping[str, str]]
) -> tuple[str, list[Span]]:
    """The chat up to the start of the next answer, and the parts of it that are plain text.

    Args:
        template: renders the chat.
        encoder: knows the control tokens.
        context: a stand-in for it.
        head: the text of a chat up to the first query. The chat starts with it.
        messages: as in `ChatFormat.conversation_ids`.

    Raises:
        SoftPromptError: as `ChatFormat.conversation_ids`.
    """
    texts = _checked(messages)
    mark = "«a text goes here»"
    while any(mark in text for text in texts):
        mark += "»"
    for one in (template, template.in_user_turn):  # a template may put the system turn into another user turn
        chat = one.render(context, *texts) or ""
        asked = [text if number % 2 else mark for number, text in enumerate(texts)]
        only_answers = (one.render(context, *asked) or "").split(mark)
        nothing = (one.render(context, *(mark for _ in texts)) or "").split(mark)
        known = len(only_answers) == len(texts) // 2 + 2 and len(nothing) == len(texts) + 1
        once = context not in "".join(nothing[1:])
        if known and once and chat.startswith(head) and only_answers[0] == head:
            break
    else:
        raise SoftPromptError("messages: the chat template does not render several turns as it does one")
    plain, place = [], len(head)
    for number, text in enumerate(texts):
        if number % 2 == 0:
            behind, last = only_answers[number // 2 + 1], number == len(texts) - 1
            kept = next((part for part in (text, text.strip()) if chat.startswith(part + behind, place)), None)
            if kept is None or (last and place + len(kept + behind) < len(chat)):
                raise SoftPromptError(
                    f"messages[{number}]: got {_start(text)!r}, which the chat template changes or drops in part, "
                    "accepted is text that it keeps"
                )
            plain.append((place, place + len(kept)))
            place += len(kept)
        else:
            turn, around = only_answers[number // 2 + 1], (nothing[number], nothing[number + 1])
            part = _answer_part(text, turn, around)
            if part is None and _has_more_turns(encoder, turn, "".join(around), "".join(nothing)):
                raise SoftPromptError(
                    f"messages[{number}]: got {_start(text)!r}, which has a thought and names of other control "
                    "tokens, accepted is an answer without one of both"
                )
            plain += [] if part is None else [(place + part[0], place + part[1])]
            place += len(turn)
    return chat, plain


def _checked(messages: Sequence[Mapping[str, str]]) -> list[str]:
    """The texts of messages, without blank lines around them."""
    if not messages:
        raise SoftPromptError("messages: got none, accepted is at least one of the user")
    texts = []
    for number, message in enumerate(messages):
        role, text, expected = message.get("role"), message.get("content"), _ROLES[number % 2]
        if role == "system":
            raise SoftPromptError(
                f"messages[{number}]: got the role 'system', accepted are 'user' and 'assistant': the context or the "
                "prompt stands where a system message does"
            )
        if role != expected:
            raise SoftPromptError(
                f"messages[{number}]: got the role {role!r}, accepted is {expected!r}: user and assistant alternate, "
                "and the user is first"
            )
        if not isinstance(text, str):
            raise SoftPromptError(f"messages[{number}]: got a content of type {type(text).__name__}, accepted is text")
        if role == "user" and not text.strip():
            raise SoftPromptError(f"messages[{number}]: got an empty text, accepted is text with at least one word")
        texts.append(trim(text))
    if len(texts) % 2 == 0:
        raise SoftPromptError("messages: the last one is of the role 'assistant', accepted is 'user'")
    return texts


def _answer_part(text: str, turn: str, around: tuple[str, str]) -> Span | None:
    """Where an answer stands in the text between two queries: whole or without its start, which may be a thought.

    None if it is otherwise changed.
    """
    start, end = len(around[0]), len(turn) - len(around[1])
    if not turn.startswith(around[0]) or not turn.endswith(around[1]) or start > end:
        return None
    return (start, end) if text.rstrip().endswith(turn[start:end].strip()) else None


def _has_more_turns(encoder: Encoder, turn: str, expected: str, chat: str) -> bool:
    """Whether a turn has control tokens of the chat more often than one with another answer has."""
    marks, found = encoder.controls(encoder.encode(chat)), encoder.controls(encoder.encode(turn))
    usual = encoder.controls(encoder.encode(expected))
    return any(found.count(one) > usual.count(one) for one in marks)


def _start(text: str) -> str:
    return " ".join(text.split())[:40]
