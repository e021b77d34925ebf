"""What is required of ours, judged from the records of the comparisons.

A record carries its rules, `(kind, limit)`. A kind is a function in this file: it takes the record and returns the
figure that the limit is for. The report lists the figures that miss their limit. A miss is no failure of the run,
because a time depends on the machine as much as on our code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
BUSY = 0.05  # share of all CPU time; the system itself takes less than that


@dataclass(frozen=True)
class Verdict:
    """One rule, judged for one case.

    Args:
        suite, case: the record.
        kind: of the rule; a key of `KINDS`.
        figure, limit: what was measured, and what is required.
        at_least: whether the figure must be at least the limit, else at most.
        busy: whether other processes used the machine meanwhile. A quiet machine may give another verdict.
    """

    suite: str
    case: str
    kind: str
    figure: float
    limit: float
    at_least: bool
    busy: bool

    @property
    def holds(self) -> bool:
        return self.figure >= self.limit if self.at_least else self.figure <= self.limit


def verdicts(records: list[Record]) -> list[Verdict]:
    """All rules of all records."""
    found = []
    for record in records:
        for kind, limit in record["rules"]:
            at_least, figure = KINDS[kind]
            found.append(Verdict(record["suite"], record["case"], kind, figure(record), limit, at_least, busy(record)))
    return found


def busy(record: Record) -> bool:
    """Whether other processes used the machine during the comparison."""
    return bool(record["other_load"] > BUSY)


def entry_of_role(record: Record, role: str) -> Any:
    """The first entry of a role."""
    return next(entry for entry in record["entries"] if entry["role"] == role)


def floor_seconds(record: Record) -> float | None:
    """Seconds of the floor in the comparison; where there is none, of the useful FLOP at the reference GEMM's rate."""
    floors = [entry["median"] for entry in record["entries"] if entry["role"] == "floor"]
    if floors:
        return float(min(floors))
    return None if record["flop"] is None else record["flop"] / record["reference_gflops"] * 1e-9


def _speedup(record: Record, prefix: str) -> float:
    """Time of the fastest baseline whose name starts with `prefix`, over our time."""
    times = [e["median"] for e in record["entries"] if e["role"] == "baseline" and e["name"].startswith(prefix)]
    return min(times, default=float("inf")) / float(entry_of_role(record, "ours")["median"])


def _over_floor(record: Record) -> float:
    floor = floor_seconds(record)
    assert floor is not None
    return float(entry_of_role(record, "ours")["median"]) / floor


def _over_variant(record: Record) -> float:
    return float(entry_of_role(record, "ours")["median"] / entry_of_role(record, "paired variant")["median"])


def _cost_over_variant(record: Record) -> float:
    return float(_over_variant(record) * entry_of_role(record, "paired variant")["flop"] / record["flop"])


def _mib_above(record: Record) -> float:
    return float((entry_of_role(record, "ours")["peak_bytes"] - record["result_bytes"]) / 2**20)


def _step_ops_over_floor(record: Record) -> float:
    return float(record["ops_over_floor"])


# kind -> (whether the limit is a lower one, the figure)
KINDS: dict[str, tuple[bool, Callable[[Record], float]]] = {
    "speedup over the fastest baseline": (True, lambda record: _speedup(record, "")),
    "speedup over plain PyTorch": (True, lambda record: _speedup(record, "PyTorch")),
    "speedup over concat + SDPA": (True, lambda record: _speedup(record, "concat + SDPA")),
    "rate, as a share of the reference GEMM's": (True, lambda record: 1 / _over_floor(record)),
    "time over the floor": (False, _over_floor),
    "time over the paired variant's": (False, _over_variant),
    "time per FLOP over the paired variant's": (False, _cost_over_variant),
    "peak MiB beyond inputs and gradient": (False, _mib_above),
    "time of the ops over their floor": (False, _step_ops_over_floor),
}
