"""The command line application: its commands and its entry point."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from softprompt_kernels.cli.commands.bench import bench
from softprompt_kernels.cli.commands.chat import chat
from softprompt_kernels.cli.commands.compose import compose
from softprompt_kernels.cli.commands.compress import compress
from softprompt_kernels.cli.commands.diagnose import diagnose
from softprompt_kernels.cli.commands.evaluate import evaluate
from softprompt_kernels.cli.commands.export import export
from softprompt_kernels.cli.commands.generate import generate
from softprompt_kernels.cli.commands.import_prompt import import_
from softprompt_kernels.cli.commands.inspect_prompt import inspect
from softprompt_kernels.cli.commands.profile import profile
from softprompt_kernels.cli.commands.push import push
from softprompt_kernels.cli.commands.read import read
from softprompt_kernels.cli.commands.report import report
from softprompt_kernels.cli.commands.serve import serve
from softprompt_kernels.cli.commands.train_compressor import train_compressor
from softprompt_kernels.cli.doctor.report import doctor
from softprompt_kernels.cli.errors import with_error_messages
from softprompt_kernels.cli.text import prepare_streams


def _unwrap(docstring: str | None) -> str:
    """A docstring without the line breaks inside its paragraphs, for a terminal of any width."""
    return "\n\n".join(" ".join(part.split()) for part in (docstring or "").split("\n\n"))


app = typer.Typer(
    name="softprompt",
    help="Compress a long text into a soft prompt. With it, the model answers nearly as if it had read the text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,  # an unexpected exception is shown as Python shows it
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (
    compress,
    compose,
    train_compressor,
    read,
    evaluate,
    diagnose,
    report,
    generate,
    chat,
    serve,
    export,
    import_,
    inspect,
    push,
    bench,
    profile,
    doctor,
):
    app.command(_command.__name__.rstrip("_").replace("_", "-"), help=_unwrap(_command.__doc__))(
        with_error_messages(_command)
    )


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 success, 2 invalid input, 128 + n stopped by signal n (Ctrl-C: 130).

    Args:
        args: the arguments after the name of the program; None: those of this process.
    """
    prepare_streams()
    app(args=args, prog_name="softprompt")
