"""Attention and losses on a CUDA device, ours against others, in one table.

    python -m benchmarks.device [--rounds 20] [--json runs/bench/device.json]

| column | is |
|---|---|
| ms | time on the device, median, cold L2 cache; see device_clock.py |
| × ours | the way's time over ours |
| % bandwidth | of the published peak, for bytes that no way can do without: inputs and results once, a head twice |
| % FLOP | of the published peak of the dtype, for useful FLOP: what a mask hides does not count |
| peak MiB | allocated above the inputs, results included |
| error | of the worst result, ‖difference‖ / ‖right‖, right being made from fp32 copies by PyTorch |

A way that is not installed, does not fit into memory or fails is left out with a reason. bf16 throughout.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

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
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, default=Path("runs/bench/device.json"))
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
    """The published peaks of a device by its name; None if it is not among those known."""
    return next((gpu for key, gpu in GPUS.items() if key in name), None)


def measure(case: DeviceCase, device: Device, rounds: int) -> Record:
    """Every way that runs: error, memory, then time in turns."""
    inputs = case.inputs()
    right = case.right(inputs)
    entries: list[Record] = []
    runs: dict[str, Callable[[], Any]] = {}
    left_out: dict[str, str] = {}
    for name, way in case.ways().items():
        try:
            run = way(inputs)
            error = max(distance(one, other) for one, other in zip(run(), right, strict=True))
            entries.append({"way": name, "error": error, "peak": device.peak(run)})
            runs[name] = run
        except Exception as failure:  # not installed, no memory, a shape or a dtype that it does not take
            left_out[name] = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
    if OURS not in runs:
        raise RuntimeError(f"{case.name}: ours fails: {left_out[OURS]}")
    for name, milliseconds in medians(device, runs, rounds).items():
        next(entry for entry in entries if entry["way"] == name)["ms"] = milliseconds
    return {
        "case": case.name,
        "bytes": case.bytes,
        "flop": case.flop,
        "dtype": "bf16",
        "entries": entries,
        "left_out": left_out,
    }


def table(title: str, record: Record, gpu: Gpu | None) -> Table:
    """One row a way, ours first."""
    made = Table("way", title=title, title_justify="left")
    for column in COLUMNS:
        made.add_column(column, justify="right")
    ours = next(entry for entry in record["entries"] if entry["way"] == OURS)
    for entry in record["entries"]:
        made.add_row(entry["way"], *cells(record, entry, ours["ms"], gpu))
    for name, reason in record["left_out"].items():
        made.add_row(name, "left out", reason)
    return made


def cells(record: Mapping[str, Any], entry: Mapping[str, Any], ours: float, gpu: Gpu | None) -> list[str]:
    """The figures of a way."""
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
