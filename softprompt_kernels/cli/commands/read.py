"""`softprompt read`: makes a prompt of a text in one forward pass, with a compressor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompt_kernels.cli.display import show_pairs
from softprompt_kernels.cli.options import (
    DeviceName,
    DtypeName,
    ModelName,
    as_loaded,
    parse_template_arguments,
)
from softprompt_kernels.cli.quiet import quiet_libraries

ContextFile = Annotated[Path, typer.Argument(metavar="CONTEXT", help="File with the text, in UTF-8.")]
CompressorFolder = Annotated[Path, typer.Option("--compressor", help="Folder that train-compressor saved.")]
TemplateArguments = Annotated[
    str | None,
    typer.Option(help="Arguments of the chat template. Default: those that the compressor was trained with."),
]
PromptFolder = Annotated[Path, typer.Option("--output", help="Folder of the prompt; one that is there is replaced.")]


def read(
    context: ContextFile,
    *,
    model: ModelName,
    compressor: CompressorFolder,
    output: PromptFolder,
    template_arguments: TemplateArguments = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> None:
    """Make a soft prompt of a text in one forward pass, with a compressor.

    There are no queries, no answers of a teacher and no training, so nothing says how good the prompt is:
    `softprompt evaluate` does. `softprompt compress --init compressor` reads the text the same way, evaluates the
    prompt and trains it further.
    """
    arguments = parse_template_arguments(template_arguments)
    quiet_libraries()
    from softprompt_kernels.compress import read_context

    sizes = read_context(model, context, compressor, output, template_arguments=arguments, dtype=dtype, device=device)
    tokens, prompt = sizes["context_tokens"], sizes["prompt_tokens"]
    show_pairs(
        [
            ("context", f"{tokens} tokens"),
            ("prompt", f"{prompt} tokens ({tokens / prompt:.1f}x) in {output}"),
            ("try it", f'softprompt generate {as_loaded(model, dtype)} --prompt {output} "..."'),
        ]
    )
