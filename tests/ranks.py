"""Ranks of a gloo process group as forked processes: they start in milliseconds, because all imports are done."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

SECONDS = 120  # after which ranks that hang are ended


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `world` ranks, tensors and plain values.

    Raises:
        ProcessRaisedException: a rank failed.
        TimeoutError: the ranks hang.
    """
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(
            _rank, (world, folder, function, arguments), nprocs=world, start_method="fork", join=False
        )
        end = time.monotonic() + SECONDS
        while not context.join(timeout=1):
            if time.monotonic() > end:
                for process in context.processes:
                    process.kill()
                raise TimeoutError(f"ranks did not end within {SECONDS} s")
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(world)]


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)  # the parent's other threads do not exist here
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    torch.save(function(*arguments), Path(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()
