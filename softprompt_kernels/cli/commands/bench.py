"""`softprompt bench`: time and memory of the ops and of other packages, and the comparison of two runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from softprompt_kernels.errors import SoftPromptError, is_out_of_memory
from softprompt_kernels.output_file import check_output

if TYPE_CHECKING:
    from softprompt_kernels.bench.measure import Measured
    from softprompt_kernels.bench.plan import Plan
    from softprompt_kernels.bench.record import Run

NEEDED = {"psutil": "psutil", "pytest_benchmark": "pytest-benchmark"}  # by the name of the module

Suite = Annotated[
    str | None, typer.Option(help="quick (default), smollm2, qwen3, llama3, gemma3 or scaling. See --list.")
]
Ops = Annotated[list[str] | None, typer.Option("--op", help="Only this op; may be given several times.")]
Shapes = Annotated[
    list[str] | None,
    typer.Option("--shape", help='A shape of the op in place of a suite, such as "B8 H14/2 M256 P128 D64".'),
]
Backends = Annotated[
    list[str] | None, typer.Option("--backend", help="Only this backend; may be given several times. Default: all.")
]
Peers = Annotated[
    list[str] | None,
    typer.Option("--peer", help="Only this other implementation; several times, or none. Default: all that run here."),
]
Passes = Annotated[
    list[str] | None,
    typer.Option("--pass", help="forward, backward or forward+backward. Default: the first and the last."),
]
Dtype = Annotated[str | None, typer.Option(help="float32 (default), bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="auto (default), cpu or cuda.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the run, with every round, to this JSON file.")]
Plots = Annotated[Path | None, typer.Option(help="Draw time and memory against N, P, B and V into this folder.")]
BaseFile = Annotated[
    Path | None, typer.Option("--compare", help="Compare with this earlier run. Exit code 1 if a backend is slower.")
]
RunFile = Annotated[Path | None, typer.Option("--run", help="Show or compare this earlier run; measure nothing.")]
Threshold = Annotated[
    float | None, typer.Option(min=0.0, help="What change matters in a comparison. Default: 0.1, a tenth.")
]
Rounds = Annotated[int | None, typer.Option(min=1, help="Number of rounds. Default: by time, 16 to 40.")]
Memory = Annotated[bool, typer.Option(help="Also measure memory, in a process for each implementation.")]
List = Annotated[bool, typer.Option("--list", help="List suites, shapes, backends and peers; measure nothing.")]


def bench(
    *,
    suite: Suite = None,
    op: Ops = None,
    shape: Shapes = None,
    backend: Backends = None,
    peer: Peers = None,
    pass_: Passes = None,
    dtype: Dtype = None,
    device: Device = None,
    json: JsonFile = None,
    plots: Plots = None,
    compare: BaseFile = None,
    run: RunFile = None,
    threshold: Threshold = None,
    rounds: Rounds = None,
    memory: Memory = True,
    list_: List = False,
) -> None:
    """Measure time and memory of the ops, beside PyTorch and other packages.

    Results are checked against float64 before they are timed. All implementations of a problem take turns.
    """
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise SoftPromptError(f"bench needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    from softprompt_kernels.bench import compare as comparing
    from softprompt_kernels.bench import record
    from softprompt_kernels.bench.plan import make_plan
    from softprompt_kernels.bench.table import console, tables

    chosen = {
        "--suite": suite, "--op": op, "--shape": shape, "--backend": backend, "--peer": peer, "--pass": pass_,
        "--dtype": dtype, "--device": device, "--json": json, "--rounds": rounds, "--no-memory": not memory,
    }  # fmt: skip
    if run is not None and (given := [name for name, value in chosen.items() if value]):
        raise SoftPromptError(f"--run: shows an earlier run as it is, and takes no {', '.join(given)}")
    plan = make_plan(
        suite, op or (), shape or (), backend or (), peer or (), pass_ or (), dtype or "float32", device or "auto"
    )
    if list_:
        _list(plan)
        return
    if threshold is not None and compare is None:
        raise SoftPromptError("--threshold: belongs to a comparison, and there is no --compare")
    threshold = 0.1 if threshold is None else threshold
    base = None if compare is None else record.read("--compare", compare)
    if json is not None:
        check_output("--json", json)
    if plots is not None:
        if plots.exists() and not plots.is_dir():
            raise SoftPromptError(f"--plots: {plots} is not a folder")
        check_output("--plots", plots / "plot.png" if plots.exists() else plots)
    if base is not None and run is None:
        comparing.check_plan(base, plan)
    result, stopped = (record.read("--run", run), False) if run is not None else _measure(plan, rounds, memory)
    if json is not None:
        record.write("--json", result, json)
    if base is None or run is None:
        console().print(tables(result.measured))
    if plots is not None:
        _draw(result, plots)
    if base is not None:
        found = comparing.compare(base, result, threshold)
        console().print(comparing.comparison_table(found, threshold))
        if found.slower and not stopped:
            raise typer.Exit(1)
    if stopped:
        raise KeyboardInterrupt


def _measure(plan: Plan, rounds: int | None, memory: bool) -> tuple[Run, bool]:
    """The run, and whether Ctrl-C ended it. What was finished before is kept."""
    from rich.console import Console

    from softprompt_kernels.bench import record
    from softprompt_kernels.bench.measure import measure
    from softprompt_kernels.cli.quiet import quiet_libraries

    quiet_libraries()
    finished: list[Measured] = []
    stopped = False
    try:
        with Console(stderr=True).status("") as status:
            measured = measure(plan, status.update, rounds, memory, finished.append)
    except KeyboardInterrupt:
        if not finished or not finished[-1].rows:
            raise
        measured, stopped = finished[-1], True
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SoftPromptError("out of memory; a smaller --suite or --shape, or fewer --peer, needs less") from error
    if not measured.rows:
        reasons = "; ".join(f"{one.implementation}: {one.reason}" for one in measured.left_out)
        raise SoftPromptError(f"nothing can be measured here: {reasons}")
    return record.run_of(plan, measured), stopped


def _draw(run: Run, folder: Path) -> None:
    from softprompt_kernels.bench.plots import draw

    folder.mkdir(exist_ok=True)
    paths = draw(run.measured.rows, folder)
    for path in paths:
        typer.echo(f"Plot: {path}")
    if not paths:
        typer.echo("No plot: no size has two values while the others stay. The suite scaling has some.")


def _list(plan: Plan) -> None:
    from softprompt_kernels.bench.implementations import DEFAULT_BACKENDS
    from softprompt_kernels.bench.peers.registry import PEERS
    from softprompt_kernels.testing.cases import SUITES
    from softprompt_kernels.testing.cases import suite as cases_of

    for name in SUITES:
        chosen = "  (chosen)" if name == plan.title else ""
        typer.echo(f"suite {name}{chosen}")
        for case in cases_of(name):
            typer.echo(f"  {case.name}")
    typer.echo(f"backends\n  {', '.join(DEFAULT_BACKENDS)}\npeers")
    for peer in PEERS.values():
        typer.echo(f"  {peer.name}: {peer.summary}; {', '.join(peer.forwards)}")
