"""Times attention and losses on a CUDA device, ours and baselines, one table a case.

    python -m benchmarks.device [--rounds 20] [--json runs/bench/device.json]

| column | is |
|---|---|
| ms | time on the device: median, with a cold L2 cache; see clock.py |
| × ours | time over ours |
| % bandwidth | share of the published peak, for bytes that must move: inputs and results once, a head twice |
| % FLOP | share of the published peak of the dtype, for useful FLOP: pairs that a mask hides do not count |
| peak MiB | memory allocated above the inputs, results included |
| error | ‖difference‖ / ‖expected‖ of the worst result; the expected ones are made from fp32 copies by PyTorch |

An implementation that is not installed, does not fit into memory or fails is left out with a reason. All in bf16.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.counted.roofline import GPUS, Gpu
from benchmarks.device.cases import CASES, DeviceCase, distance
from benchmarks.device.clock import Cuda, Device, medians

COLUMNS = ("ms", "× ours", "% bandwidth", "% FLOP", "peak MiB", "error")
WIDTH = 120
OURS = "ours"
Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Measure each case, print its table, write the JSON file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds of each case (default: 20)")
    parser.add_argument("--json", type=Path, default=Path("runs/bench/device.json"), help="file for all figures")
    chosen = parser.parse_args(arguments)
    if chosen.rounds < 1:
        parser.error(f"--rounds is {chosen.rounds}, accepted is at least 1")
    if not torch.cuda.is_available():
        parser.error("there is no GPU: torch.cuda finds none")
    name = torch.cuda.get_device_name()
    device, records = Cuda(), []
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    for case in CASES:
        with torch.device("cuda"):
            record = measure(case, device, chosen.rounds)
        records.append(record)
        console.print(table(f"{case.name} on {name}", record, peaks(name)))
        torch.cuda.empty_cache()
    chosen.json.parent.mkdir(parents=True, exist_ok=True)
    written = {"device": name, "torch": torch.__version__, "records": records}
    chosen.json.write_text(json.dumps(written, indent=1) + "\n")
    console.print(f"All figures: {chosen.json}")


def peaks(name: str) -> Gpu | None:
    """The published peaks of a device, by its name; None if they are not known."""
    words = name.replace("-", " ").split()  # whole words: a GH200 is no H200
    return next((gpu for key, gpu in GPUS.items() if key in words), None)


def measure(case: DeviceCase, device: Device, rounds: int) -> Record:
    """Errors and peak memory of all implementations that run, then their times, measured in turns.

    Raises:
        RuntimeError: ours fails. A baseline that fails is left out.
    """
    inputs = case.inputs()
    expected = case.expected(inputs)
    entries: list[Record] = []
    runs: dict[str, Callable[[], Any]] = {}
    left_out: dict[str, str] = {}
    for name, implementation in case.implementations().items():
        try:
            run = implementation(inputs)
            error = max(distance(one, other) for one, other in zip(run(), expected, strict=True))
            entries.append({"implementation": name, "error": error, "peak": device.peak(run)})
            runs[name] = run
        except Exception as failure:  # not installed, no memory, a shape or a dtype that it does not take
            left_out[name] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    if OURS not in runs:
        raise RuntimeError(f"{case.name}: ours fails: {left_out[OURS]}")
    for name, milliseconds in medians(device, runs, rounds).items():
        next(entry for entry in entries if entry["implementation"] == name)["ms"] = milliseconds
    return {
        "case": case.name,
        "bytes": case.bytes,
        "flop": case.flop,
        "dtype": "bf16",
        "entries": entries,
        "left_out": left_out,
    }


def table(title: str, record: Record, gpu: Gpu | None) -> Table:
    """One row an implementation, ours first."""
    made = Table("implementation", title=title, title_justify="left")
    for column in COLUMNS:
        made.add_column(column, justify="right")
    ours = next(entry for entry in record["entries"] if entry["implementation"] == OURS)
    for entry in record["entries"]:
        made.add_row(entry["implementation"], *cells(record, entry, ours["ms"], gpu))
    for name, reason in record["left_out"].items():
        made.add_row(name, "left out", reason)
    return made


def cells(record: Mapping[str, Any], entry: Mapping[str, Any], ours: float, gpu: Gpu | None) -> list[str]:
    """The figures of one row."""
    seconds = entry["ms"] * 1e-3
    return [
        f"{entry['ms']:.3f}",
        f"{entry['ms'] / ours:.2f}",
        "" if gpu is None else f"{record['bytes'] / seconds / gpu.bandwidth:.0%}",
        "" if gpu is None else f"{record['flop'] / seconds / gpu.flop[record['dtype']]:.0%}",
        f"{entry['peak'] / 2**20:.0f}",
        f"{entry['error']:.1e}",
    ]


if __name__ == "__main__":
    main()
