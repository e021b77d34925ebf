"""`softprompt evaluate`: how near a saved prompt comes to the full context, on queries of your own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from softprompt_kernels.cli.display import show_table
from softprompt_kernels.cli.libraries import quiet_libraries
from softprompt_kernels.cli.options import DeviceName, DtypeName, ModelName, Seed
from softprompt_kernels.compress.report.table import evaluation_table
from softprompt_kernels.errors import SoftPromptError

ContextFile = Annotated[Path, typer.Option("--context", help="The text that was compressed, a UTF-8 file.")]
PromptFolder = Annotated[Path, typer.Option("--prompt", help="Folder of the saved prompt.")]
Queries = Annotated[
    Path, typer.Option("--queries", help='JSON Lines of {"input": ..., "output": ...}, the output optional.')
]
NewTokens = Annotated[int, typer.Option(min=1, help="Tokens sampled from the teacher for a query without an output.")]
SampleTemperature = Annotated[float, typer.Option(min=0.0, help="Temperature of that sampling; 0 takes the likeliest.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")]


def evaluate(
    *,
    model: ModelName,
    context: ContextFile,
    prompt: PromptFolder,
    queries: Queries,
    new_tokens: NewTokens = 48,
    sample_temperature: SampleTemperature = 1.0,
    seed: Seed = 0,
    dtype: DtypeName = "auto",
    device: DeviceName = "auto",
    json_file: JsonFile = None,
) -> None:
    """Evaluate a saved prompt: full-vocabulary KL of the model with the full text against it, and the baselines."""
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.compress import evaluate_prompt
    from softprompt_kernels.compress.sources.queries import write_text

    if json_file is not None and not json_file.parent.is_dir():
        raise SoftPromptError(f"--json: {json_file.parent} is no folder, so {json_file.name} cannot be written there")
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
        dtype=dtype,
        device=device,
        reporter=reporter,
    )
    header, rows = evaluation_table(figures)
    typer.echo("")
    show_table(header, rows, strong="soft prompt")
    typer.echo("KL in nats per token against the model with the full context; recovered = 1 - KL / KL of nothing.")
    if json_file is not None:
        write_text(json_file, json.dumps(figures, indent=1) + "\n")
