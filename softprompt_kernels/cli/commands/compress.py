"""`softprompt compress`: compresses a text into a soft prompt, or estimates what that would take."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from softprompt_kernels.cli.bank import bank_forecast_lines, show_bank
from softprompt_kernels.cli.display import show_pairs, show_table
from softprompt_kernels.cli.errors import resumable
from softprompt_kernels.cli.options import as_loaded, with_config_options
from softprompt_kernels.cli.quiet import quiet_libraries
from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.config_file import load_config
from softprompt_kernels.compress.parallel.launch import is_first, launched
from softprompt_kernels.compress.report.durations import duration
from softprompt_kernels.compress.report.table import LEGEND, evaluation_table, training_line
from softprompt_kernels.compress.sequential.table import distance_table, teacher_line
from softprompt_kernels.sizes import size

if TYPE_CHECKING:
    from softprompt_kernels.compress import Plan

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file with any of the options below. The command line overrides it."),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Estimate sizes and time, and measure whether the context matters, on a few queries. Nothing is written.",
    ),
]


@with_config_options
def compress(config: ConfigFile = None, dry_run: DryRun = False, **options: Any) -> None:
    """Compress a text into a soft prompt.

    The teacher is the model that reads the full text before each query. The student is the same model with the soft
    prompt instead. A prompt of keys and values is first fitted to the teacher's attention, layer by layer. Training
    then minimises the divergence between their next-token distributions.

    With a folder or a file of JSON Lines as context, each text in it gets a prompt. One that cannot be compressed is
    skipped with the reason, and the exit code is then 3. With more texts, the same command adds them.

    Ctrl-C, SIGTERM and SIGHUP keep what is finished. Run the same command again to resume, or to show the results of a
    finished run. Relative paths start at the current folder, also those in the YAML file.
    """
    if dry_run and not is_first():
        return  # of the processes that torchrun started, one measures
    with nullcontext() if dry_run else resumable(), nullcontext() if dry_run else _together():
        # Before torch and the model are loaded, so that an error in the options shows at once.
        settings = load_config(config, {name: value for name, value in options.items() if value is not None})
        quiet_libraries()
        if dry_run:
            _forecast(settings)
        else:
            _compress(settings)


def _together() -> AbstractContextManager[None]:
    """Within the context, the processes that torchrun started are one run. A process alone does not load torch here."""
    if launched().world == 1:
        return nullcontext()
    from softprompt_kernels.compress.parallel.ranks import started

    return started()


def _compress(settings: CompressConfig) -> None:
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.compress import SilentReporter, compress
    from softprompt_kernels.compress.folder import RunFolder

    reporter = terminal_reporter() if is_first() else SilentReporter()
    reporter.message(f"Loading {settings.model}")
    figures = compress(settings, reporter)
    if not is_first():
        return
    if "contexts" in figures:
        show_bank(settings, figures)
        return
    folder = RunFolder(settings.output)
    header, rows = evaluation_table(figures)
    typer.echo("")
    show_table(header, rows, highlight="soft prompt")
    context, prompt = figures["context_tokens"], figures["prompt_tokens"]
    typer.echo(LEGEND)
    if line := training_line(figures):
        typer.echo(line)
    if segments := figures.get("segments"):
        typer.echo(f"{teacher_line(segments)}\n")
        show_table(*distance_table(segments))
        typer.echo("")
    typer.echo(f"{context} tokens in a prompt of {prompt} ({context / prompt:.1f}x), {duration(figures['seconds'])}.")
    typer.echo(f"{stage_line(figures.get('stages', {}))}\n")
    given = as_loaded(settings.model, settings.dtype, settings.template_arguments)
    show_pairs(
        [
            ("prompt", str(folder.prompt)),
            ("figures", str(folder.evaluation)),
            *([("curves", str(folder.curves))] if folder.curves.exists() else []),
            *([("report", str(folder.report))] if folder.report.exists() else []),
            *([("answers", str(folder.answers))] if folder.answers.exists() else []),
            ("try it", f'softprompt generate {given} --prompt {folder.prompt} "..."'),
        ]
    )


def _forecast(settings: CompressConfig) -> None:
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.compress import Plan, plan

    reporter = terminal_reporter()
    reporter.message(f"Loading {settings.model}")
    forecast = plan(settings, reporter)
    typer.echo("")
    show_pairs(forecast_lines(forecast) if isinstance(forecast, Plan) else bank_forecast_lines(forecast))
    if settings.server is not None:
        typer.echo(f"The time that {settings.server} takes to write the answers is not counted.")


def forecast_lines(forecast: Plan) -> list[tuple[str, str]]:
    """A forecast as pairs of name and value."""
    stages = forecast.estimated_seconds
    test = f", {forecast.test_queries} for the test" if forecast.test_queries else ""
    return [
        ("context", f"{forecast.context_tokens} tokens, {size(forecast.context_kv_bytes)} of keys and values"),
        ("  stored", forecast.context_storage),
        ("prompt", f"{forecast.prompt_tokens} tokens, {size(forecast.prompt_bytes)} of keys and values"),
        *([("checkpoints", f"{size(forecast.checkpoint_bytes)} on disk")] if forecast.checkpoint_bytes else []),
        ("ratio", f"{forecast.ratio:.1f}x"),
        *([("segments", f"{forecast.segments}")] if forecast.segments > 1 else []),
        ("queries", f"{forecast.train_queries} for training, {forecast.heldout_queries} held out{test}"),
        ("KL without context", f"{forecast.kl_none:.3f} nats per token on a few queries: what a prompt can recover"),
        *_processes(forecast),
        ("time per step", duration_of_step(forecast.seconds_per_step)),
        *((f"  {name.replace('_', ' ')}", duration(seconds)) for name, seconds in stages.items()),
        ("total time", f"about {duration(sum(stages.values()))}"),
        ("memory", "beside the model and the context's keys and values, counted:"),
        *((f"  {name}", size(count)) for name, count in forecast.peak_bytes.items()),
        *([("disk", f"at most about {size(forecast.disk_bytes)}")] if forecast.disk_bytes else []),
        ("written", "nothing (dry run)"),
    ]


def _processes(forecast: Plan) -> list[tuple[str, str]]:
    """What many processes share out and exchange; nothing for one."""
    if forecast.processes == 1:
        return []
    layers = "layers of matching, sequences of a step, queries and examples are shared out"
    return [
        ("processes", f"{forecast.processes}: {layers}"),
        ("exchanged per step", f"{size(forecast.exchanged_bytes)}: the gradient of the prompt"),
    ]


def stage_line(stages: Mapping[str, float]) -> str:
    """The times of the stages in one line; empty for a run that did not store them."""
    return ", ".join(f"{name.replace('_', ' ')} {duration(seconds)}" for name, seconds in stages.items())


def duration_of_step(seconds: float) -> str:
    """The time of a step, in milliseconds if it is short."""
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"
