"""`softprompt doctor --compile`: compiles every shipped kernel for every target; needs no GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from softprompt_kernels.errors import SoftPromptError

if TYPE_CHECKING:
    from softprompt_kernels.kernels.triton.compile.ahead_of_time import Report

HEADER = (
    "kernel", "target", "tile", "types", "registers", "spilled", "shared", "blocks/SM", "matrix", "copies", "load B",
    "store B", "atomics", "problems",
)  # fmt: skip
SHOWN_TYPES = {"*bf16": "bf16", "*fp16": "fp16", "*fp32": "fp32"}


def check(targets: Sequence[str], file: Path | None) -> None:
    """Compiles the kernels, prints a table, and writes all figures as JSON.

    Args:
        targets: architectures such as "sm_90"; empty: all of TARGETS.
        file: where the JSON goes; None: nowhere.

    Raises:
        SoftPromptError: a target is unknown, or nothing can be compiled here.
        typer.Exit: with exit code 1, if a kernel has a problem.
    """
    from softprompt_kernels.cli.display import show_table
    from softprompt_kernels.cli.progress import terminal_reporter
    from softprompt_kernels.kernels.triton.compile import ahead_of_time, shipped_configurations
    from softprompt_kernels.kernels.triton.targets import TARGETS

    if unknown := [name for name in targets if name not in TARGETS]:
        raise SoftPromptError(f"--target {unknown[0]}: accepted are {', '.join(TARGETS)}")
    if reason := ahead_of_time.unavailable():
        raise SoftPromptError(reason)
    chosen = [TARGETS[name] for name in dict.fromkeys(targets)] or list(TARGETS.values())
    kernels = ahead_of_time.distinct(shipped_configurations.requests(chosen))
    with terminal_reporter().progress("Compiling", len(kernels), "kernel") as advance:
        reports = ahead_of_time.compile_all(kernels, done=lambda: advance(1))
    reports.sort(key=lambda report: (report.kernel, [target.name for target in chosen].index(report.target)))
    show_table(HEADER, [row(report) for report in reports])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([to_json(report) for report in reports], indent=1) + "\n")
    failed = [report for report in reports if report.violations]
    for report in failed:
        typer.echo(f"{report.kernel} on {report.target} ({', '.join(report.examples)}): {'; '.join(report.violations)}")
    typer.echo(f"\n{len(reports) - len(failed)} of {len(reports)} kernels passed.")
    if failed:
        raise typer.Exit(1)


def to_json(report: Report) -> dict[str, Any]:
    """A report as JSON values; a constant that JSON has no type for becomes a string."""
    return json.loads(json.dumps(asdict(report), default=str))


def row(report: Report) -> tuple[str, ...]:
    """The cells of a report, under HEADER."""
    code = report.code
    types = dict.fromkeys(SHOWN_TYPES[kind] for kind in report.signature.values() if kind in SHOWN_TYPES)
    cells = [report.kernel, report.target, tile(report), " ".join(types)]
    if code is None:
        return (*cells, *[""] * (len(HEADER) - len(cells) - 1), _problems(report))
    return (
        *cells,
        str(code.registers),
        str(code.stack or code.spilled) + (f" ({code.scalars} scalars)" if code.scalars else ""),
        f"{report.shared_memory / 1024:.0f} KiB",
        str(report.occupancy),
        "+".join(code.matrix),
        "+".join(code.copies),
        _widths(code.load_bytes),
        _widths(code.store_bytes),
        str(code.atomics),
        _problems(report),
    )


def tile(report: Report) -> str:
    """ "M128 N64 D64, 4 warps, 3 stages", from constants named BLOCK_M and so on."""
    blocks = [
        name.upper().rpartition("BLOCK_")[2] + str(value)
        for name, value in report.constants.items()
        if name.rpartition(".")[2].upper().startswith("BLOCK_")
    ]
    return f"{' '.join(blocks)}, {report.options['num_warps']} warps, {report.options['num_stages']} stages"


def _problems(report: Report) -> str:
    return "; ".join(violation.partition(":")[0] for violation in report.violations)


def _widths(widths: Sequence[int]) -> str:
    return ",".join(map(str, widths))
