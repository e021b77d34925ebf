"""`softprompt export`: writes a prompt for other software, or in fewer bits, and shows what rounding costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from softprompt_kernels.cli.display import show_table
from softprompt_kernels.cli.options import DeviceName, Force, Seed
from softprompt_kernels.cli.quiet import quiet_libraries
from softprompt_kernels.cli.rounding_loss import Asked, check_asked, errors_text, measured_loss, relative_errors
from softprompt_kernels.cli.text import as_text
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.output_file import check_output
from softprompt_kernels.sizes import size

if TYPE_CHECKING:
    from softprompt_kernels.formats.content import Content

Target = Literal["folder", "peft", "safetensors", "cartridges", "vllm-embeds"]
Stored = Literal["float32", "bfloat16", "float16", "int8"]
PeftType = Literal["CARTRIDGE", "PREFIX_TUNING", "PROMPT_TUNING"]

PromptPath = Annotated[
    Path, typer.Argument(metavar="PROMPT", help="File or folder of a prompt, in any format.", show_default=False)
]
Output = Annotated[Path, typer.Option("--output", help="File or folder to write.")]
To = Annotated[
    Target,
    typer.Option(
        "--to",
        help="folder: of this package, in any dtype. peft: for PeftModel.from_pretrained. safetensors: one plain file. "
        "cartridges: a cache of HazyResearch's Cartridges. vllm-embeds: for vLLM's prompt embeddings.",
    ),
]
Dtype = Annotated[Stored, typer.Option("--dtype", help="Dtype of the stored numbers. int8: only with --to folder.")]
Type = Annotated[
    PeftType | None,
    typer.Option(
        "--type",
        help="Type of a PEFT adapter. Default: CARTRIDGE for keys and values, PROMPT_TUNING for vectors. With --model, "
        "vectors are turned into keys and values for the first two.",
        show_default=False,
    ),
]
QueriesAt = Annotated[
    Literal["k", "0"],
    typer.Option(
        help="With cartridges: where the tokens after the cache start. k: as in Cartridges' own models. 0: for code "
        "that counts them anew; keys are moved, and --model is needed."
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(help="Name of the base model to write, such as its name on the hub.", show_default=False),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The prompt's model. Needed for --question, and to measure what rounding costs.",
        show_default=False,
    ),
]
Queries = Annotated[
    Path | None,
    typer.Option(help="Measure the cost of --dtype on the queries of this file of JSON Lines.", show_default=False),
]
ContextFile = Annotated[
    Path | None,
    typer.Option("--context", help="With --queries: compare with the full text in this file.", show_default=False),
]
Question = Annotated[
    str | None,
    typer.Option(
        help="With vllm-embeds: write the JSON body of a request to /v1/completions that asks this.", show_default=False
    ),
]
ServedName = Annotated[
    str | None, typer.Option(help="With --question: the model's name on the server. Default: --model.")
]
NewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")]


def export(
    prompt: PromptPath,
    *,
    output: Output,
    to: To = "folder",
    dtype: Dtype = "float32",
    peft_type: Type = None,
    queries_at: QueriesAt = "k",
    base_model: BaseModel = None,
    model: ModelOption = None,
    queries: Queries = None,
    context: ContextFile = None,
    question: Question = None,
    served_name: ServedName = None,
    new_tokens: NewTokens = 48,
    seed: Seed = 0,
    device: DeviceName = "auto",
    force: Force = False,
) -> None:
    """Write a prompt for other software, or in 16 or 8 bits.

    With a --dtype other than float32 it prints what rounding costs: the relative error of the numbers; with --model and
    --queries the KL to the unrounded prompt; with --context too, the recovered fraction before and after.
    """
    check_asked(model, context, queries, ("--context", "--queries"))
    if queries is not None and dtype == "float32":
        raise SoftPromptError("--queries: got them with --dtype float32, which rounds nothing; accepted are the others")
    if question is not None:
        question = as_text(question, "--question")
        check_question(question, to, model)
    elif served_name is not None:
        raise SoftPromptError("--served-name: got it without --question, accepted are both")
    quiet_libraries()
    from softprompt_kernels.formats.content import check_other_place
    from softprompt_kernels.formats.exporting import check_export
    from softprompt_kernels.formats.exporting import export as write
    from softprompt_kernels.formats.files import read
    from softprompt_kernels.formats.importing import check_fit
    from softprompt_kernels.formats.inspection import size_of

    check_other_place("--output", output, prompt)
    if question is not None:
        check_output("--output", output)
    else:
        check_export(output, to, dtype, peft_type, queries_at, model is not None)
    content = read(prompt)
    loaded = None
    if model is not None:
        from softprompt_kernels.compress import load_model

        loaded = load_model(model, "auto", device)
        check_fit(content, *loaded, force)
    if question is not None:
        assert loaded is not None and model is not None
        write_request(content, loaded, question, output, served_name or model, dtype, new_tokens)
        return
    write(
        content,
        to,
        output,
        dtype=dtype,
        kv_type=peft_type,
        queries_at=queries_at,
        model=None if loaded is None else loaded[0],
        base_model=base_model,
    )
    typer.echo(f"{output}: {to}, {content.prompt.length} tokens in {dtype}, {size(size_of(output))}")
    if dtype != "float32":
        show_loss(content, dtype, loaded, None if queries is None else Asked(queries, context, new_tokens, seed))


def show_loss(content: Content, dtype: Stored, loaded: Any, asked: Asked | None) -> None:
    """Print what rounding costs."""
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.prompts.weights import rounded

    after = rounded(content.prompt, dtype)
    typer.echo(errors_text(relative_errors(content.prompt, after)))
    if asked is None:
        return
    from softprompt_kernels.compress import ChatFormat
    from softprompt_kernels.compress.saved_prompt import recorded_arguments

    model, tokenizer = loaded
    chat = ChatFormat(tokenizer, recorded_arguments(content.record))
    header, rows = measured_loss(model, chat, content.prompt, after, asked, terminal_reporter())
    typer.echo("")
    show_table(header, rows)


def check_question(question: str, to: str, model: str | None) -> None:
    """Check the options of a request.

    Raises:
        SoftPromptError: the format has no requests, the question is empty, or the model is missing.
    """
    if to != "vllm-embeds":
        raise SoftPromptError(f"--question: got it with --to {to}, accepted is --to vllm-embeds")
    if not question.strip():
        raise SoftPromptError("--question: got an empty one, accepted is text with at least one word")
    if model is None:
        raise SoftPromptError(
            "--question: got it without --model, whose embedding gives the vectors of the question; accepted are both"
        )


def write_request(
    content: Content, loaded: Any, question: str, output: Path, served_name: str, dtype: str, new_tokens: int
) -> None:
    """Write the JSON body of a request to vLLM."""
    from softprompt_kernels.compress import ChatFormat
    from softprompt_kernels.compress.saved_prompt import recorded_arguments
    from softprompt_kernels.compress.sources.model import check_ids
    from softprompt_kernels.compress.teacher.answers import end_tokens
    from softprompt_kernels.formats.exporting import write_file
    from softprompt_kernels.formats.vllm import completion_request, is_request

    if output.exists() and not is_request(output):
        raise SoftPromptError(f"--output: {output} exists and is no request for vLLM; accepted is a new path")
    model, tokenizer = loaded
    chat = ChatFormat(tokenizer, recorded_arguments(content.record))
    ids = chat.query_ids(question)
    check_ids(model, tokenizer, ids, "--question")
    body = completion_request(
        model,
        content.prompt,
        ids,
        served_name=served_name,
        max_tokens=new_tokens,
        stop_token_ids=sorted(end_tokens(model, chat)),
        dtype=dtype,
    )
    write_file(output, (json.dumps(body) + "\n").encode())
    typer.echo(
        f"{output}: a request to /v1/completions of `vllm serve {served_name} --enable-prompt-embeds`, "
        f"{content.prompt.length} + {len(ids)} vectors"
    )
