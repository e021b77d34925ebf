"""From the events of torch.profiler to one row for each range of the package: calls, time, FLOP and bytes.

FLOP and bytes of a call are those of its case: what the op cannot do without. The FLOP of a GEMM follow from its sizes.
Other kernels have none. A loss whose forward stores the gradient has the FLOP and bytes of both passes there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from softprompt_kernels.profiling.names import REGION, STORED, Name, parse_name
from softprompt_kernels.testing.cases import BOTH, FORWARD, PASSES, Case

STORES_GRADIENT = ("linear_kl_div", "linear_kl_div_from_moments")
"""The ops whose forward computes the gradient where one is needed, with a frozen head."""


@dataclass(frozen=True)
class Row:
    """One range, summed over the rounds."""

    name: str
    parts: Name
    calls: int
    seconds: float  # on the device where there is one, else on the CPU
    flop: float | None  # of all calls; None: unknown
    bytes: int | None


@dataclass(frozen=True)
class Summary:
    """The ranges of a region, in the order in which they began; kernels follow their call."""

    seconds: float  # of the region, on the CPU's clock
    rows: tuple[Row, ...]

    @property
    def outside(self) -> float:
        """Seconds of the region outside all calls of a backend: autograd, PyTorch's other operations, Python."""
        return self.seconds - sum(row.seconds for row in self.rows if row.parts.kernel is None)


def summarise(case: Case, pass_: str, dtype: torch.dtype, events: Iterable[Any]) -> Summary:
    """The rows of the region in a profile.

    Args:
        case, pass_, dtype: what ran.
        events: `torch.profiler.profile.events()`.
    """
    on_cpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    region = next(event for event in on_cpu if event.name == REGION)
    found: dict[str, list[Any]] = {}
    for event in sorted(on_cpu, key=lambda event: event.time_range.start):
        if parse_name(event.name) is not None:
            found.setdefault(event.name, []).append(event)
    rows = []
    for name, its_events in found.items():
        parts = parse_name(name)
        assert parts is not None
        calls = len(its_events)
        flop, size = _work(case, pass_, dtype, parts)
        rows.append(
            Row(
                name,
                parts,
                calls,
                sum(event.device_time_total or event.cpu_time_total for event in its_events) * 1e-6,
                None if flop is None else calls * flop,
                None if size is None else calls * size,
            )
        )
    order = {row.parts.call: index for index, row in reversed(list(enumerate(rows)))}
    rows.sort(key=lambda row: (order[row.parts.call], row.parts.kernel is not None))
    return Summary(region.time_range.elapsed_us() * 1e-6, tuple(rows))


def _work(case: Case, pass_: str, dtype: torch.dtype, parts: Name) -> tuple[float | None, int | None]:
    """FLOP and bytes of one range."""
    if parts.kernel is not None:
        return parts.flop, None
    if parts.backend == STORED:
        return None, None
    of_call = parts.call.rpartition(".")[2]
    if case.function in STORES_GRADIENT and pass_ != FORWARD:
        of_call = BOTH
    assert of_call in PASSES
    return case.flop(of_call) or None, case.bytes(of_call, dtype)
