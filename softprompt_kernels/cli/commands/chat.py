"""`softprompt chat`: a conversation of several turns with a soft prompt, a full text or neither."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softprompt_kernels.cli.commands.generate import (
    MaxNewTokens,
    PromptFolder,
    Temperature,
    generation_config,
    load_prompt,
)
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
from softprompt_kernels.errors import SoftPromptError

if TYPE_CHECKING:
    from softprompt_kernels.cli.chat.session import Source
    from softprompt_kernels.prompts import Prefix

ContextFile = Annotated[
    Path | None,
    typer.Option(
        "--context",
        help="The full text, a UTF-8 file: for /context on and /compare, and in use from the start without --prompt.",
        show_default=False,
    ),
]


def chat(
    *,
    model: ModelName,
    prompt: PromptFolder = None,
    context: ContextFile = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    template_arguments: TemplateArguments = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    force: Force = False,
) -> None:
    """Talk with the model behind a saved prompt, a full text, or without context.

    Each line is a question, also of a pipe. /help lists the commands: /compare answers with full text, prompt and
    nothing side by side. Ctrl-C stops an answer, Ctrl-D ends the chat.
    """
    arguments = parse_template_arguments(template_arguments)
    from softprompt_kernels.cli.chat.session import Session
    from softprompt_kernels.cli.chat.terminal import FULL, NOTHING, SOFT, Terminal, notice
    from softprompt_kernels.compress import ChatFormat, load_model
    from softprompt_kernels.compress.inputs import read_text
    from softprompt_kernels.compress.saved_prompt import made_from_another, recorded_arguments
    from softprompt_kernels.compress.sources.model import check_ids
    from softprompt_kernels.compress.teacher.context import capture_context, no_context_prefix
    from softprompt_kernels.models.families import max_positions
    from softprompt_kernels.prompts.adapter import describe

    text = None if context is None else read_text(context, "context")
    if prompt is not None:
        _, record = describe(prompt)  # raises before the model is loaded if this is not a saved prompt
        arguments = recorded_arguments(record) if arguments is None else arguments
        if text is not None and made_from_another(record, text):
            notice(f"The prompt in {prompt} was made from another text than {context}.")
    quiet_libraries()
    loaded, tokenizer = load_model(model, dtype, device)
    form = ChatFormat(tokenizer, arguments)
    sources: dict[str, Source] = {}
    lengths: dict[str, int] = {}
    if prompt is not None:
        soft = load_prompt(prompt, loaded, tokenizer, force)
        sources[SOFT], lengths["--prompt"] = lambda: soft, 0 if soft is None else soft.length
    if text is not None:
        ids = form.context_ids(text)
        check_ids(loaded, tokenizer, ids[0].tolist(), "context")

        def full() -> Prefix:
            notice(f"Reading {context} ({ids.shape[1]} tokens) ...")
            return capture_context(loaded, ids)

        sources[FULL], lengths["--context"] = full, ids.shape[1]
    sources[NOTHING] = lambda: no_context_prefix(loaded, form)
    window = max_positions(loaded.config)
    for option, length in lengths.items():
        if length + max_new_tokens >= window:
            raise SoftPromptError(
                f"--max-new-tokens: got {max_new_tokens}, but {option} leaves {max(window - length, 0)} of the model's "
                f"window of {window} tokens, and a question needs some"
            )
    session = Session(loaded, form, sources, generation_config(loaded, form, max_new_tokens, temperature), seed)
    about = {
        "model": model,
        "prompt": None if prompt is None else str(prompt),
        "context": None if context is None else str(context),
        "temperature": temperature,
        "max_new_tokens": max_new_tokens,
    }
    Terminal(session, about).run()
