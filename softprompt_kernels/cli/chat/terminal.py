"""A conversation on a terminal, or with each line of a pipe as a turn.

Questions and answers go to standard output, as `> question` and the answer below it. Notices go to standard error.
A line that starts with / is a command. Nothing that is typed ends the chat but /exit and the end of input (Ctrl-D):
an error is one sentence.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from softprompt_kernels.cli.chat.session import Answer, Session, Turn
from softprompt_kernels.cli.display import on_terminal, show_side_by_side
from softprompt_kernels.cli.errors import message_of
from softprompt_kernels.cli.text import as_text
from softprompt_kernels.compress.report.answers import printable
from softprompt_kernels.compress.text_file import BOM
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.output_file import written_when_complete

FULL, SOFT, NOTHING = "full context", "soft prompt", "no context"
"""The names of what the model may read before the turns, in the order of a comparison."""

_PARTS = re.compile(r"\n|[^\S\n]+|\S+")
_COMMANDS = (
    ("/compare [TEXT]", "answer the last question, or TEXT, behind each of what the model can read, side by side"),
    ("/context [on|off]", "read the full text (on), or the soft prompt or nothing (off); alone: say what is read"),
    ("/undo", "forget the last question and its answer"),
    ("/reset", "forget all turns"),
    ("/save FILE", "write the turns to a new file of JSON"),
    ("/help", "this list"),
    ("/exit", "end, as Ctrl-D does; Ctrl-C stops an answer"),
)


class Terminal:
    """Reads questions and commands, and shows answers.

    Args:
        session: the conversation.
        about: what `/save` writes beside the turns.
    """

    def __init__(self, session: Session, about: Mapping[str, Any]) -> None:
        self.session, self.about = session, about
        self._saved: set[Path] = set()
        self._left_out = 0
        self._run: dict[str, Callable[[str], None]] = {
            "/compare": self._compare,
            "/context": self._context,
            "/undo": self._undo,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }

    def run(self) -> None:
        """Until the input ends."""
        if sys.stdin.isatty():
            notice(f"The model reads {self._in_use()}. /help lists the commands, Ctrl-D ends.")
        for line in _lines():
            if line.split() == ["/exit"]:
                return
            try:
                self.take(line)
            except KeyboardInterrupt:  # a second Ctrl-C, or one where no answer is written
                with _ctrl_c():  # pressed once more
                    notice("Stopped. The conversation is as before.")
            except BrokenPipeError:
                raise
            except Exception as error:
                message = message_of(error)
                if message is None:
                    raise
                notice(message[0].upper() + message[1:] + ("" if message.endswith(".") else "."), style="red")

    def take(self, line: str) -> None:
        """A question, or a command.

        Raises:
            SoftPromptError: it cannot be done. The conversation is as before.
        """
        name, _, argument = line.partition(" ")
        if not line.startswith("/"):
            self._ask(line.strip())
        elif argument.strip() and name in ("/undo", "/reset"):
            raise SoftPromptError(f"{name}: got {argument.strip()[:40]!r}, accepted is {name} alone")
        elif name in self._run:
            self._run[name](argument.strip())
        else:
            raise SoftPromptError(
                f"{name[:40]} is no command; /help lists them, and a question that starts with / needs a blank first"
            )

    def _ask(self, question: str) -> None:
        writer = _Writer()
        try:
            with _ctrl_c() as stopped:
                turn = self.session.ask(question, writer.write, stopped)
        finally:
            if writer.begun:
                typer.echo("")
        self._explain(turn)
        typer.echo("")

    def _explain(self, turn: Turn) -> None:
        """What the user could not see in the answer."""
        answer = turn.answer
        if answer.left_out != self._left_out and answer.left_out:
            notice(f"{_left_out(answer)}: the model's window is full.")
        self._left_out = answer.left_out
        if not answer.text:
            notice("The model ended its answer without a word.")
        if answer.end == "stopped":
            notice("Stopped. What was written is kept; /undo forgets it.")
        elif answer.end == "length":
            notice(f"The answer was cut at {self.session.settings.max_new_tokens} tokens (--max-new-tokens).")

    def _compare(self, argument: str) -> None:
        if len(self.session.names) == 1:
            raise SoftPromptError("/compare: there is nothing to compare without --prompt or --context")
        with _ctrl_c() as stopped:
            answers = self.session.compare(argument or None, stopped)
        if len(answers) < len(self.session.names) or any(answer.end == "stopped" for answer in answers.values()):
            notice("Stopped.")
            return
        question = argument or self.session.turns[-1].question
        names = [name for name in (FULL, SOFT, NOTHING) if name in answers]
        show_side_by_side(question, {name: answers[name].text for name in names})
        for name, answer in answers.items():
            if answer.left_out:
                notice(f"{name}: {_left_out(answer).lower()}.")

    def _context(self, argument: str) -> None:
        if argument:
            if argument not in ("on", "off"):
                raise SoftPromptError(f"/context: got {argument!r}, accepted are on and off")
            if FULL not in self.session.names:
                raise SoftPromptError("/context: there is no full text; it needs --context FILE at the start")
            self.session.read(FULL if argument == "on" else self._short)
        notice(f"The model reads {self._in_use()}.")

    @property
    def _short(self) -> str:
        """What is read instead of the full text."""
        return SOFT if SOFT in self.session.names else NOTHING

    def _in_use(self) -> str:
        described = {FULL: "the full text", SOFT: "the soft prompt", NOTHING: "nothing before the turns"}
        return described[self.session.reads]

    def _undo(self, _: str) -> None:
        turn = self.session.undo()
        notice("There is no turn to forget." if turn is None else f"Forgotten: {turn.question}")

    def _reset(self, _: str) -> None:
        count, self._left_out = self.session.reset(), 0
        notice(f"Forgotten: {count} turn{'' if count == 1 else 's'}.")

    def _save(self, argument: str) -> None:
        if not argument:
            raise SoftPromptError("/save: got no name, accepted is /save FILE")
        path = Path(argument).expanduser().absolute()
        if path.exists() and path not in self._saved:
            raise SoftPromptError(f"/save: {argument} is there already, accepted is the name of a new file")
        content = {**self.about, "messages": self.session.messages()}
        with written_when_complete("/save", path) as temporary:
            if temporary is not None:
                temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        self._saved.add(path)
        notice(f"Saved to {argument}.")

    def _help(self, _: str) -> None:
        width = max(len(name) for name, _ in _COMMANDS)
        for name, meaning in _COMMANDS:
            typer.echo(f"{name.ljust(width)}  {meaning}")


def notice(message: str, style: str = "dim") -> None:
    """One sentence on standard error, in a style where that is a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(printable(message), style=style), soft_wrap=True)


class _Writer:
    """Prints the parts of an answer without the blanks before its first word; on a terminal, words are not broken."""

    def __init__(self) -> None:
        self.begun = False
        self._width = shutil.get_terminal_size().columns if on_terminal() else sys.maxsize
        self._column, self._blanks = 0, ""

    def write(self, text: str) -> None:
        """Print a part. Blanks at its end wait for the next word."""
        from rich.cells import cell_len

        out = ""
        for part in _PARTS.findall(printable(text)):
            if part == "\n":
                out, self._column, self._blanks = out + (part if self.begun else ""), 0, ""
            elif part.isspace():
                self._blanks += part if self.begun else ""
            else:
                columns = cell_len(self._blanks + part)
                if self._column and self._column + columns > self._width:
                    out, self._column, self._blanks = f"{out}\n", 0, ""
                    columns = cell_len(part)
                out += self._blanks + part
                self._column, self._blanks, self.begun = self._column + columns, "", True
        typer.echo(out, nl=False)


def _left_out(answer: Answer) -> str:
    count = answer.left_out
    return "The oldest turn is left out" if count == 1 else f"The oldest {count} turns are left out"


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Within the context, the first Ctrl-C makes what is yielded true, and a second one is as outside."""
    event, outside = threading.Event(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or outside is not signal.default_int_handler:
        yield event.is_set
        return

    def stop(number: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, outside)

    signal.signal(signal.SIGINT, stop)
    try:
        yield event.is_set
    finally:
        signal.signal(signal.SIGINT, outside)


def _lines() -> Iterator[str]:
    """The lines that are not blank: typed with line editing, or from a pipe and repeated on standard output.

    Raises:
        SoftPromptError: standard input is not UTF-8.
    """
    typed = sys.stdin.isatty()
    if typed:
        with suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - gives input() its editing keys
    while True:
        try:
            line = input("> ") if typed else sys.stdin.readline()
        except EOFError:
            typer.echo("")
            return
        except KeyboardInterrupt:
            if not typed:
                raise
            with _ctrl_c():  # pressed once more
                typer.echo("")
                notice("Ctrl-D or /exit ends the chat.")
            continue
        except UnicodeDecodeError as error:
            raise SoftPromptError(f"standard input is not UTF-8 text ({error.reason})") from error
        if not typed and not line:
            return
        line = as_text(line.lstrip(BOM).rstrip(), "standard input")
        if line.strip():
            if not typed:
                typer.echo(f"> {printable(line.strip())}")
            yield line
