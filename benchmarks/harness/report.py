"""The report of the suites, from the JSON that pytest-benchmark wrote.

    python benchmarks/harness/report.py runs/bench/bench.json

Seconds are medians over rounds in which all ways of a case took turns; "after others" is the time right after another
way, where a second run is the one that counts. GFLOP/s counts useful FLOP only; "% of mm" is of the rate of a large
fp32 product in the same rounds. "× ours" is the way's time over ours, "× floor" over the bare products of the same
sizes (attention: its useful FLOP at the mm rate). Memory is the peak above the inputs.
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

from benchmarks.harness.machine import describe
from benchmarks.harness.requirements import Record, Verdict, busy, floor_seconds, one, verdicts

COLUMNS = ("ms", "min..max", "after others", "GFLOP/s", "% of mm", "× ours", "× floor", "peak MiB")
WIDTH = 172


def show(path: Path) -> None:
    """Print it."""
    written = json.loads(path.read_text())
    known = written["softprompt"]
    records = [benchmark["extra_info"] for benchmark in written["benchmarks"] if "suite" in benchmark["extra_info"]]
    if not records:
        return
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    rates = [record["mm_gflops"] for record in records]
    title = f"{describe(known)}; mm {median(rates):.0f} GFLOP/s ({min(rates):.0f}..{max(rates):.0f})"
    console.print(_table(title, records))
    for record in records:
        for note in record.get("notes", []):
            console.print(f"{record['suite']}: {note}")
    if disturbed := [record for record in records if busy(record)]:
        console.print(
            f"[bold]Others used the machine during {len(disturbed)} of {len(records)} cases (up to "
            f"{max(record['other_load'] for record in disturbed):.0%} of it): measure those, marked !, again.[/]"
        )
    if known["quick"]:
        console.print("Quick: sizes are tiny, and the figures mean nothing.")
    else:
        console.print(_required(verdicts(records)))
    for sentence in known["left_out"]:
        console.print(f"Left out: {sentence}.")
    console.print(f"All figures: {path}")


def _table(title: str, records: list[Record]) -> Table:
    table = Table("case, way", title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for record in records:
        if not record.get("in_table", True):
            continue
        served = ", ".join(record["served_by"])
        mark = "! " if busy(record) else ""
        table.add_row(f"[bold]{mark}{record['suite']} {record['case']}[/] (ours: {served}; {record['rounds']} rounds)")
        for entry in record["entries"]:
            if entry["role"] != "ruler":
                table.add_row(f"  {entry['name']}", *_cells(record, entry))
        table.add_section()
    return table


def _cells(record: Record, entry: dict[str, Any]) -> list[str]:
    seconds, floor = entry["median"], floor_seconds(record)
    rate = None if entry["flop"] is None else entry["flop"] / seconds * 1e-9
    peak, after_others = entry["peak_bytes"], entry["after_others"]
    comparable = entry["role"] != "twin"
    return [
        f"{seconds * 1e3:.2f}",
        f"{entry['min'] * 1e3:.2f}..{entry['max'] * 1e3:.2f}",
        "" if after_others is None else f"{after_others * 1e3:.2f}",
        "" if rate is None else f"{rate:.1f}",
        "" if rate is None else f"{rate / record['mm_gflops']:.0%}",
        f"{seconds / one(record, 'ours')['median']:.2f}",
        "" if floor is None or not comparable else f"{seconds / floor:.2f}",
        "" if peak is None else f"{peak / 2**20:.1f}",
    ]


def _required(found: list[Verdict]) -> Table:
    held = sum(verdict.holds for verdict in found)
    table = Table("case", "required", title=f"Required: {held} of {len(found)} hold", title_justify="left")
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
    parser.add_argument("json", type=Path, help="written by pytest-benchmark")
    show(parser.parse_args().json)
