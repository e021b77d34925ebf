"""`softprompt train-compressor`: trains a compressor on many contexts, or estimates what that would take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt_kernels.cli.display import show_pairs, show_table
from softprompt_kernels.cli.errors import resumable
from softprompt_kernels.cli.options import as_loaded, with_options_of
from softprompt_kernels.cli.quiet import quiet_libraries
from softprompt_kernels.compress.compressor_runs.config import CompressorConfig
from softprompt_kernels.compress.config_file import load_as
from softprompt_kernels.compress.parallel.launch import launched
from softprompt_kernels.compress.report.durations import duration
from softprompt_kernels.compress.report.table import LEGEND, evaluation_table
from softprompt_kernels.errors import SoftPromptError

if TYPE_CHECKING:
    from softprompt_kernels.compress import CompressorPlan

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file with any of the options below. The command line overrides it."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Estimate sizes and time on a few contexts. Nothing is written."),
]
PANELS = {
    "model": "Model, contexts and output",
    "tokens": "Compressor",
    "heldout_share": "Contexts, queries and the teacher's answers",
    "objective": "Training",
    "checkpoint_every": "Checkpoints and evaluation",
    "seed": "Seed and device",
}


@with_options_of(CompressorConfig, PANELS)
def train_compressor(config: ConfigFile = None, dry_run: DryRun = False, **options: Any) -> None:
    """Train a compressor: summary tokens with which the model makes a prompt of any text in one forward pass.

    It learns from many texts. The teacher is the model that reads a full text, the student the same model with the keys
    and values of the summary tokens in its place. Some contexts are not trained on: they choose the best step, and
    others report it. A context that cannot be used is named and skipped.

    Ctrl-C, SIGTERM and SIGHUP keep what is finished. Run the same command again to resume.
    """
    settings = load_as(CompressorConfig, config, {name: value for name, value in options.items() if value is not None})
    if (processes := launched().world) > 1:
        raise SoftPromptError(
            f"torchrun: got {processes} processes, accepted by train-compressor is one, without torchrun"
        )
    quiet_libraries()
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.compress import plan_compressor, train_compressor
    from softprompt_kernels.compress.compressor_runs.run import FOLDER

    reporter = terminal_reporter()
    reporter.message(f"Loading {settings.model}")
    if dry_run:
        forecast = plan_compressor(settings, reporter)
        typer.echo("")
        show_pairs(forecast_lines(forecast))
        return
    with resumable():
        figures = train_compressor(settings, reporter)
    typer.echo("")
    header, rows = evaluation_table({"start": "prompt", **figures})
    show_table(header, rows, highlight="soft prompt")
    counts = figures["contexts"]
    typer.echo(LEGEND)
    typer.echo(
        f"{counts['train']} contexts to train on, {counts['heldout']} to choose, {counts['test']} to report, "
        f"{len(figures['skipped'])} skipped. Best step: {figures['best_step']}. {duration(figures['seconds'])}.\n"
    )
    folder = settings.output / FOLDER
    given = as_loaded(settings.model, settings.dtype)
    show_pairs(
        [
            ("compressor", str(folder)),
            ("figures", str(settings.output / "evaluation.json")),
            ("use it", f"softprompt read FILE {given} --compressor {folder} --output PROMPT"),
        ]
    )


def forecast_lines(forecast: CompressorPlan) -> list[tuple[str, str]]:
    """A forecast as pairs of name and value."""
    counts, stages = forecast.contexts, forecast.estimated_seconds
    shortest, longest = forecast.context_tokens
    least, most = forecast.prompt_tokens
    return [
        (
            "contexts",
            f"{counts['train']} to train on, {counts['heldout']} to choose, {counts['test']} to report, "
            f"{forecast.skipped} skipped",
        ),
        ("tokens", f"{shortest} to {longest} a context, in segments of at most {forecast.segment_tokens}"),
        ("prompt", f"{least} tokens" if least == most else f"{least} to {most} tokens"),
        ("trained", f"{forecast.parameters:,} numbers"),
        ("KL without context", f"{forecast.kl_none:.3f} nats per token on a few contexts: what a prompt can recover"),
        ("time per step", f"{forecast.seconds_per_step:.3g} s"),
        *((f"  {name}", duration(seconds)) for name, seconds in stages.items()),
        ("total time", f"about {duration(sum(stages.values()))}"),
        ("written", "nothing (dry run)"),
    ]
