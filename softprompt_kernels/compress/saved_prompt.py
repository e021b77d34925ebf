"""Evaluation of a saved prompt: its distance from the full context, on queries of the caller."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.evaluate.baselines import baseline_prefixes
from softprompt_kernels.compress.evaluate.distance import measure, summary
from softprompt_kernels.compress.inputs import check_window, read_text, sha256
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.model import check_ids, load_model
from softprompt_kernels.compress.sources.queries import load_queries
from softprompt_kernels.compress.teacher.answers import answer
from softprompt_kernels.compress.teacher.context import capture_context
from softprompt_kernels.compress.torch_modes import own_torch_modes
from softprompt_kernels.models import prefix_of
from softprompt_kernels.prompts import load


@own_torch_modes()
def evaluate_prompt(
    model_name: str,
    context: Path,
    prompt_dir: Path,
    queries: Path,
    *,
    new_tokens: int = 48,
    sample_temperature: float = 1.0,
    seed: int = 0,
    template_arguments: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    force: bool = False,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """The distance of a saved prompt, and of the baselines, from the full context on given queries.

    Args:
        model_name: folder or hub name of the model that the prompt was made for.
        context: file of the text that was compressed.
        prompt_dir: folder of the saved prompt.
        queries: file of JSON Lines. The teacher answers those without an output.
        new_tokens, sample_temperature, seed: at most so many tokens an answer, and how they are sampled.
        template_arguments: of the chat template, as in `CompressConfig`; None: those that the prompt was made with.
        dtype, device: as in `load_model`.
        force: as in `softprompt_kernels.prompts.load`.
        reporter: receives the progress; None reports nothing.

    Returns:
        `{"context_tokens", "prompt_tokens", "ratio", "queries": {...}}`. The last has the keys of a set of
        evaluation.json. KL in nats per token.

    Raises:
        SoftPromptError: bad input.
    """
    reporter = reporter or SilentReporter()
    text, asked = read_text(context, "context"), load_queries(queries)
    model, tokenizer = load_model(model_name, dtype, device)
    prompt, record = load(prompt_dir, model, tokenizer, force=force)
    chat = ChatFormat(tokenizer, recorded_arguments(record) if template_arguments is None else template_arguments)
    made_from = (record or {}).get("context") or {}
    if made_from.get("sha256") not in (None, sha256(text)):
        reporter.message(f"The prompt in {prompt_dir} was made from another text than {context}.")
    ids = chat.context_ids(text)
    check_ids(model, tokenizer, ids[0].tolist(), "context")
    check_window(model, chat, ids.shape[1], asked, new_tokens)
    prefix = capture_context(model, ids)
    examples = answer(
        model,
        chat,
        prefix,
        asked,
        new_tokens=new_tokens,
        temperature=sample_temperature,
        batch_size=64,
        seed=seed,
        reporter=reporter,
    )
    students = baseline_prefixes(model, chat, prefix, prompt.length)
    students["prompt"] = prefix_of(model, prompt).detach()
    distances = measure(model, prefix, students, examples, reporter, "given")
    return {
        "context_tokens": prefix.length,
        "prompt_tokens": prompt.length,
        "ratio": prefix.length / prompt.length,
        "queries": summary(distances),
    }


def recorded_arguments(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of the chat template that a prompt was made with.

    Args:
        record: from `softprompt_kernels.prompts.load`.
    """
    context = (record or {}).get("context")
    arguments = context.get("template_arguments") if isinstance(context, dict) else None
    return arguments if isinstance(arguments, dict) else {}
