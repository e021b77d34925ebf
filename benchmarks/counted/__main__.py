"""Bytes, FLOP, exponentials, launches and memory of our GPU kernels, of peers' kernels and of their floors, counted.

    python -m benchmarks.counted [attention kl linear moments] [--json runs/bench/counters.json]

No GPU is needed, and no time is measured: see traffic.py for what is counted and by which model, counted.py for the
problems and their floors, roofline.py for what the last column is a bound of. Two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton
sys.path.insert(0, str(Path(__file__).parent))

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.counted import problems as counted
from benchmarks.counted import triton_traffic as traffic
from benchmarks.counted.requirements import Record, judge
from benchmarks.counted.roofline import GPUS, bound

WIDTH = 200
COLUMNS = (
    "moved MB", "× floor", "issued MB", "torch MB", "GFLOP", "M exp", "atomics", "launches", "torch ops", "peak MB",
)  # fmt: skip
SUITES = {
    "attention": lambda: [count for case in counted.ATTENTION for count in counted.count_attention(case)],
    "kl": lambda: counted.count_logits(counted.LogitsCase()),
    "linear": lambda: counted.count_head(counted.HeadCase()),
    "moments": lambda: counted.count_moments(counted.HeadCase()),
}


def main(arguments: list[str] | None = None) -> None:
    """Counts, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("suites", nargs="*", help=f"of {', '.join(SUITES)}; default: all")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/counters.json"))
    chosen = parser.parse_args(arguments)
    if unknown := set(chosen.suites) - set(SUITES):
        parser.error(f"there is no suite {sorted(unknown)[0]}; accepted are {', '.join(SUITES)}")
    if reason := traffic.interpreting():
        parser.error(reason)
    torch.set_num_threads(1)
    records = [count.record() for suite in chosen.suites or SUITES for count in SUITES[suite]()]
    for record in records:
        record["bounds"] = bounds(record)
    required = judge(records)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    written = {"records": records, "required": [vars(one) | {"holds": one.holds} for one in required]}
    chosen.json.write_text(json.dumps(written, indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(table(records))
    console.print(f"Required: {sum(one.holds for one in required)} of {len(required)} hold")
    for one in sorted(required, key=lambda one: one.holds):
        console.print(f"  {'holds ' if one.holds else 'MISSED'} {one.what}: {one.figure:.3g} ≤ {one.limit:g}")
    console.print(f"All figures: {chosen.json}")


def bounds(record: Record) -> dict[str, dict[str, Any]]:
    """Seconds that no kernel with these counts can beat, by GPU, and what sets them."""
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
    """One row a way."""
    order = list(dict.fromkeys((record["suite"], record["case"]) for record in records))
    made = Table("problem, way", title="Counted, not measured", title_justify="left")
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
        made.add_row(f"  {record['way']}", *_cells(record))
    return made


def _cells(record: Record) -> list[str]:
    if "left_out" in record["more"]:
        return ["left out:", record["more"]["left_out"]]
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
