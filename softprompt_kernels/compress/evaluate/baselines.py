"""The baselines of an evaluation: what a soft prompt of k tokens has to beat."""

from __future__ import annotations

from contextlib import suppress

from transformers import PreTrainedModel

from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.teacher.context import no_context_prefix, select_tokens
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts import Prefix

TOKEN_BASELINES = ("truncated", "untrained")
"""Those that are k tokens of the context."""


def baseline_prefixes(
    model: PreTrainedModel, chat: ChatFormat, context: Prefix, tokens: int
) -> dict[str, Prefix | None]:
    """The prefixes of the baselines that need no prompt, by key.

    - "none": no context, only what the chat template puts before a query;
    - "truncated": the first k tokens of the context;
    - "untrained": k strided tokens of the context. Left out for a model whose keys cannot be moved.

    Args:
        model, chat: the model and its chat format.
        context: the captured context, C tokens.
        tokens: k. From C on, only "none" is a baseline.
    """
    prefixes = {"none": no_context_prefix(model, chat)}
    if tokens < context.length:
        prefixes["truncated"] = select_tokens(model, context, tokens, "first")
        with suppress(SoftPromptError):
            prefixes["untrained"] = select_tokens(model, context, tokens, "strided")
    return prefixes
