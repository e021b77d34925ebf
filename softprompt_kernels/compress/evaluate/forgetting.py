"""What a prefix breaks: how it changes the model on text that has nothing to do with the context.

    KL            mean over tokens of KL(p_none ‖ p_prefix), nats; p_none is the model without a prompt
    perplexity    exp of the mean NLL of the text's tokens; also of the model without a prompt

The text is cut into pieces of at most `PIECE_TOKENS` tokens. Each piece follows the prefix directly, at the positions
behind it: k, k + 1, ... after a prompt of k tokens and C, C + 1, ... after the full context. The model without a prompt
reads the same tokens after what the chat template puts before a query, if it puts anything. The first token of a piece
is given, and all others are predicted, the same ones for each prefix.

The full context is measured too: it also changes what the model says of other things, and a prompt that does what the
context does is expected to change as much. Cost: one forward pass over the text for each prefix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.compress.evaluate.distance import token_distances
from softprompt_kernels.compress.reporter import Reporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.model import check_ids
from softprompt_kernels.compress.sources.sequences import Example
from softprompt_kernels.compress.teacher.answers import hidden_states
from softprompt_kernels.compress.text_file import read_utf8
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import Head, head_of
from softprompt_kernels.models.families import max_positions
from softprompt_kernels.prompts import Prefix

GENERAL_TEXT = Path(__file__).with_name("general.txt")
"""Paragraphs on tides, soup, sorting, neighbours, trade, contracts, the heart and the weather, written for this."""

PIECE_TOKENS = 256
MOST_TOKENS = 2048
"""Tokens of the text that are read; the rest is left."""

_ROWS = 256  # rows of logits in memory at once
_NAMES = {"full": "Full context", "prompt": "Soft prompt"}


def general_text(path: Path | None) -> str:
    """The text that forgetting is measured on.

    Args:
        path: a file of the user's; None: the text that comes with the package.

    Raises:
        SoftPromptError: the file cannot be read, or has fewer than two words.
    """
    text = read_utf8(path or GENERAL_TEXT, f"general: {path}")
    if len(text.split()) < 2 and len(text.strip()) < 2:
        raise SoftPromptError(f"general: {path} is empty, accepted is text with at least two words")
    return text


def forgetting(
    model: PreTrainedModel,
    chat: ChatFormat,
    text: str,
    none: Prefix | None,
    prefixes: Mapping[str, Prefix],
    reporter: Reporter,
) -> dict[str, float | int]:
    """How each prefix changes the model on a text.

    Args:
        model, chat: the model and its chat format, whose tokenizer reads the text.
        text: nothing to do with the context.
        none: what the model without a prompt reads before the text; None: nothing.
        prefixes: "full", the context, and "prompt".
        reporter: receives the progress.

    Returns:
        `{"tokens", "perplexity_none"}`, and for each prefix `"kl_…"`, `"perplexity_…"` and `"top1_agreement_…"`. KL in
        nats per token.

    Raises:
        SoftPromptError: the text is a single token, or needs one that the model does not have.
    """
    longest = max((prefix.length for prefix in prefixes.values()), default=0)
    examples = pieces(model, chat, text, max_positions(model.config) - longest)
    labels = torch.tensor([token for example in examples for token in example.output_ids])
    head = head_of(model)
    own = torch.cat(hidden_states(model, none, examples, reporter, "No context, general text"))
    students = {
        key: torch.cat(hidden_states(model, prefix, examples, reporter, f"{_NAMES[key]}, general text"))
        for key, prefix in prefixes.items()
    }
    figures: dict[str, float | int] = {"tokens": len(labels), "perplexity_none": perplexity(head, own, labels)}
    for key, at_tokens in token_distances(head, students, own).items():
        found = at_tokens.mean()
        figures[f"kl_{key}"] = found.kl
        figures[f"perplexity_{key}"] = perplexity(head, students[key], labels)
        figures[f"top1_agreement_{key}"] = found.top1_agreement
    return figures


def pieces(model: PreTrainedModel, chat: ChatFormat, text: str, room: int) -> list[Example]:
    """The text as examples: the first token of a piece is given, and the others are predicted.

    Args:
        model, chat: as in `forgetting`.
        text: the text; at most `MOST_TOKENS` of it are used.
        room: tokens of the model's window that a piece may take, 2 or more.

    Raises:
        SoftPromptError: as `forgetting`.
    """
    ids = chat.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"][:MOST_TOKENS]
    check_ids(model, chat.tokenizer, ids, "general")
    size = max(2, min(PIECE_TOKENS, room))
    cut = [tuple(ids[start : start + size]) for start in range(0, len(ids), size)]
    examples = [Example(piece[:1], piece[1:]) for piece in cut if len(piece) > 1]
    if not examples:
        raise SoftPromptError("general: got a text of one token, accepted are two or more")
    return examples


@torch.no_grad()
def perplexity(head: Head, hidden: Tensor, labels: Tensor) -> float:
    """exp of the mean NLL.

    Args:
        head: of the model.
        hidden: `[n, d]`, the states that predict the labels.
        labels: `[n]` int64.
    """
    exact = replace(head, weight=head.weight.float(), bias=None if head.bias is None else head.bias.float())
    total = 0.0
    for start in range(0, len(labels), _ROWS):
        logits = exact.logits(hidden[start : start + _ROWS].float())
        chosen = labels[start : start + _ROWS].to(logits.device)
        total += float(torch.nn.functional.cross_entropy(logits, chosen, reduction="sum"))
    mean = total / len(labels)
    return math.exp(mean) if mean < 700 else math.inf
