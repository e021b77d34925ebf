"""`softprompt import`: makes a saved prompt of this package from one of other software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from softprompt_kernels.cli.options import DeviceName, DtypeName, Force, ModelName
from softprompt_kernels.cli.quiet import quiet_libraries

Source = Literal["auto", "folder", "peft", "safetensors", "cartridges", "vllm-embeds"]
Stored = Literal["float32", "bfloat16", "float16", "int8"]
QueriesAt = Literal["k", "0"]

PromptPath = Annotated[Path, typer.Argument(metavar="PROMPT", help="File or folder of the prompt.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", help="Folder of the saved prompt.")]
From = Annotated[Source, typer.Option("--from", help="Format of the prompt. auto: found from the content.")]
StoredDtype = Annotated[Stored, typer.Option(help="Dtype of the stored numbers.")]
Positions = Annotated[
    QueriesAt,
    typer.Option(
        help="Where the tokens after a cache of Cartridges start. k: behind it, as in Cartridges' own models. 0: for "
        "caches of code that counts them anew; their keys are moved."
    ),
]


def import_(
    path: PromptPath,
    *,
    model: ModelName,
    output: Output,
    source: From = "auto",
    queries_at: Positions = "k",
    stored_dtype: StoredDtype = "float32",
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    force: Force = False,
) -> None:
    """Make a saved prompt from a prompt of PEFT, a cache of Cartridges, or a file of this package.

    Its shapes are checked against the model, and the fingerprint of the model is recorded. Then evaluate, generate and
    serve take it. No code of a file is run.
    """
    from softprompt_kernels.formats.content import check_other_place
    from softprompt_kernels.formats.files import read
    from softprompt_kernels.formats.importing import import_prompt
    from softprompt_kernels.prompts import check_destination

    quiet_libraries()
    check_other_place("--output", output, path)
    check_destination(output)
    content = read(path, None if source == "auto" else source, queries_at)
    from softprompt_kernels.compress import load_model

    loaded, tokenizer = load_model(model, dtype, device)
    import_prompt(content, loaded, tokenizer, output, dtype=stored_dtype, force=force)
    moved = "" if content.first_query == "k" else f", its keys moved by {content.prompt.length} positions"
    typer.echo(f"{output}: {content.prompt.length} tokens from {content.format}{moved}")
