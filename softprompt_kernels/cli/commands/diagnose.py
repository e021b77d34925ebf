"""`softprompt diagnose`: what limits the prompt of a run, what to change, and what that is expected to give."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softprompt_kernels.cli.display import on_terminal
from softprompt_kernels.cli.quiet import quiet_libraries
from softprompt_kernels.compress.report.durations import duration

if TYPE_CHECKING:
    from rich.console import Console

    from softprompt_kernels.compress.evaluate.diagnosis import Diagnosis, Finding

RunFolderPath = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the diagnosis as JSON, as in RUN/diagnosis.json, and no report.")
]
Full = Annotated[
    bool,
    typer.Option(
        "--full",
        help="Match prompts of other lengths, and test the learning rate, also where the rest tells the cause.",
    ),
]
WIDTH = 120  # of a line that no terminal limits


def diagnose(run: RunFolderPath, full: Full = False, as_json: AsJson = False) -> None:
    """Say what limits the prompt of a finished run, what to change, and what that may give.

    The causes are: too few tokens (capacity), the training (optimisation), the objective, the queries (data), queries
    that do not need the text, and a broken chat template. The most probable one comes first. The findings are also
    written to diagnosis.json in the folder of the run, and nothing else there changes.

    Relative paths in the config.yaml of the run start at the current folder, as they did when it was made.
    """
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.compress import diagnose_run

    quiet_libraries()
    found = diagnose_run(run, terminal_reporter(), full=full)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    _show(run, found)


def _show(run: Path, found: Diagnosis) -> None:
    from rich.console import Console

    console = Console(highlight=False) if on_terminal() else Console(width=WIDTH, highlight=False)
    console.print()
    _pairs(console, overview(found))
    for number, finding in enumerate(found.findings, 1):
        console.print(f"\n[bold]{number}. {finding.cause}[/bold]")
        console.print(finding.sentence, markup=False)
        console.print()
        _pairs(console, list(finding.evidence), indent=2)
        todo = [("change", finding.change), ("expected", finding.expected)]
        if any(text for _, text in todo):
            console.print()
            _pairs(console, [(name, text) for name, text in todo if text], bold=True)
        if shown := command(run, finding):
            console.print()
            console.print(shown, markup=False, soft_wrap=True)  # one line, to be copied
    console.print()


def overview(found: Diagnosis) -> list[tuple[str, str]]:
    """What was measured, as pairs of name and value."""
    pairs = []
    if found.heldout_recovered is not None and found.train_recovered is not None:
        value = f"{found.heldout_recovered:.2f} held-out, {found.train_recovered:.2f} training"
        pairs.append(("recovered", f"{value}, with {found.prompt_tokens} tokens"))
    if found.capacity:
        points = ", ".join(f"{one.heldout:.2f} with {one.tokens}" for one in found.capacity)
        pairs.append(("by matching alone", f"{points} tokens, held-out"))
    times = [("matching", sum(one.seconds for one in found.capacity))]
    times += [("rate range test", 0.0 if found.rate_test is None else found.rate_test.seconds)]
    of_parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in times if seconds)
    pairs.append(("time", duration(found.seconds) + (f" ({of_parts})" if of_parts else "")))
    return pairs


def command(run: Path, finding: Finding) -> str:
    """The command that makes the change, in a folder of its own; "" if no option makes it."""
    if not finding.options:
        return ""
    config, output = (shlex.quote(str(path)) for path in (run / "config.yaml", run.with_name(f"{run.name}-changed")))
    return f"softprompt compress --config {config} --output {output} {finding.options}"


def _pairs(console: Console, pairs: list[tuple[str, str]], indent: int = 0, bold: bool = False) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold" if bold else "dim", max_width=70)
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(value))
    console.print(Padding(table, (0, 0, 0, indent)))
