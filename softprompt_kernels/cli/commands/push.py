"""`softprompt push`: uploads a saved prompt to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompt_kernels.cli.quiet import quiet_libraries

PromptPath = Annotated[Path, typer.Argument(metavar="PROMPT", help="Folder of the saved prompt.", show_default=False)]
Repository = Annotated[str, typer.Option("--repo", help="USER/NAME of the repository. It is made if there is none.")]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")]
BaseModel = Annotated[
    str | None,
    typer.Option(help="Name of the base model on the hub, if the prompt names a local folder.", show_default=False),
]


def push(prompt: PromptPath, *, repo: Repository, private: Private = False, base_model: BaseModel = None) -> None:
    """Upload a saved prompt to the Hugging Face hub, with a model card.

    The text that was compressed, queries and local paths are not uploaded. The text can still be asked out of a prompt:
    publish it only if you may publish the text.
    """
    quiet_libraries()
    from softprompt_kernels.formats.files import read
    from softprompt_kernels.formats.hub import push as upload

    address = upload(prompt, read(prompt), repo, private=private, base_model=base_model)
    typer.echo(f"{prompt} is at {address}")
