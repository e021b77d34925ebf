"""Evaluation of a saved prompt on queries of the caller, in three parts:

its distance from the full context, token by token       evaluate/distance.py
the answers themselves, compared and judged              evaluate/answers.py
what it breaks on text of other subjects                 evaluate/forgetting.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt_kernels.compress.evaluate.answers import FULL, STUDENTS, answer_figures, greedy_answers
from softprompt_kernels.compress.evaluate.baselines import baseline_prefixes
from softprompt_kernels.compress.evaluate.dissimilarity import Dissimilarity, load_dissimilarity
from softprompt_kernels.compress.evaluate.distance import measure, summary
from softprompt_kernels.compress.evaluate.forgetting import forgetting, general_text
from softprompt_kernels.compress.inputs import check_window, read_text, sha256
from softprompt_kernels.compress.process.torch_modes import own_torch_modes
from softprompt_kernels.compress.reporter import Reporter, SilentReporter
from softprompt_kernels.compress.sources.chat import ChatFormat
from softprompt_kernels.compress.sources.model import check_ids, load_model
from softprompt_kernels.compress.sources.queries import load_queries
from softprompt_kernels.compress.teacher.answers import answer
from softprompt_kernels.compress.teacher.context import capture_context
from softprompt_kernels.errors import SoftPromptError
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
    dissimilarity: str | Dissimilarity | None = None,
    metric: str | None = None,
    general: Path | None = None,
) -> dict[str, Any]:
    """The distance of a saved prompt, and of the baselines, from the full context on given queries.

    The distance is measured on the teacher's answers, which are sampled. Beside it, the full context, the prompt, as
    many tokens of the context and no context answer each query greedily; these answers are compared and, where the
    queries have references, judged. Dissimilarities are from 0, the same, to 1; accuracies from 0 to 1, all right.

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
        dissimilarity: of two answers, the full context's first: a function of two texts, or `"module:function"`; None:
            only those of the package are reported.
        metric: of accuracy, a key of `METRICS` in compress/evaluate/accuracy.py or "chrf"; None: the general ones.
        general: file of text that has nothing to do with the context; None: that of the package.

    Returns:
        `{"context_tokens", "prompt_tokens", "ratio", "queries": {...}, "answers": {...}, "forgetting": {...}}`.
        "queries" has the keys of a set of evaluation.json, "answers" those of `answer_figures` in
        compress/evaluate/answers.py, and "forgetting" those of `forgetting` in compress/evaluate/forgetting.py. KL in
        nats per token.

    Raises:
        SoftPromptError: bad input.
    """
    reporter = reporter or SilentReporter()
    text, asked = read_text(context, "context"), load_queries(queries)
    unrelated, own = general_text(general), named_dissimilarity(dissimilarity)
    model, tokenizer = load_model(model_name, dtype, device)
    prompt, record = load(prompt_dir, model, tokenizer, force=force)
    chat = ChatFormat(tokenizer, recorded_arguments(record) if template_arguments is None else template_arguments)
    if made_from_another(record, text):
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
    soft = prefix_of(model, prompt).detach()
    students["prompt"] = soft
    distances = measure(model, prefix, students, examples, reporter, "given")
    figures = summary(distances)
    asking = {FULL: prefix, **{key: students[key] for key in STUDENTS if key in students}}
    answers = greedy_answers(model, chat, asking, asked, new_tokens, reporter)
    behind = {FULL: prefix, "prompt": soft}
    return {
        "context_tokens": prefix.length,
        "prompt_tokens": prompt.length,
        "ratio": prefix.length / prompt.length,
        "queries": figures,
        "answers": answer_figures(answers, asked, own=own, metric=metric),
        "forgetting": forgetting(model, chat, unrelated, students["none"], behind, reporter),
    }


def named_dissimilarity(given: str | Dissimilarity | None) -> dict[str, Dissimilarity]:
    """A dissimilarity of the user by its name; empty for None.

    Args:
        given: a function of two texts, or `"module:function"`.

    Raises:
        SoftPromptError: nothing has that name, or it is not a function.
    """
    if given is None:
        return {}
    if isinstance(given, str):
        return {given: load_dissimilarity(given)}
    if not callable(given):
        raise SoftPromptError(f"dissimilarity: got {given!r}, accepted is a function of two texts, or its name")
    named = given if hasattr(given, "__qualname__") else type(given)
    return {f"{named.__module__}:{named.__qualname__}": given}


def made_from_another(record: Mapping[str, Any] | None, text: str) -> bool:
    """Whether a record says that its prompt was made from other texts than this one.

    Args:
        record: from `softprompt_kernels.prompts.load`. That of a joined prompt names each of its texts.
        text: the context.
    """
    context = (record or {}).get("context")
    if not isinstance(context, dict):
        return False
    parts = context.get("contexts")
    named = [context, *(part for part in parts if isinstance(part, dict))] if isinstance(parts, list) else [context]
    known = {one.get("sha256") for one in named} - {None}
    return bool(known) and sha256(text) not in known


def recorded_arguments(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments of the chat template that a prompt was made with.

    Args:
        record: from `softprompt_kernels.prompts.load`.
    """
    context = (record or {}).get("context")
    arguments = context.get("template_arguments") if isinstance(context, dict) else None
    return arguments if isinstance(arguments, dict) else {}
