"""Counts bytes, FLOP, exponentials, launches and memory of our GPU kernels and of peers' kernels, beside their floors.

    python -m benchmarks.counted [attention kl linear moments] [--json runs/bench/counters.json]

No GPU is needed, and no time is measured. It takes two minutes. The problems and their floors are in problems.py, what
is counted and how in triton_traffic.py (kernels) and aten_traffic.py (PyTorch's operations), the bound in roofline.py.

| column | is |
|---|---|
| moved MB | bytes between memory and chip: kernels by the model of triton_traffic.py, and PyTorch's operations |
| × floor | moved bytes over the floor, which is the first row of each problem |
| issued MB | bytes that the kernels' programs ask for |
| torch MB | bytes of PyTorch's operations |
| GFLOP, M exp, atomics | of kernels and operations |
| launches, torch ops | numbers of kernels and of PyTorch's operations |
| peak MB | most memory that was allocated during the run |
| bound µs | time that no kernel with these counts can beat |
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.counted import problems, triton_traffic
from benchmarks.counted.requirements import Record, check_requirements
from benchmarks.counted.roofline import GPUS, bound

WIDTH = 200
COLUMNS = (
    "moved MB", "× floor", "issued MB", "torch MB", "GFLOP", "M exp", "atomics", "launches", "torch ops", "peak MB",
)  # fmt: skip
SUITES = {
    "attention": lambda: [count for case in problems.ATTENTION for count in problems.count_attention(case)],
    "kl": lambda: problems.count_logits(problems.LogitsCase()),
    "linear": lambda: problems.count_head(problems.HeadCase()),
    "moments": lambda: problems.count_moments(problems.HeadCase()),
}


def main(arguments: list[str] | None = None) -> None:
    """Count, print the table and the requirements, write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("suites", nargs="*", help=f"any of {', '.join(SUITES)}; default: all")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/counters.json"), help="file for all figures")
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.suites) - set(SUITES):
        parser.error(f"there is no suite {sorted(unknown)[0]}; accepted are {', '.join(SUITES)}")
    if reason := triton_traffic.interpreting():
        parser.error(reason)
    torch.set_num_threads(1)
    records = [count.record() for suite in chosen.suites or SUITES for count in SUITES[suite]()]
    for record in records:
        record["bounds"] = bounds(record)
    requirements = check_requirements(records)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    written = {"records": records, "required": [vars(one) | {"holds": one.holds} for one in requirements]}
    chosen.json.write_text(json.dumps(written, indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(table(records))
    for record in records:
        if "left_out" in record["more"]:
            console.print(f"Left out: {record['suite']}, {record['implementation']}: {record['more']['left_out']}")
    console.print(f"Requirements: {sum(one.holds for one in requirements)} of {len(requirements)} hold")
    for one in sorted(requirements, key=lambda one: one.holds):
        console.print(f"  {'holds ' if one.holds else 'MISSED'} {one.what}: {one.figure:.3g} ≤ {one.limit:g}")
    console.print(f"All figures: {chosen.json}")


def bounds(record: Record) -> dict[str, dict[str, Any]]:
    """For each GPU: seconds that no kernel with these counts can beat, and the resource that sets them."""
    found = {
        gpu: bound(
            gpu,
            record["dtype"],
            bytes_moved=record["moved"],
            flop=record["flop"],
            exponentials=record["exponentials"],
        )
        for gpu in GPUS
    }
    return {gpu: vars(one) for gpu, one in found.items()}


def table(records: list[Record]) -> Table:
    """One section a problem: its floor, then one row an implementation."""
    order = list(dict.fromkeys((record["suite"], record["case"]) for record in records))
    made = Table("problem, implementation", title="Counted, not measured", title_justify="left")
    made.columns[0].no_wrap = True
    for column in (*COLUMNS, f"bound µs: {', '.join(GPUS)}"):
        made.add_column(column, justify="right")
    made.columns[-1].no_wrap = True
    shown = None
    for record in sorted(records, key=lambda record: order.index((record["suite"], record["case"]))):
        problem = f"{record['suite']} {record['case']}"
        if problem != shown:
            if shown is not None:
                made.add_section()
            made.add_row(f"[bold]{problem}[/]", f"{record['floor'] / 1e6:.4g}", "floor")
            shown = problem
        made.add_row(f"  {record['implementation']}", *_cells(record))
    return made


def _cells(record: Record) -> list[str]:
    if "left_out" in record["more"]:
        return ["left out"]
    return [
        f"{record['moved'] / 1e6:.4g}",
        f"{record['times_floor']:.2f}",
        f"{record['issued'] / 1e6:.4g}",
        f"{record['aten'] / 1e6:.4g}",
        f"{record['flop'] / 1e9:.4g}",
        f"{record['exponentials'] / 1e6:.4g}",
        str(record["atomics"]),
        str(record["launches"]),
        str(record["operations"]),
        f"{record['peak'] / 1e6:.4g}",
        ", ".join(f"{one['seconds'] * 1e6:.3g}" for one in record["bounds"].values()),
    ]


if __name__ == "__main__":
    main()
