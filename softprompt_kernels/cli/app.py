"""The commands and the way into them."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from softprompt_kernels.cli.boundary import guarded
from softprompt_kernels.cli.compress import compress
from softprompt_kernels.cli.doctor import doctor
from softprompt_kernels.cli.evaluate import evaluate
from softprompt_kernels.cli.generate import generate


def _paragraphs(docstring: str | None) -> str:
    """A docstring without the line breaks within its paragraphs, for a terminal of any width."""
    return "\n\n".join(" ".join(part.split()) for part in (docstring or "").split("\n\n"))


app = typer.Typer(
    name="softprompt",
    help="Compress a long text into a soft prompt: the model answers nearly as if it had the text before it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # a defect of ours is shown as Python shows it
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (compress, generate, evaluate, doctor):
    app.command(help=_paragraphs(_command.__doc__))(guarded(_command))


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line and exits: 0 done, 2 input that cannot be served, 130 stopped by Ctrl-C.

    Args:
        args: what follows the command's name; None: what the process was started with.
    """
    app(args=args, prog_name="softprompt")
