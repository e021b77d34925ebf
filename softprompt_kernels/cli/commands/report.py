"""`softprompt report`: writes the page about a finished run again, with its diagnosis if there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.output_file import check_output

Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run: the --output of compress.")]
Output = Annotated[
    Path | None, typer.Option("--output", help="File of the page. Default: report.html in the run's folder.")
]


def report(run: Run, output: Output = None) -> None:
    """Write the report of a finished run: one HTML page that needs no network.

    `compress` writes it at the end. Write it again after `softprompt diagnose`, whose findings it then shows.
    """
    from softprompt_kernels.compress.report.html.page import save_report
    from softprompt_kernels.compress.report.html.run_data import read_run

    data = read_run(run)  # what is wrong with the run is said before what is wrong with the file
    target = output or RunFolder(run).report
    check_output("--output", target)
    save_report(data, target)
    typer.echo(f"report  {target}")
