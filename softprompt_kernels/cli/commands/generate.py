"""`softprompt generate`: answers questions with a soft prompt, with the full text, or without either."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt_kernels.cli.display import show_side_by_side
from softprompt_kernels.cli.options import (
    DeviceName,
    DtypeName,
    Force,
    ModelName,
    Seed,
    TemplateArguments,
    parse_template_arguments,
)
from softprompt_kernels.cli.quiet import quiet_libraries
from softprompt_kernels.cli.text import as_text
from softprompt_kernels.compress.text_file import BOM
from softprompt_kernels.errors import SoftPromptError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from softprompt_kernels.compress import ChatFormat
    from softprompt_kernels.prompts import Prefix

Questions = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="QUESTION",
        help="The questions. Without any, each line of standard input is one.",
        show_default=False,
    ),
]
PromptFolder = Annotated[
    Path | None, typer.Option("--prompt", help="Answer with the saved prompt in this folder.", show_default=False)
]
ContextFile = Annotated[
    Path | None, typer.Option("--context", help="Answer with the full text of this UTF-8 file.", show_default=False)
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Answer with the full text, with the prompt and without context, side by side. "
        "Needs --prompt and --context.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="Sampling temperature; 0 is greedy.")]


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
    template_arguments: TemplateArguments = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    force: Force = False,
) -> None:
    """Answer questions with a saved prompt, with a full text, or without context."""
    questions = [as_text(question, "questions") for question in questions or ()]
    check_arguments(questions, prompt, context, compare)
    arguments = parse_template_arguments(template_arguments)
    import torch

    from softprompt_kernels.compress import ChatFormat, load_model
    from softprompt_kernels.compress.inputs import read_text
    from softprompt_kernels.compress.saved_prompt import recorded_arguments
    from softprompt_kernels.compress.sources.model import check_ids
    from softprompt_kernels.compress.teacher.context import capture_context, no_context_prefix
    from softprompt_kernels.prompts.adapter import describe

    text = None if context is None else read_text(context, "context")
    if prompt is not None:
        _, record = describe(prompt)  # raises before the model is loaded if this is not a saved prompt
        arguments = recorded_arguments(record) if arguments is None else arguments
    quiet_libraries()
    loaded, tokenizer = load_model(model, dtype, device)
    chat = ChatFormat(tokenizer, arguments)
    settings = generation_config(loaded, chat, max_new_tokens, temperature)
    soft = None if prompt is None else load_prompt(prompt, loaded, tokenizer, force)
    full = None
    if text is not None:
        ids = chat.context_ids(text)
        check_ids(loaded, tokenizer, ids[0].tolist(), "context")
        full = capture_context(loaded, ids)
    no_context = no_context_prefix(loaded, chat)
    torch.manual_seed(seed)

    def answer(question: str, prefix: Prefix | None, **options: Any) -> str:
        question_ids = chat.query_ids(question)
        check_ids(loaded, tokenizer, question_ids, f"questions: {question[:40]!r}")
        ids = torch.tensor([question_ids], device=loaded.device)
        return answer_to(loaded, tokenizer, ids, prefix, generation_config=settings, **options)

    if compare:
        for question in read_questions(questions):
            prefixes = {"full context": full, "soft prompt": soft, "no context": no_context}
            show_side_by_side(question, {name: answer(question, prefix) for name, prefix in prefixes.items()})
        return
    from transformers import TextStreamer

    prefix = full if full is not None else soft if soft is not None else no_context
    several = len(questions) > 1
    for question in read_questions(questions):
        if several:
            typer.echo(f"> {question}")
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        answer(question, prefix, streamer=streamer)
        if several:
            typer.echo("")


def check_arguments(questions: Sequence[str], prompt: Path | None, context: Path | None, compare: bool) -> None:
    """Check the arguments against each other, before anything is loaded.

    Raises:
        SoftPromptError: they contradict each other, or a question is empty.
    """
    if compare and (prompt is None or context is None):
        raise SoftPromptError("--compare: needs both --prompt and --context")
    if prompt is not None and context is not None and not compare:
        raise SoftPromptError("--context: got --prompt too, accepted is one of them, or both with --compare")
    if any(not question.strip() for question in questions):
        raise SoftPromptError("questions: got an empty one, accepted is text with at least one word")


def read_questions(questions: Sequence[str]) -> Iterator[str]:
    """The questions of the command line, or else the lines of standard input.

    Raises:
        SoftPromptError: there is no question, or standard input is not UTF-8.
    """
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
        line = line.lstrip(BOM)  # of a shell that starts a pipe with one
        if line.strip():
            number += 1
            yield as_text(line.strip(), "questions: standard input")
    if not number:
        raise SoftPromptError("questions: got none, accepted are arguments or lines on standard input")


def generation_config(
    model: PreTrainedModel, chat: ChatFormat, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Sampling from the full distribution at `temperature`, greedy at 0. Stops where the teacher of a run does."""
    from transformers import GenerationConfig

    from softprompt_kernels.compress.teacher.answers import end_tokens

    ids, padding = end_tokens(model, chat), chat.tokenizer.pad_token_id
    sampling: dict[str, Any] = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        repetition_penalty=1.0,
        eos_token_id=sorted(ids) or None,
        pad_token_id=padding if padding is not None else min(ids, default=0),
        **sampling,
    )


def load_prompt(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, force: bool) -> Prefix | None:
    """The prefix of a saved prompt; `force` as in `load`."""
    import torch

    from softprompt_kernels.models import prefix_of
    from softprompt_kernels.prompts import load

    prompt, _ = load(path, model, tokenizer, force=force)
    with torch.no_grad():
        return prefix_of(model, prompt)


def answer_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Any, prefix: Prefix | None, **options: Any
) -> str:
    """The answer to a question, `ids [1, M]`, behind a prefix; None: no prefix."""
    import torch

    from softprompt_kernels.models import generate as generate_tokens

    with torch.no_grad():
        tokens = generate_tokens(model, ids, prefix, **options)
    return str(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)).strip()
