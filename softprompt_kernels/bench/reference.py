"""The reference workload: a bare GEMM or one pass over memory, timed right beside each entry in every round.

It serves twice. Its rate is the machine's at that moment, so `floor_seconds` says what the op could take at best. And
the ratio of an entry's time to it cancels what slows both down: another process, a lower clock, a shared memory bus.
Two runs are compared by these ratios.

| the op is bound by | workload |
|---|---|
| GEMMs, with a head | `torch.mm` of the case's hidden states with at most 8192 rows of a head |
| GEMMs, attention | `torch.mm` of two matrices of 512² |
| memory | a − b → c over three arrays, together as large as what the op moves, from 3 to 96 MiB |

An op is bound by its GEMMs if it does more than `BALANCE` FLOP a byte. Both numbers are the case's own lower bounds, so
equal cases have equal workloads on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from softprompt_kernels.testing.case import Case

GEMM, MEMORY = "GEMM", "memory"
BALANCE = {"cpu": 10.0, "cuda": 150.0}  # FLOP a byte, between a machine's rates of GEMMs and of memory
SQUARE, HEAD_ROWS = 512, 8192
SMALLEST, LARGEST = 2**20, 2**25  # bytes of each array of the memory pass


@dataclass(frozen=True)
class Reference:
    """A workload.

    Args:
        name: such as "mm 48×576×8192".
        bound: GEMM or MEMORY.
        work: its FLOP, or its bytes.
        run: does the work once.
    """

    name: str
    bound: str
    work: float
    run: Callable[[], object]


def bound_of(case: Case, pass_: str, dtype: torch.dtype, device: torch.device) -> str:
    """What bounds a pass of a case."""
    intensity = case.flop(pass_) / case.bytes(pass_, dtype)
    return GEMM if intensity > BALANCE.get(device.type, BALANCE["cuda"]) else MEMORY


def work_of(case: Case, pass_: str, dtype: torch.dtype, bound: str) -> float:
    """FLOP or bytes of a pass, in the unit of its bound."""
    return case.flop(pass_) if bound == GEMM else float(case.bytes(pass_, dtype))


def reference_of(case: Case, pass_: str, dtype: torch.dtype, device: torch.device) -> Reference:
    """The workload of a pass of a case."""
    bound = bound_of(case, pass_, dtype, device)
    if bound == MEMORY:
        size = int(min(max(case.bytes(pass_, dtype) / 3, SMALLEST), LARGEST)) // dtype.itemsize
        one, other, out = (torch.ones(size, dtype=dtype, device=device) for _ in range(3))
        moved = 3.0 * size * dtype.itemsize
        return Reference(f"pass over {moved / 2**20:.3g} MiB", bound, moved, lambda: torch.sub(one, other, out=out))
    rows, inner, columns = SQUARE, SQUARE, SQUARE
    if "V" in case.sizes:
        (rows,), (inner,), columns = case.sizes["N"], case.sizes["d"], min(case.sizes["V"][0], HEAD_ROWS)
    left, right = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((rows, inner), (columns, inner)))
    product = torch.empty(rows, columns, dtype=dtype, device=device)
    name = f"mm {rows}×{inner}×{columns}"
    return Reference(name, bound, 2.0 * rows * inner * columns, lambda: torch.mm(left, right.T, out=product))
