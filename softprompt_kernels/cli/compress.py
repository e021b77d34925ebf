"""`softprompt compress`: from a text to a soft prompt, or a forecast of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt_kernels.cli.boundary import Stopped
from softprompt_kernels.cli.display import duration, show_pairs, show_table, size
from softprompt_kernels.cli.libraries import quiet_libraries
from softprompt_kernels.cli.options import with_config_options
from softprompt_kernels.compress.config import CompressConfig, load_config
from softprompt_kernels.compress.report.table import evaluation_table

if TYPE_CHECKING:
    from softprompt_kernels.compress import Plan

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file with any of the fields below; options given here win over it."),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Measure sizes, ratio, time and what there is to recover; write nothing.")
]


@with_config_options
def compress(config: ConfigFile = None, dry_run: DryRun = False, **options: Any) -> None:
    """Compress a text into a soft prompt.

    The model with the text before a query is the teacher; the prompt is trained to take the text's place. Ctrl-C saves;
    the same command goes on, and a finished run is shown again. Paths are relative to the current folder, in the YAML
    file too.
    """
    # Before the model is loaded: what is wrong with the options is said at once.
    settings = load_config(config, {name: value for name, value in options.items() if value is not None})
    quiet_libraries()
    if dry_run:
        _forecast(settings)
    else:
        _compress(settings)


def _compress(settings: CompressConfig) -> None:
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.compress import Interrupted, compress
    from softprompt_kernels.compress.folder import RunFolder

    reporter = terminal_reporter()
    reporter.message(f"Loading {settings.model}")
    try:
        figures = compress(settings, reporter)
    except Interrupted as stop:
        raise Stopped(
            f"Stopped at step {stop.step} of {stop.steps}; saved in {stop.output}. The same command goes on from there."
        ) from None
    except KeyboardInterrupt:
        raise Stopped("Interrupted. The same command goes on with what is saved already.") from None
    folder = RunFolder(settings.output)
    header, rows = evaluation_table(figures)
    typer.echo("")
    show_table(header, rows, strong="soft prompt")
    context, prompt = figures["context_tokens"], figures["prompt_tokens"]
    typer.echo("KL in nats per token against the model with the full context; recovered = 1 - KL / KL of nothing.")
    typer.echo(f"{context} tokens in a prompt of {prompt} ({context / prompt:.1f}x), {duration(figures['seconds'])}.\n")
    show_pairs(
        [
            ("prompt", str(folder.prompt)),
            ("figures", str(folder.evaluation)),
            ("curves", str(folder.curves)),
            ("ask it", f'softprompt generate --model {settings.model} --prompt {folder.prompt} "..."'),
        ]
    )


def _forecast(settings: CompressConfig) -> None:
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.compress import plan

    reporter = terminal_reporter()
    reporter.message(f"Loading {settings.model}")
    forecast = plan(settings, reporter)
    typer.echo("")
    show_pairs(forecast_lines(forecast))


def forecast_lines(forecast: Plan) -> list[tuple[str, str]]:
    """A forecast as names and values."""
    stages = forecast.estimated_seconds
    return [
        ("context", f"{forecast.context_tokens} tokens, {size(forecast.context_kv_bytes)} of keys and values"),
        ("prompt", f"{forecast.prompt_tokens} tokens, {size(forecast.prompt_bytes)} of keys and values"),
        ("ratio", f"{forecast.ratio:.1f}x"),
        ("queries", f"{forecast.train_queries} to train on, {forecast.heldout_queries} held out"),
        ("KL of nothing", f"{forecast.kl_none:.3f} nats per token: what there is to recover, on a few queries"),
        ("a step", duration_of_step(forecast.seconds_per_step)),
        *((f"  {name}", duration(seconds)) for name, seconds in stages.items()),
        ("in all", f"about {duration(sum(stages.values()))}; nothing was written"),
    ]


def duration_of_step(seconds: float) -> str:
    """A step's time, in milliseconds where it is short."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
