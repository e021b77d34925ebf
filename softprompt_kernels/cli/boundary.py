"""What a command's errors become: one sentence and an exit code.

| raised | printed on stderr | code |
|---|---|---|
| SoftPromptError | its sentence | 2 |
| disk full, no permission, any other OSError; a broken safetensors file | what and where | 2 |
| out of memory | so, and what to make smaller | 2 |
| Ctrl-C | so | 130 |
| anything else | the traceback: a defect of ours | 1 |

With `--debug` the first three show their traceback too.
"""

from __future__ import annotations

import errno
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer

from softprompt_kernels.errors import SoftPromptError

Debug = Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")]
NO_MEMORY = (
    "memory ran out; a smaller --micro-batch-size, --sample-batch or --batch-size needs less, "
    "and so does --gradient-checkpointing"
)


class Stopped(Exception):
    """Ctrl-C, with a sentence of its own."""


def guarded(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `--debug`, and with its errors as sentences."""

    @functools.wraps(command)
    def run(*args: Any, debug: bool, **options: Any) -> None:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                command(*args, **options)
            except (Stopped, KeyboardInterrupt) as error:
                typer.echo(f"\n{error or 'Interrupted.'}", err=True)
                raise typer.Exit(130) from None
            except BrokenPipeError:
                raise  # the reader of our output has gone: typer ends without a word
            except Exception as error:
                sentence = sentence_of(error)
                if debug or sentence is None:
                    raise
                typer.echo(f"{typer.style('Error:', fg='red', bold=True)} {sentence}", err=True)
                raise typer.Exit(2) from None

    signature = inspect.signature(command, eval_str=True)
    option = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    return run


def sentence_of(error: Exception) -> str | None:
    """What to tell a user, None for what no user can have caused."""
    text = " ".join(str(error).split())
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in text:
        place = getattr(error, "filename", None)
        return "the disk is full" + (f", writing {place}" if place else "") + "; what was saved before is whole"
    if isinstance(error, SoftPromptError):
        return text
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in text:
        return NO_MEMORY
    if type(error).__name__ == "SafetensorError":
        return f"a safetensors file is truncated or broken ({text})"
    if isinstance(error, ValueError) and text.startswith("backend"):
        return f"SOFTPROMPT_BACKEND: {text}"  # no command has an option for it
    return None


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"{typer.style('Warning:', fg='yellow')} {' '.join(str(message).split())}", err=True)
