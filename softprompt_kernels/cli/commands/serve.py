"""`softprompt serve`: an endpoint with OpenAI's protocol for a model and many saved prompts."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from softprompt_kernels.cli.errors import Stopped
from softprompt_kernels.cli.options import (
    DeviceName,
    DtypeName,
    Force,
    ModelName,
    TemplateArguments,
    parse_template_arguments,
)
from softprompt_kernels.cli.quiet import quiet_libraries
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.sizes import size

KEY = "SOFTPROMPT_API_KEY"
Prompts = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", metavar="NAME=FOLDER", help="Serve the prompt in this folder under a name. Any number of times."
    ),
]
Folder = Annotated[
    Path | None, typer.Option("--prompts", help="Serve each prompt and each finished run in this folder.")
]
BaseName = Annotated[str | None, typer.Option(help="Name of the model without a prompt. Default: that of its folder.")]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar=KEY, help="Requests must have this key. The variable keeps it out of the list of processes."),
]
Open = Annotated[bool, typer.Option("--open", help="Listen on other addresses than 127.0.0.1 without a key.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Answers that are decoded together.")]
Queue = Annotated[int, typer.Option(min=0, help="Answers that may wait for that. More are refused for a while (429).")]
MaxTokens = Annotated[int, typer.Option(min=2, help="Tokens of a request and its answer together, at most.")]
MaxBody = Annotated[int, typer.Option(min=1, help="Bytes of a request, at most.")]
System = Annotated[
    Literal["refuse", "join"],
    typer.Option(help="System messages: refuse them, or join them to the user's first message."),
]
Grace = Annotated[
    float, typer.Option(min=0, max=86400, help="Seconds that running answers have to end after Ctrl-C or SIGTERM.")
]
AccessLog = Annotated[bool, typer.Option("--access-log", help="Print a line for each request.")]


def serve(
    *,
    model: ModelName,
    prompt: Prompts = None,
    prompts: Folder = None,
    base_name: BaseName = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: ApiKey = None,
    open_to_all: Open = False,
    batch_size: BatchSize = 32,
    queue: Queue = 256,
    max_tokens: MaxTokens = 2048,
    max_body: MaxBody = 2**20,
    system: System = "refuse",
    grace: Grace = 10.0,
    access_log: AccessLog = False,
    template_arguments: TemplateArguments = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    force: Force = False,
) -> None:
    """Serve a model and many saved prompts to OpenAI's clients.

    A request's `model` chooses the prompt. Requests for different prompts are decoded together.
    """
    arguments = parse_template_arguments(template_arguments)
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise SoftPromptError(f'serve needs {" and ".join(missing)}: pip install --editable ".[serve]"')
    if api_key is not None and (not api_key.strip() or not api_key.isascii() or not api_key.isprintable()):
        raise SoftPromptError("--api-key: got an empty key or odd characters, accepted are printable ASCII characters")
    from softprompt_kernels.serve.bank import load_bank, named_prompts
    from softprompt_kernels.serve.gate import is_loopback
    from softprompt_kernels.serve.server import Options, Server, Work, cache_bytes, open_socket

    if not is_loopback(host) and api_key is None and not open_to_all:
        raise SoftPromptError(
            f"--host: got {host} without a key, where others could use the model; set --api-key or {KEY}, or "
            "accept that with --open"
        )
    folders = named_prompts(prompt or (), prompts)
    listener = open_socket(host, port)
    quiet_libraries()
    typer.echo(f"Loading {model}", err=True)
    bank = load_bank(
        model,
        folders,
        base_name=base_name,
        template_arguments=arguments,
        dtype=dtype,
        device=device,
        force=force,
    )
    options = Options(api_key, is_loopback(host) and api_key is None, max_body, max_tokens, system)
    server = Server(
        bank,
        listener,
        options,
        Work(batch_size, queue, grace),
        access_log=access_log,
        ready=lambda: typer.echo(f"Serving on {server.address} (Ctrl-C ends it)", err=True),
    )
    held = "" if bank.prefix is None else f"Prompts take {size(bank.prefix.nbytes)}. "
    most = size(cache_bytes(bank, batch_size, max_tokens))
    typer.echo(f"{held}Requests take up to {most}, if {batch_size} have {max_tokens} tokens each.", err=True)
    for served in bank.served.values():
        what = f"prompt of {served.tokens} tokens" if served.tokens else "the model without a prompt"
        typer.echo(f"  {served.name}: {what}", err=True)
    number = server.run()
    if number is not None:
        raise Stopped("Stopped.", number)
