"""A run as a JSON file that pytest-benchmark can read too (`pytest-benchmark compare FILE`), with all rounds in it.

benchmarks[i].stats          times a run, in seconds; `data` has every round
benchmarks[i].extra_info     the other fields of a `Row`, and `reference_seconds` of every round
softprompt                   the machine, the title and what was left out
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from softprompt_kernels.bench import machine
from softprompt_kernels.bench.footprint import Footprint
from softprompt_kernels.bench.measure import LeftOut, Measured, Row
from softprompt_kernels.bench.plan import DTYPES, Plan
from softprompt_kernels.bench.timing import Timed
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.output_file import written_when_complete
from softprompt_kernels.testing.cases import case

VERSION = 1
HOW = "a run is written by softprompt bench --json"


@dataclass(frozen=True)
class Run:
    """A run that was measured, or read from a file.

    Args:
        title: of its plan.
        machine: what has to be equal for a comparison.
        measured: the rows.
    """

    title: str
    machine: dict[str, Any]
    measured: Measured


def run_of(plan: Plan, measured: Measured) -> Run:
    """The run of a plan on this machine."""
    return Run(plan.title, machine_of(plan), measured)


def machine_of(plan: Plan) -> dict[str, Any]:
    """What has to be equal for a comparison with a run of a plan here."""
    facts = {name: value for name, value in machine.facts().items() if name != "backends"}
    if plan.device.type == "cuda":
        import torch

        facts["gpu"] = torch.cuda.get_device_name(plan.device)
    return facts


def write(option: str, run: Run, path: Path) -> None:
    """Write a run.

    Raises:
        SoftPromptError: the file cannot be written.
    """
    document = {
        "machine_info": _machine_info(run.machine),
        "commit_info": {},
        "benchmarks": [_benchmark(row) for row in run.measured.rows],
        "datetime": datetime.now(UTC).isoformat(),
        "version": "5",
        "softprompt": {
            "format": VERSION,
            "title": run.title,
            "machine": run.machine,
            "other_load": run.measured.other_load,
            "left_out": [asdict(one) for one in run.measured.left_out],
        },
    }
    with written_when_complete(option, path) as file:
        assert file is not None
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(option: str, path: Path) -> Run:
    """Read a run.

    Raises:
        SoftPromptError: there is no such file, or it is not a run.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SoftPromptError(f"{option}: there is no file {path}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise SoftPromptError(f"{option}: {path} is truncated or no JSON ({error}); {HOW}") from None
    except OSError as error:
        raise SoftPromptError(f"{option}: cannot read {path}: {error.strerror}") from None
    head = document.get("softprompt") if isinstance(document, dict) else None
    if not isinstance(head, dict) or "format" not in head:
        raise SoftPromptError(f"{option}: {path} is JSON, but no run of this command; {HOW}")
    if head["format"] != VERSION:
        raise SoftPromptError(f"{option}: {path} has format {head['format']}, accepted is {VERSION}; measure it again")
    try:
        rows = [_row(benchmark) for benchmark in document["benchmarks"]]
        missing = [LeftOut(**one) for one in head["left_out"]]
        return Run(str(head["title"]), dict(head["machine"]), Measured(rows, missing, float(head["other_load"])))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SoftPromptError(
            f"{option}: {path} lacks a field of a run, or has a wrong one ({error!r}); {HOW}"
        ) from None


def _benchmark(row: Row) -> dict[str, Any]:
    from pytest_benchmark.stats import Stats

    stats = Stats()
    for seconds in row.timed.seconds:
        stats.update(seconds)
    problem = f"{row.op} {row.shape} {row.dtype} {row.pass_}"
    info = {name: value for name, value in asdict(row).items() if name not in ("timed", "footprint")}
    return {
        "group": problem,
        "name": f"{row.implementation}: {problem}",
        "fullname": f"softprompt bench::{problem}[{row.implementation}]",
        "params": {"implementation": row.implementation},
        "param": row.implementation,
        "extra_info": {
            **info,
            "reference_seconds": row.timed.reference_seconds,
            "footprint": row.footprint and row.footprint._asdict(),
        },
        "options": {"timer": "perf_counter", "warmup": True, "disable_gc": True},
        "stats": {**stats.as_dict(), "iterations": row.timed.runs, "data": row.timed.seconds},
    }


def _row(benchmark: dict[str, Any]) -> Row:
    info = dict(benchmark["extra_info"])
    timed = Timed(benchmark["stats"]["iterations"], benchmark["stats"]["data"], info.pop("reference_seconds"))
    if not timed.seconds or len(timed.seconds) != len(timed.reference_seconds):
        raise ValueError("rounds")
    footprint = info.pop("footprint")
    row = Row(**info, timed=timed, footprint=footprint and Footprint(**footprint))
    case(row.op, row.shape).check_pass(row.pass_)
    numbers = [*timed.seconds, *timed.reference_seconds, row.work, row.reference_work]
    if row.dtype not in DTYPES or not all(0 < number < math.inf for number in numbers) or not row.error >= 0:
        raise ValueError("times, work, error or dtype")
    return row


def _machine_info(facts: dict[str, Any]) -> dict[str, Any]:
    """In the words of pytest-benchmark."""
    import platform

    return {
        "node": platform.node(),
        "processor": platform.processor(),
        "machine": platform.machine(),
        "python_implementation": platform.python_implementation(),
        "python_version": platform.python_version(),
        "system": platform.system(),
        "cpu": {"brand_raw": facts["processor"]},
    }
