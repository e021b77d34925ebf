"""`softprompt profile`: runs one op under a profiler, with its calls and kernels by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from softprompt_kernels.cli.display import show_table
from softprompt_kernels.errors import SoftPromptError, is_out_of_memory

if TYPE_CHECKING:
    from softprompt_kernels.profiling.session import Session
    from softprompt_kernels.profiling.summary import Row, Summary

Pass = Literal["forward", "backward", "forward+backward"]
OpDtype = Literal["float32", "bfloat16", "float16"]
OpDevice = Literal["auto", "cpu", "cuda"]

ON_CPU_ONLY = ("cpu", "composed", "simt")
"""Backends for which `--device auto` is the CPU also where there is a GPU."""

HEADER = ("range", "calls", "ms/call", "share", "GFLOP/call", "MB/call", "rate")


def profile(
    op: Annotated[str, typer.Argument(metavar="OP", help="prompt_attention, kl_div, linear_kl_div, ...")],
    *,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Its sizes: 'B8 H14/2 M256 P128 D64' for attention, 'N512 d576 V49152' for losses. "
            "Default: that of the suite quick."
        ),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="The backend. Default: the op chooses.")] = None,
    dtype: Annotated[OpDtype, typer.Option(help="Dtype of the inputs.")] = "float32",
    device: Annotated[OpDevice, typer.Option(help="auto: cuda if there is one and the backend serves it.")] = "auto",
    pass_: Annotated[Pass | None, typer.Option("--pass", help="Default: all that the op has.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Calls that are measured, after a warm-up.")] = 10,
    trace: Annotated[
        Path | None, typer.Option(help="Write a Chrome trace to this file, for ui.perfetto.dev. .json or .json.gz.")
    ] = None,
    cuda_profiler: Annotated[
        bool,
        typer.Option(
            "--cuda-profiler",
            help="For nsys and ncu: NVTX ranges, and cudaProfilerStart and Stop around what is measured.",
        ),
    ] = False,
) -> None:
    """Profile one op: its calls and kernels by name, with their times, FLOP and bytes.

    FLOP and bytes are what the op cannot do without. Times include the profiler's own work: a few µs a range.
    """
    import torch

    from softprompt_kernels.profiling.session import Session, expose_case, profile_case
    from softprompt_kernels.testing.cases import suite

    if cuda_profiler and trace is not None:
        raise SoftPromptError("--trace: got --cuda-profiler too; accepted is one of them, a GPU serves one profiler")
    on = _device(torch, device, backend)
    if shape is None:
        shape = next((case.shape for case in suite("quick") if case.op == op), "")
    session = Session(op, shape, backend, getattr(torch, dtype), on, pass_, rounds)
    summary = None
    try:
        if cuda_profiler:
            expose_case(session)
        else:
            summary = profile_case(session, trace)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise SoftPromptError(f"--shape: {shape!r} takes more memory than there is") from error
    if summary is None:
        typer.echo(f"{description(session)}\nThe ranges went to the profiler around this process.")
        return
    typer.echo(description(session))
    show_table(HEADER, table(summary, rounds))
    if trace is not None:
        typer.echo(f"Trace: {trace}")


def _device(torch: Any, name: str, backend: str | None) -> Any:
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise SoftPromptError("--device: got cuda, but torch sees no CUDA device here; accepted is cpu")
    on_gpu = name == "cuda" or (name == "auto" and has_gpu and backend not in ON_CPU_ONLY)
    return torch.device("cuda" if on_gpu else "cpu")


def description(session: Session) -> str:
    """What ran, and where."""
    import torch

    from softprompt_kernels.bench.machine import processor

    case, device = session.case, session.device
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        where = f"{processor()}, threads: {torch.get_num_threads()}"
    dtype = str(session.dtype).removeprefix("torch.")
    return f"{case.name}, {session.pass_}, {dtype}, {session.rounds} rounds on {where}"


def table(summary: Summary, rounds: int) -> list[tuple[str, ...]]:
    """The cells: kernels are indented below their call. Times, FLOP and bytes are means."""
    rows = [_cells(row, summary) for row in summary.rows]
    rows.append(_line("outside of them", rounds, summary.outside, summary))
    rows.append(_line("all", rounds, summary.seconds, summary))
    return rows


def _cells(row: Row, summary: Summary) -> tuple[str, ...]:
    where = row.name[row.name.index("[") :]
    name = f"{row.parts.call}{where}" if row.parts.kernel is None else f"  {row.parts.kernel}{where}"
    line = _line(name, row.calls, row.seconds, summary)
    flop = "" if row.flop is None else f"{row.flop / row.calls / 1e9:.3g}"
    size = "" if row.bytes is None else f"{row.bytes / row.calls / 1e6:.3g}"
    rate = ""
    if row.seconds and row.flop is not None:
        rate = f"{row.flop / row.seconds / 1e9:.3g} GFLOP/s"
    elif row.seconds and row.bytes is not None:
        rate = f"{row.bytes / row.seconds / 1e9:.3g} GB/s"
    return (*line[:4], flop, size, rate)


def _line(name: str, calls: int, seconds: float, summary: Summary) -> tuple[str, ...]:
    share = seconds / summary.seconds if summary.seconds else 0.0
    return (name, str(calls), f"{seconds / calls * 1e3:.3g}", f"{share:.1%}", "", "", "")
