"""`softprompt compose`: joins the prompts of several runs to one, and trains it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt_kernels.cli.commands.compress import duration_of_step, stage_line
from softprompt_kernels.cli.display import show_pairs, show_table
from softprompt_kernels.cli.errors import resumable
from softprompt_kernels.cli.options import with_some_config_options
from softprompt_kernels.cli.quiet import quiet_libraries
from softprompt_kernels.compress.composition.options import DEFAULTS, OPTIONS
from softprompt_kernels.compress.report.durations import duration
from softprompt_kernels.sizes import size

if TYPE_CHECKING:
    from softprompt_kernels.compress.composition.forecast import CompositionPlan

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs of compress, two or more.")
]
Output = Annotated[Path, typer.Option(help="Folder of the composition: saved prompt, figures, cache, checkpoint.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Estimate sizes and time, on a few queries. Nothing is written.")
]


@with_some_config_options(OPTIONS, DEFAULTS)
def compose(runs: Runs, output: Output, dry_run: DryRun = False, **options: Any) -> None:
    """Join the prompts of several texts to one.

    Each text was compressed by a run of `compress`, all with the same model. The prompts are put one behind the other,
    their keys are moved to where they then stand, and the joined prompt is trained a little: the questions about each
    text are asked behind all prompts, and the teacher has read that text alone.

    The table says how much the questions about each text recover with its own prompt, with the prompts joined, and
    after the training. The same command resumes, or shows the results again. The runs are not changed.
    """
    from softprompt_kernels.cli.progress import terminal_reporter

    given = {name: value for name, value in options.items() if value is not None}
    quiet_libraries()
    reporter = terminal_reporter()
    if dry_run:
        from softprompt_kernels.compress.composition.forecast import plan_composition

        forecast = plan_composition(runs, output, reporter=reporter, **given)
        typer.echo("")
        show_pairs(forecast_lines(forecast))
        return
    from softprompt_kernels.compress.composition.compose import compose

    with resumable():
        figures = compose(runs, output, reporter=reporter, **given)
    show_composition(figures, output, runs)


def show_composition(figures: Mapping[str, Any], output: Path, runs: Sequence[Path]) -> None:
    """Print the tables of a composition; `figures` is the content of its evaluation.json."""
    from softprompt_kernels.compress.composition.figures import LEGEND, composition_table
    from softprompt_kernels.compress.folder import RunFolder

    folder = RunFolder(output)
    for name in figures["mean"]:
        typer.echo("")
        header, rows = composition_table(figures, name)
        show_table(header, rows, highlight="mean")
    typer.echo(LEGEND)
    context, prompt = figures["context_tokens"], figures["prompt_tokens"]
    typer.echo(
        f"{len(runs)} texts of {context} tokens in a prompt of {prompt} ({context / prompt:.1f}x), "
        f"{duration(figures['seconds'])}."
    )
    typer.echo(f"{stage_line(figures['stages'])}\n")
    show_pairs([("prompt", str(folder.prompt)), ("figures", str(folder.evaluation)), ("answers", str(folder.answers))])


def forecast_lines(forecast: CompositionPlan) -> list[tuple[str, str]]:
    """A forecast as pairs of name and value."""
    names = {"train": "for training", "heldout": "held out", "test": "for the test"}
    left_out = f"; {forecast.left_out} that do not say which text they mean are left out" if forecast.left_out else ""
    whole = "fit" if forecast.fits_whole else "do not fit"
    stages = forecast.estimated_seconds
    documents = zip(forecast.names, forecast.context_tokens, forecast.prompt_tokens, strict=True)
    return [
        *((name, f"{context} tokens in a prompt of {prompt}") for name, context, prompt in documents),
        ("joined prompt", f"{sum(forecast.prompt_tokens)} tokens, {size(forecast.prompt_bytes)} of keys and values"),
        ("all texts", f"{whole} into the model's window together"),
        ("queries", ", ".join(f"{forecast.queries[k]} {names[k]}" for k in forecast.queries) + left_out),
        ("time per step", duration_of_step(forecast.seconds_per_step)),
        *((f"  {name}", duration(seconds)) for name, seconds in stages.items()),
        ("total time", f"about {duration(sum(stages.values()))}"),
        ("written", "nothing (dry run)"),
    ]
