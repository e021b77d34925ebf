"""Prints the report of the suites from the JSON that pytest-benchmark wrote.

    python -m benchmarks.harness.report runs/bench/bench.json

| column | is |
|---|---|
| ms | median over rounds in which all implementations took turns |
| min..max | of the same times |
| cold ms | median of runs right after another implementation, where "ms" is that of a second run in the same turn |
| GFLOP/s | useful FLOP only: pairs that a mask hides do not count |
| % of GEMM | this rate over that of the reference GEMM, a large fp32 `torch.mm` in the same rounds |
| × ours | time over ours |
| × floor | time over the bare GEMMs of the same sizes (attention: over its useful FLOP at the reference GEMM's rate) |
| peak MiB | peak memory above the inputs (training step: above the loaded model) |
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harness.requirements import Record, Verdict, busy, entry_of_role, floor_seconds, verdicts
from softprompt_kernels.bench.machine import describe

COLUMNS = ("ms", "min..max", "cold ms", "GFLOP/s", "% of GEMM", "× ours", "× floor", "peak MiB")
LEGEND = """\
ms         median over rounds in which all implementations took turns; with "cold ms", of the warm (second) run
cold ms    the first run, right after another implementation
GFLOP/s    useful FLOP only; "% of GEMM" is this rate over that of the reference GEMM
× ours     time over ours; "× floor" is time over the bare GEMMs (attention: over its FLOP at the reference GEMM's rate)
peak MiB   memory above the inputs (training step: above the loaded model)"""
TITLES = {  # of the notes of a suite
    "scaling": "scaling: ms at each size; largest time per unit of work, over that of the best smaller size",
    "step": "training step",
}
WIDTH = 172


def show(path: Path) -> None:
    """Print the report."""
    written = json.loads(path.read_text())
    run = written["softprompt"]
    records = [benchmark["extra_info"] for benchmark in written["benchmarks"] if "suite" in benchmark["extra_info"]]
    if not records:
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    rates = [record["reference_gflops"] for record in records]
    title = (
        f"{describe(run)}\n"
        f"reference GEMM (torch.mm, fp32): {median(rates):.0f} GFLOP/s ({min(rates):.0f}..{max(rates):.0f})"
    )
    console.print(_table(title, records))
    console.print(LEGEND)
    for suite in dict.fromkeys(record["suite"] for record in records):
        notes = [note for record in records if record["suite"] == suite for note in record.get("notes", [])]
        if notes:
            console.print(f"\n[bold]{TITLES.get(suite, suite)}[/]")
        for note in notes:
            console.print(f"  {note}")
    console.print()
    if disturbed := [record for record in records if busy(record)]:
        console.print(
            f"[bold]Other processes used the machine during {len(disturbed)} of {len(records)} cases (up to "
            f"{max(record['other_load'] for record in disturbed):.0%} of its CPU time). "
            "Measure these cases, marked !, again.[/]"
        )
    if run["quick"]:
        console.print("Quick run: the sizes are tiny, and the figures mean nothing.")
    else:
        console.print(_required(verdicts(records)))
    for sentence in run["left_out"]:
        console.print(f"Left out: {sentence}.")
    console.print(f"All figures: {path}")


def _table(title: str, records: list[Record]) -> Table:
    table = Table("case, implementation", title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for record in records:
        if not record.get("in_table", True):
            continue
        backends = ", ".join(record["backends"])
        rounds = "1 round" if record["rounds"] == 1 else f"{record['rounds']} rounds"
        mark = "! " if busy(record) else ""
        table.add_row(f"[bold]{mark}{record['suite']} {record['case']}[/] (backend: {backends}; {rounds})")
        for entry in record["entries"]:
            if entry["role"] != "reference GEMM":
                table.add_row(f"  {entry['name']}", *_cells(record, entry))
        table.add_section()
    return table


def _cells(record: Record, entry: dict[str, Any]) -> list[str]:
    seconds, floor = entry["median"], floor_seconds(record)
    rate = None if entry["flop"] is None else entry["flop"] / seconds * 1e-9
    peak, cold = entry["peak_bytes"], entry["cold"]
    same_work = entry["role"] != "paired variant"
    return [
        f"{seconds * 1e3:.2f}",
        f"{entry['min'] * 1e3:.2f}..{entry['max'] * 1e3:.2f}",
        "" if cold is None else f"{cold * 1e3:.2f}",
        "" if rate is None else f"{rate:.1f}",
        "" if rate is None else f"{rate / record['reference_gflops']:.0%}",
        f"{seconds / entry_of_role(record, 'ours')['median']:.2f}",
        "" if floor is None or not same_work else f"{seconds / floor:.2f}",
        "" if peak is None else f"{peak / 2**20:.1f}",
    ]


def _required(found: list[Verdict]) -> Table:
    held = sum(verdict.holds for verdict in found)
    title = f"Requirements: {held} of {len(found)} hold"
    table = Table("case", "requirement", title=title, title_justify="left")
    table.add_column("limit", justify="right")
    table.add_column("figure", justify="right")
    table.add_column("")
    for verdict in sorted(found, key=lambda verdict: verdict.holds):
        sign = "≥" if verdict.at_least else "≤"
        word = "holds" if verdict.holds else "[bold]MISSED[/]"
        mark = "! " if verdict.busy else ""
        case = f"{mark}{verdict.suite} {verdict.case}"
        table.add_row(case, verdict.kind, f"{sign} {verdict.limit:g}", f"{verdict.figure:.2f}", word)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("json", type=Path, help="file that pytest-benchmark wrote")
    show(parser.parse_args().json)
