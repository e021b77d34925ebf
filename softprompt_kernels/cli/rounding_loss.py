"""What it costs to store a prompt in 16 or 8 bits.

Without queries: the relative error of its numbers, ‖x − x̂‖ / ‖x‖. With queries: the KL of the rounded prompt from the
unrounded one, on answers of the unrounded prompt; and with the text, both prompts' KL from the full context and what
each recovers, on answers of the full context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from softprompt_kernels.errors import SoftPromptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from softprompt_kernels.compress import ChatFormat, Reporter
    from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt

BEFORE, AFTER = "Unrounded prompt", "Rounded prompt"


def relative_errors(prompt: EmbeddingPrompt | KVPrompt, rounded: EmbeddingPrompt | KVPrompt) -> dict[str, float]:
    """The relative error of each part of a prompt: "key" and "value", or "embedding"."""
    from softprompt_kernels.prompts.weights import parts_of

    after = parts_of(rounded)
    return {
        name: float((numbers - after[name]).norm() / numbers.norm().clamp_min(1e-30))
        for name, numbers in parts_of(prompt).items()
    }


@dataclass(frozen=True)
class Asked:
    """The queries of a measurement.

    Args:
        queries: file of JSON Lines.
        context: file of the text; None: no comparison with the full context.
        new_tokens: at most so many tokens an answer.
        seed: of sampling answers.
    """

    queries: Path
    context: Path | None
    new_tokens: int
    seed: int


def measured_loss(
    model: PreTrainedModel,
    chat: ChatFormat,
    prompt: EmbeddingPrompt | KVPrompt,
    rounded: EmbeddingPrompt | KVPrompt,
    asked: Asked,
    reporter: Reporter,
) -> tuple[list[str], list[list[str]]]:
    """The header and the rows of a table, for the rounded prompt, and with a text for the unrounded one too.

    Args:
        model, chat: the prompt's model and its chat format.
        prompt, rounded: before and after.
        asked: the queries.
        reporter: receives the progress.

    Raises:
        SoftPromptError: bad queries, or a context that does not matter for them.
    """
    import torch

    from softprompt_kernels.compress.evaluate.distance import check_context_matters, measure
    from softprompt_kernels.compress.inputs import check_window, read_text
    from softprompt_kernels.compress.sources.model import check_ids
    from softprompt_kernels.compress.sources.queries import load_queries
    from softprompt_kernels.compress.teacher.answers import answer, hidden_states
    from softprompt_kernels.compress.teacher.context import capture_context, no_context_prefix
    from softprompt_kernels.models import prefix_of
    from softprompt_kernels.prompts.offload import input_device

    queries = load_queries(asked.queries)
    device = input_device(model)
    with torch.no_grad():
        students = {BEFORE: prefix_of(model, prompt.to(device)), AFTER: prefix_of(model, rounded.to(device))}
    teacher = students[BEFORE]
    length = prompt.length
    if asked.context is not None:
        ids = chat.context_ids(read_text(asked.context, "context"))
        check_ids(model, chat.tokenizer, ids[0].tolist(), "context")
        length = ids.shape[1]
    check_window(model, chat, length, queries, asked.new_tokens)
    if asked.context is not None:
        teacher = capture_context(model, ids)
        students |= {"none": no_context_prefix(model, chat)}  # type: ignore[dict-item]
    examples = answer(
        model,
        chat,
        teacher,
        queries,
        new_tokens=asked.new_tokens,
        temperature=1.0,
        batch_size=64,
        seed=asked.seed,
        reporter=reporter,
        description="Answers",
    )
    if asked.context is None:
        hidden = hidden_states(model, students.pop(BEFORE), examples, reporter, f"{BEFORE}, given queries")
        after = measure(model, teacher, students, examples, reporter, "given", teacher=hidden)[AFTER]
        header = ["model with", "KL to the unrounded prompt", "top-1"]
        return header, [[AFTER, f"{after.kl:.2e}", f"{after.top1_agreement:.4f}"]]
    found = measure(model, teacher, students, examples, reporter, "given")
    none = found["none"].kl
    check_context_matters(none)
    header = ["model with", "KL to the full context", "recovered", "top-1"]
    return header, [
        [name, f"{found[name].kl:.5f}", f"{1 - found[name].kl / none:.5f}", f"{found[name].top1_agreement:.4f}"]
        for name in (BEFORE, AFTER)
    ]


def errors_text(errors: dict[str, float]) -> str:
    """The relative errors as one line."""
    names = {"key": "keys", "value": "values", "embedding": "vectors"}
    return "relative error of " + ", of ".join(f"{names[part]} {error:.2e}" for part, error in errors.items())


def check_asked(model: str | None, context: Path | None, queries: Path | None, options: Sequence[str]) -> None:
    """Check the options of a measurement against each other.

    Raises:
        SoftPromptError: queries without a model, or a text without queries.
    """
    if context is not None and queries is None:
        raise SoftPromptError(f"{options[0]}: got a text without {options[1]}, accepted are both")
    if queries is not None and model is None:
        raise SoftPromptError(f"{options[1]}: got queries without --model, accepted are both")
