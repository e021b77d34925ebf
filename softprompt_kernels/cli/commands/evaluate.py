"""`softprompt evaluate`: compares a saved prompt with the full context, on given queries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from softprompt_kernels.cli.display import show_table
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
from softprompt_kernels.compress.report.answer_table import answer_remark, answer_table, forgetting_remark
from softprompt_kernels.compress.report.table import LEGEND, evaluation_table
from softprompt_kernels.errors import SoftPromptError

ContextFile = Annotated[Path, typer.Option("--context", help="File with the text that was compressed, in UTF-8.")]
PromptFolder = Annotated[Path, typer.Option("--prompt", help="Folder of the saved prompt.")]
Queries = Annotated[
    Path,
    typer.Option(
        "--queries",
        help='File of JSON Lines, {"input": ..., "output": ..., "references": [...]}. Without an output the teacher '
        "answers; with references, answers that count as right, the accuracy is reported.",
    ),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Maximum length of a sampled answer, in tokens.")]
SampleTemperature = Annotated[float, typer.Option(min=0.0, help="Temperature for sampling answers; 0 is greedy.")]
DissimilarityName = Annotated[
    str | None,
    typer.Option(
        "--dissimilarity",
        metavar="MODULE:FUNCTION",
        help="Also compare answers with this function of two texts, which returns a number from 0 (the same) to 1.",
    ),
]
GeneralFile = Annotated[
    Path | None,
    typer.Option(
        "--general",
        help="File of text that has nothing to do with the context, for what the prompt breaks. Default: a few "
        "paragraphs that come with the package.",
    ),
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures to this JSON file.")]


def evaluate(
    *,
    model: ModelName,
    context: ContextFile,
    prompt: PromptFolder,
    queries: Queries,
    new_tokens: NewTokens = 48,
    sample_temperature: SampleTemperature = 1.0,
    seed: Seed = 0,
    template_arguments: TemplateArguments = None,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    force: Force = False,
    dissimilarity: DissimilarityName = None,
    general: GeneralFile = None,
    json_file: JsonFile = None,
) -> None:
    """Evaluate a saved prompt and baselines on your own queries.

    Each is compared with the model that reads the full text: KL over the full vocabulary, top-1 agreement, and whole
    answers. Queries with "references" in their file also give an accuracy. What the prompt changes on text of other
    subjects is measured too.
    """
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.compress import evaluate_prompt
    from softprompt_kernels.compress.sources.queries import write_text

    if json_file is not None and not json_file.parent.is_dir():
        raise SoftPromptError(f"--json: cannot write {json_file.name}: {json_file.parent} is not a folder")
    arguments = parse_template_arguments(template_arguments)
    quiet_libraries()
    reporter = terminal_reporter()
    reporter.message(f"Loading {model}")
    figures = evaluate_prompt(
        model,
        context,
        prompt,
        queries,
        new_tokens=new_tokens,
        sample_temperature=sample_temperature,
        seed=seed,
        template_arguments=arguments,
        dtype=dtype,
        device=device,
        force=force,
        reporter=reporter,
        dissimilarity=dissimilarity,
        general=general,
    )
    show_figures(figures)
    if json_file is not None:
        write_text(json_file, as_json(figures))


def show_figures(figures: Mapping[str, Any]) -> None:
    """Print the tables of an evaluation; `figures` from `evaluate_prompt`."""
    for (header, rows), legend in (
        (evaluation_table(figures), LEGEND),
        (answer_table(figures["answers"]), answer_remark(figures["answers"])),
    ):
        typer.echo("")
        show_table(header, rows, highlight="soft prompt")
        typer.echo(legend)
    typer.echo(f"\n{forgetting_remark(figures['forgetting'])}")


def as_json(figures: Mapping[str, Any]) -> str:
    """Figures as strict JSON, where a number that is not finite is null."""
    from softprompt_kernels.prompts.json_file import to_json

    return json.dumps(to_json("figures", figures), indent=1, allow_nan=False) + "\n"
