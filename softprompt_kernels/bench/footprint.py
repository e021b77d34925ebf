"""Memory of one implementation of a case: peak and retained bytes above the inputs, in a process of its own.

    peak        the most that existed at a time while the pass ran, results included
    retained    what is left when it has ended, while its results are alive: the results, and what the code keeps

On a CPU this is resident memory, so it is counted in pages and includes what libraries allocate. On a GPU it is the
memory of PyTorch's allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from softprompt_kernels.bench.implementations import prepare, warm_up_case
from softprompt_kernels.bench.memory import PeakResident, in_fresh_process, release_freed_memory
from softprompt_kernels.testing.case import Case, Results


class Footprint(NamedTuple):
    """Bytes above the inputs."""

    peak: int
    retained: int


def measure_footprint(
    case: Case, name: str, passes: Sequence[str], dtype: torch.dtype, device: torch.device
) -> dict[str, Footprint]:
    """The memory of each pass.

    Raises:
        concurrent.futures.process.BrokenProcessPool: the process was killed, most likely because memory ran out.
    """
    return in_fresh_process(_in_this_process, case, name, passes, dtype, str(device), torch.get_num_threads())


def _in_this_process(
    case: Case, name: str, passes: Sequence[str], dtype: torch.dtype, device: str, threads: int
) -> dict[str, Footprint]:
    """Each pass once, after a run of a tiny case that sets up the libraries."""
    torch.set_num_threads(threads)
    found = {}
    for pass_ in passes:
        warm = warm_up_case(case, name)
        prepare(warm, name, warm.inputs(dtype, device), pass_)()
        call = prepare(case, name, case.inputs(dtype, device), pass_)
        if warm == case:
            call()  # compiled code serves one size, and compiling takes memory that a run does not
        results: Results
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            results = call()
            torch.cuda.synchronize()
            found[pass_] = Footprint(torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before)
        else:
            release_freed_memory()
            before = psutil.Process().memory_info().rss
            with PeakResident() as peak:
                results = call()
            release_freed_memory()
            found[pass_] = Footprint(max(0, peak.growth), max(0, psutil.Process().memory_info().rss - before))
        del results, call
    return found
