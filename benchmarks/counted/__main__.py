"""Counts bytes, FLOP, launches and memory of each op and of other packages' kernels, beside a floor and a bound.

    python -m benchmarks.counted [--op kl_div linear_kl_div] [--chip H100 MI300X] [--json runs/bench/counters.json]

No GPU is needed, and no time is measured. It takes three minutes. What is counted and how is in triton_traffic.py
(kernels, in Triton's interpreter) and aten_traffic.py (PyTorch's operations); the problems, implementations and floors
are in attention.py and losses.py, the bound in roofline.py.

| column | is |
|---|---|
| moved MB | bytes between memory and chip: kernels by the model of triton_traffic.py, and PyTorch's operations |
| × floor | moved bytes over the floor, which the title names |
| GFLOP | of GEMMs |
| launches | kernels and PyTorch's operations, each of which launches at least one |
| transient MB | most memory that was allocated during the run, results included |
| a chip's µs | time that no kernel with these counts can beat there, by memory, GEMM or exp (exponentials) |

The JSON file has more: issued bytes, exponentials, atomics, each kernel's tensors.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.counted import attention, losses, triton_traffic
from benchmarks.counted.record import Count
from benchmarks.counted.requirements import Record, check_requirements
from benchmarks.counted.roofline import GPUS, bound

WIDTH = 180
SHORT = {"exponentials": "exp"}
OPS: dict[str, Callable[[], list[Count]]] = {
    "prompt_attention": lambda: [count for case in attention.ATTENTION for count in attention.count_attention(case)],
    "kl_div": lambda: [
        count for name in losses.DIVERGENCES for count in losses.count_logits(losses.LogitsCase(), name)
    ],
    "linear_kl_div": lambda: [
        count for name in losses.DIVERGENCES for count in losses.count_head(losses.HeadCase(), name)
    ],
    "linear_kl_div_from_moments": lambda: losses.count_moments(losses.HeadCase()),
    "teacher_moments": lambda: losses.count_teacher(losses.HeadCase()),
}


def main(arguments: list[str] | None = None) -> None:
    """Count, print the tables and the requirements, write the JSON file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counted", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--op", nargs="+", default=list(OPS), help=f"any of {', '.join(OPS)}; default: all")
    parser.add_argument("--chip", nargs="+", default=list(GPUS), help=f"any of {', '.join(GPUS)}; default: all")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/counters.json"), help="file for all figures")
    chosen = parser.parse_args(arguments)
    for kind, given, known in (("op", chosen.op, OPS), ("chip", chosen.chip, GPUS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"there is no {kind} {unknown[0]}; accepted are {', '.join(known)}")
    if reason := triton_traffic.interpreting():
        parser.error(reason)
    torch.set_num_threads(1)
    records = [count.record() for op in chosen.op for count in OPS[op]()]
    for record in records:
        if "left_out" not in record["more"]:
            record["bounds"] = bounds(record, chosen.chip)
    requirements = check_requirements(records)
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    written = {"records": records, "required": [vars(one) | {"holds": one.holds} for one in requirements]}
    chosen.json.write_text(json.dumps(written, indent=1) + "\n")
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for suite, case in dict.fromkeys((record["suite"], record["case"]) for record in records):
        of_problem = [record for record in records if (record["suite"], record["case"]) == (suite, case)]
        console.print(table(of_problem, chosen.chip))
    for (name, reason), suites in left_out(records).items():
        console.print(f"Left out of {', '.join(suites)}: {escape(name)}: {escape(reason)}.")
    console.print(f"Requirements: {sum(one.holds for one in requirements)} of {len(requirements)} hold")
    for one in sorted(requirements, key=lambda one: one.holds):
        console.print(f"  {'holds ' if one.holds else 'MISSED'} {one.what}: {one.figure:.3g} ≤ {one.limit:g}")
    console.print(f"All figures: {chosen.json}")


def bounds(record: Record, chips: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each chip: seconds that no kernel with these counts can beat, and the resource that sets them."""
    found = {
        chip: bound(
            chip,
            record["dtype"],
            bytes_moved=record["moved"],
            flop=record["flop"],
            exponentials=record["exponentials"],
        )
        for chip in chips
    }
    return {chip: vars(one) for chip, one in found.items()}


def left_out(records: list[Record]) -> dict[tuple[str, str], list[str]]:
    """(implementation, reason) -> the problems that it is left out of."""
    found: dict[tuple[str, str], list[str]] = {}
    for record in records:
        if "left_out" in record["more"]:
            suites = found.setdefault((record["implementation"], record["more"]["left_out"]), [])
            if record["suite"] not in suites:
                suites.append(record["suite"])
    return found


def table(records: list[Record], chips: Sequence[str]) -> Table:
    """One problem: one row an implementation."""
    first = records[0]
    title = (
        f"[bold]{first['suite']}[/], {first['case']}: counted, not measured; floor {number(first['floor'] / 1e6)} MB"
    )
    made = Table("implementation", title=title, title_justify="left", title_style="")
    made.columns[0].no_wrap = True
    for column in ("moved MB", "× floor", "GFLOP", "launches", "transient MB", *(f"{chip} µs" for chip in chips)):
        made.add_column(column, justify="right")
    for record in records:
        if "left_out" not in record["more"]:
            made.add_row(escape(record["implementation"]), *_cells(record))
    return made


def _cells(record: Record) -> list[str]:
    return [
        number(record["moved"] / 1e6),
        f"{record['times_floor']:.2f}",
        number(record["flop"] / 1e9),
        str(record["launches"] + record["operations"]),
        number(record["peak"] / 1e6),
        *(f"{number(one['seconds'] * 1e6)} {SHORT.get(one['by'], one['by'])}" for one in record["bounds"].values()),
    ]


def number(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{float(f'{value:.3g}'):g}"


if __name__ == "__main__":
    main()
