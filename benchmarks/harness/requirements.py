"""What is required of ours, judged from the records of the contests.

A record carries its rules, `(kind, limit)`; a kind is a function here, from the record to the figure that the limit is
for. A figure that is missed is said so in the report; it fails nothing, since it is of the machine as much as of us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
BUSY = 0.05  # of all processors' time; less is the system's own


@dataclass(frozen=True)
class Verdict:
    """One rule for one case; `busy`: others used the machine meanwhile, so it may be another when it is quiet."""

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
    """Whether others used the machine while it was measured."""
    return bool(record["other_load"] > BUSY)


def one(record: Record, role: str) -> Any:
    """The first entry of a role."""
    return next(entry for entry in record["entries"] if entry["role"] == role)


def floor_seconds(record: Record) -> float | None:
    """Of the bare products in the contest; where there are none, of the useful FLOP at the mm rate."""
    floors = [entry["median"] for entry in record["entries"] if entry["role"] == "floor"]
    if floors:
        return float(min(floors))
    return None if record["flop"] is None else record["flop"] / record["mm_gflops"] * 1e-9


def _fastest(record: Record, prefix: str) -> float:
    """How many times slower than ours the fastest alternative of that name is."""
    times = [e["median"] for e in record["entries"] if e["role"] == "alternative" and e["name"].startswith(prefix)]
    return min(times, default=float("inf")) / float(one(record, "ours")["median"])


def _over_floor(record: Record) -> float:
    floor = floor_seconds(record)
    assert floor is not None
    return float(one(record, "ours")["median"]) / floor


def _of_twin(record: Record) -> float:
    return float(one(record, "ours")["median"] / one(record, "twin")["median"])


def _cost_of_twin(record: Record) -> float:
    return float(_of_twin(record) * one(record, "twin")["flop"] / record["flop"])


def _mib_above(record: Record) -> float:
    return float((one(record, "ours")["peak_bytes"] - record["result_bytes"]) / 2**20)


def _given(record: Record) -> float:
    return float(record["over_own_floor"])


# kind -> (whether the limit is the least that is good enough, the figure)
KINDS: dict[str, tuple[bool, Callable[[Record], float]]] = {
    "never slower": (True, lambda record: _fastest(record, "")),
    "times faster than concat + SDPA": (True, lambda record: _fastest(record, "concat + SDPA")),
    "share of the mm rate": (True, lambda record: 1 / _over_floor(record)),
    "times the floor": (False, _over_floor),
    "times the twin's time": (False, _of_twin),
    "times the twin's cost": (False, _cost_of_twin),
    "MiB beyond inputs and gradient": (False, _mib_above),
    "ops over their own floor": (False, _given),
}
