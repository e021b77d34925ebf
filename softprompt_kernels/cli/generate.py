"""`softprompt generate`: ask the model behind a soft prompt, behind the full text, or behind nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt_kernels.cli.display import on_terminal
from softprompt_kernels.cli.libraries import quiet_libraries
from softprompt_kernels.cli.options import DeviceName, DtypeName, ModelName, Seed
from softprompt_kernels.errors import SoftPromptError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from softprompt_kernels.prompts import Prefix

Questions = Annotated[
    list[str] | None, typer.Argument(help="What to ask; without any, each line of standard input.", show_default=False)
]
PromptFolder = Annotated[
    Path | None, typer.Option("--prompt", help="Folder of the saved prompt to answer with.", show_default=False)
]
ContextFile = Annotated[
    Path | None, typer.Option("--context", help="UTF-8 text to answer with, in full.", show_default=False)
]
Compare = Annotated[
    bool, typer.Option("--compare", help="Answer with the full text, the prompt and nothing, side by side.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Temperature of sampling; 0 takes the likeliest token.")]


def generate(
    questions: Questions = None,
    *,
    model: ModelName,
    prompt: PromptFolder = None,
    context: ContextFile = None,
    compare: Compare = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
) -> None:
    """Answer questions with a saved prompt, with a text in full, or with nothing before them."""
    check_arguments(questions, prompt, context, compare)
    import torch

    from softprompt_kernels.compress import ChatFormat, load_model
    from softprompt_kernels.compress.initial_prompt import nothing
    from softprompt_kernels.compress.inputs import read_text
    from softprompt_kernels.prompts.adapter import describe

    text = None if context is None else read_text(context, "context")
    if prompt is not None:
        describe(prompt)  # before the model is loaded
    quiet_libraries()
    loaded, tokenizer = load_model(model, dtype, device)
    chat = ChatFormat(tokenizer)
    settings = generation_config(loaded, tokenizer, max_new_tokens, temperature)
    soft = None if prompt is None else load_prompt(prompt, loaded, tokenizer)
    full = None if text is None else read_context(loaded, chat.context_ids(text))
    bare = nothing(loaded, chat)
    torch.manual_seed(seed)

    def answer(question: str, prefix: Prefix | None, **options: Any) -> str:
        ids = torch.tensor([chat.query_ids(question)], device=loaded.device)
        return answer_to(loaded, tokenizer, ids, prefix, generation_config=settings, **options)

    if compare:
        for question in asked(questions):
            columns = {"full text": full, "soft prompt": soft, "nothing": bare}
            show_side_by_side(question, {name: answer(question, prefix) for name, prefix in columns.items()})
        return
    from transformers import TextStreamer

    prefix = full if full is not None else soft if soft is not None else bare
    several = questions is not None and len(questions) > 1
    for question in asked(questions):
        if several:
            typer.echo(f"> {question}")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer(question, prefix, streamer=streamer)
        if several:
            typer.echo("")


def check_arguments(questions: Sequence[str] | None, prompt: Path | None, context: Path | None, compare: bool) -> None:
    """Refuses options that say two things at once, before anything is loaded."""
    if compare and (prompt is None or context is None):
        raise SoftPromptError("--compare: needs both, --prompt and --context")
    if prompt is not None and context is not None and not compare:
        raise SoftPromptError("--context: got --prompt too, accepted is one of them, or --compare with both")
    if any(not question.strip() for question in questions or ()):
        raise SoftPromptError("questions: got an empty one, accepted is a text with at least a word")


def asked(questions: Sequence[str] | None) -> Iterator[str]:
    """The questions of the command line, or those that come in on standard input, a line each."""
    if questions:
        yield from questions
        return
    number = 0
    while True:
        if sys.stdin.isatty():
            typer.echo("? ", nl=False, err=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise SoftPromptError(f"questions: standard input is not UTF-8 text ({error.reason})") from error
        if not line:
            break
        if line.strip():
            number += 1
            yield line.strip()
    if not number:
        raise SoftPromptError("questions: got none, neither as arguments nor on standard input")


def generation_config(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Plain sampling at `temperature`, or the likeliest token at 0; ends where model or tokenizer say that it ends."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=1.0,
        eos_token_id=sorted(ids) or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ids, default=0),
        **sampling,
    )


def load_prompt(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Prefix | None:
    """A saved prompt as a prefix."""
    import torch

    from softprompt_kernels.models import prefix_of
    from softprompt_kernels.prompts import load

    prompt, _ = load(path, model, tokenizer)
    with torch.no_grad():
        return prefix_of(model, prompt)


def read_context(model: PreTrainedModel, ids: Any) -> Prefix:
    """A text as a prefix; `ids [1, C]`."""
    from softprompt_kernels.compress.run import CAPTURE_TOKENS
    from softprompt_kernels.models import capture

    return capture(model, ids.to(model.device), CAPTURE_TOKENS)


def answer_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Any, prefix: Prefix | None, **options: Any
) -> str:
    """The answer to a question, `ids [1, M]`, behind a prefix."""
    import torch

    from softprompt_kernels.models import generate as generate_behind

    with torch.no_grad():
        tokens = generate_behind(model, ids, prefix, **options)
    return str(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def show_side_by_side(question: str, answers: dict[str, str]) -> None:
    """One question and its answers: columns on a terminal, indented lines elsewhere."""
    if not on_terminal():
        width = max(map(len, answers))
        typer.echo(f"> {question}")
        for name, text in answers.items():
            lines = text.splitlines() or [""]
            typer.echo(f"  {name.ljust(width)} | {lines[0]}")
            for line in lines[1:]:
                typer.echo(f"  {' ' * width} | {line}")
        typer.echo("")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(question, style="bold"), title_justify="left", expand=True, header_style="bold")
    for name in answers:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in answers.values()))
    Console().print(table)
