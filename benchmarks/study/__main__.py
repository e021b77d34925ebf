"""The study: measures the cells that are missing, prints the tables, writes them and the plot into docs/.

    python -m benchmarks.study [run] [table] [plot] [--text demo ...] [--method matched ...] [--ratio 8 ...]
                               [--seed 0 ...] [--minutes 30] [--everything] [--list]

Without a word it runs what is missing and prints the tables. It can be stopped and started again at any time: each
result is stored when its cell is finished, and a run that was stopped in training resumes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from benchmarks.study.cells import RATIOS, SEEDS, Cell, grid
from benchmarks.study.corpus import Text, all_texts, chosen_texts
from benchmarks.study.measure import expected_seconds, measure_all, missing_cells
from benchmarks.study.methods import METHODS, chosen_methods
from benchmarks.study.plot import save_plot
from benchmarks.study.results import RESULTS, Results
from benchmarks.study.table import PAGE, PLOT, README, README_TEXT, content, markdown, update_page
from benchmarks.study.teacher import Study
from softprompt_kernels.compress import Interrupted, SilentReporter
from softprompt_kernels.errors import SoftPromptError

MODEL = ".cache/SmolLM2-135M-Instruct"


def main(arguments: list[str] | None = None) -> int:
    """Do what the words name; the exit code is 1 for bad input, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        return _run(options, console)
    except SoftPromptError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, Interrupted):
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, console: Console) -> int:
    results = Results(options.results)
    words = options.what or ["run"]
    if unknown := [word for word in words if word not in ("run", "table", "plot")]:
        raise SoftPromptError(f"what: got {unknown[0]!r}, accepted are run, table and plot")
    if "run" in words:
        if options.minutes is not None and not options.minutes > 0:
            raise SoftPromptError(f"minutes: got {options.minutes:g}, accepted is above 0")
        cells = grid(
            _texts(options.text, console),
            chosen_methods(options.method or METHODS),
            options.ratio or RATIOS,
            options.seed or SEEDS,
            options.everything,
        )
        if options.list:
            _print_cells(cells, results, options.model, console)
            return 0
        _measure(options, cells, results, console)
    if "plot" in words:  # before the tables, which link to it
        written = save_plot(results, options.plot)
        console.print(f"Plot: {options.plot}" if written else "Nothing has been measured, so there is no plot.")
    if "table" in words:
        update_page(options.page, content(results, options.plot))
        update_page(options.readme, markdown(results, texts=[README_TEXT]))
        console.print(f"Tables: {options.page}, {options.readme}")
    if "run" in words:
        console.print(markdown(results, test=False), markup=False)
    return 0


def _measure(options: argparse.Namespace, cells: list[Cell], results: Results, console: Console) -> None:
    study = Study(options.model, options.work, SilentReporter())
    left_out = measure_all(
        study,
        cells,
        results,
        seconds=None if options.minutes is None else 60 * options.minutes,
        say=lambda line: console.print(line, markup=False),
    )
    if left_out:
        console.print(f"Left out: {len(left_out)} cells")
        reasons: dict[str, list[str]] = {}
        for name, reason in left_out.items():
            reasons.setdefault(reason, []).append(name)
        for reason, names in reasons.items():
            console.print(f"  {', '.join(names)}: {reason}", markup=False)


def _texts(names: list[str] | None, console: Console) -> list[Text]:
    """The named texts, or every text that has its files."""
    if names:
        return chosen_texts(names)
    for text in all_texts().values():
        if reason := text.missing():
            console.print(f"Left out: {reason}", markup=False)
    return [text for text in all_texts().values() if text.missing() is None]


def _print_cells(cells: list[Cell], results: Results, model: str, console: Console) -> None:
    waiting = missing_cells(cells, results, model)
    for cell in waiting:
        console.print(f"{cell.name}  about {expected_seconds(cell, results):.0f} s")
    console.print(f"{len(waiting)} of {len(cells)} cells are missing")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("what", nargs="*", help="run, table, plot (default: run)")
    for name, kind, accepted in (
        ("text", str, ", ".join(all_texts())),
        ("method", str, ", ".join(METHODS)),
        ("ratio", int, ", ".join(map(str, RATIOS))),
        ("seed", int, ", ".join(map(str, SEEDS))),
    ):
        parser.add_argument(f"--{name}", nargs="+", action="extend", type=kind, help=f"only these (all: {accepted})")
    parser.add_argument("--minutes", type=float, help="start no cell that is unlikely to end in this time")
    parser.add_argument("--everything", action="store_true", help="also trained cells that the plan leaves out")
    parser.add_argument("--list", action="store_true", help="only list the cells that are missing")
    parser.add_argument("--model", default=MODEL, help=f"folder of the model (default: {MODEL})")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="folder for answers and unfinished runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--page", type=Path, default=PAGE, help="page that the tables are written into")
    parser.add_argument("--readme", type=Path, default=README, help="page that the table of the demo is written into")
    parser.add_argument("--plot", type=Path, default=PLOT, help="file of the plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
