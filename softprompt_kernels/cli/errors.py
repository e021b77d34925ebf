"""Errors of a command as one message and an exit code.

| raised | printed on stderr | exit code |
|---|---|---|
| SoftPromptError | its message | 2 |
| disk full, no permission, any other OSError; a damaged safetensors file | what and where | 2 |
| out of memory | which options need less | 2 |
| Ctrl-C | "Interrupted." or how to resume | 130 |
| SIGTERM, SIGHUP while `compress` works | how to resume | 143, 129 |
| anything else | the traceback: it is a bug of this package | 1 |

With `--debug` the first three show their traceback too. Of the processes of one run, the first prints.
"""

from __future__ import annotations

import errno
import functools
import inspect
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Annotated, Any

import typer

from softprompt_kernels.compress.parallel.launch import is_first
from softprompt_kernels.errors import SoftPromptError, is_out_of_memory

Debug = Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error.")]
OUT_OF_MEMORY = (
    "out of memory; a smaller --micro-batch-size, --sample-batch or --batch-size needs less, "
    "and so does --gradient-checkpointing"
)


class Stopped(Exception):
    """Ctrl-C or another signal, with a message that says how to resume."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def resumable() -> Iterator[None]:
    """Turns a stopped compression into `Stopped`, with how to go on."""
    from softprompt_kernels.compress.process.interrupted import Interrupted
    from softprompt_kernels.compress.process.signals import signal_of

    again = "Run the same command again to resume"
    try:
        yield
    except Interrupted as stop:
        text = f"Stopped {stop.where}. The state is saved in {stop.output}. {again}."
        raise Stopped(text, stop.signal) from None
    except KeyboardInterrupt as stop:
        raise Stopped(f"Interrupted. {again} with what is already saved.", signal_of(stop)) from None


def with_error_messages(command: Callable[..., None]) -> Callable[..., None]:
    """Adds `--debug` to a command, and turns its errors into messages and exit codes."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                command(*args, **options)
            except (Stopped, KeyboardInterrupt) as error:
                with suppress(OSError):  # the terminal is gone
                    if not _first_tells():
                        typer.echo(f"\n{str(error) or 'Interrupted.'}", err=True)
                raise typer.Exit(error.exit_code if isinstance(error, Stopped) else 130) from None
            except BrokenPipeError:
                raise  # the reader of stdout has closed it: typer exits silently
            except Exception as error:
                message = message_of(error)
                if debug or message is None:
                    raise
                if not _first_tells():
                    typer.echo(f"{typer.style('Error:', fg='red', bold=True)} {message}", err=True)
                raise typer.Exit(2) from None

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    parameters = [*signature.parameters.values(), option]
    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return run


def _first_tells() -> bool:
    """Whether this is one of many processes of a run, and the first of them says what stopped it."""
    if is_first():
        return False
    from softprompt_kernels.compress.parallel import ranks

    return ranks.told()


def message_of(error: Exception) -> str | None:
    """The message for the user; None for a bug of this package."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        file = getattr(error, "filename", None)
        return "the disk is full" + (f", writing {file}" if file else "") + "; files saved before are intact"
    if isinstance(error, SoftPromptError):
        return text
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    if type(error).__name__ == "SafetensorError":
        return f"a safetensors file is truncated or damaged ({text})"
    if isinstance(error, UnicodeEncodeError):  # a path of other bytes, or one that the terminal's encoding lacks
        return f"{error.object!a} cannot be written in {error.encoding}"
    if isinstance(error, ValueError) and text.startswith("backend"):
        return f"SOFTPROMPT_BACKEND: {text}" if os.environ.get("SOFTPROMPT_BACKEND") else text
    return None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    if is_first():
        typer.echo(f"{typer.style('Warning:', fg='yellow')} {' '.join(str(message).split())}", err=True)
