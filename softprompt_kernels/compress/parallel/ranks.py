"""The ranks of a run: its processes, each with a copy of the frozen model, as `torchrun` starts them.

    with started():                        no-op for a process that is alone
        share(costs)                       the indices of this rank's part of the work
        sum_(tensors)                      sums over ranks, in place, in fp32 or float64
        gather(value), of_first(value)     JSON values of all ranks, or of rank 0
        barrier(path)                      all ranks are here, and see the file

All ranks make the same calls in the same order. Outside `started`, and for a process alone, the calls return at once
and change nothing. So code that is written for ranks runs on one process as it is.

Only rank 0 prints and writes, except for files that belong to a rank. All ranks must see the folder of the run.

An exchange is waited for in short sleeps. So a signal is handled at once, a failure of another rank is heard within
half a second (see `failures.py`), and a rank that was killed is noticed when its connection breaks. `TIMEOUT` is for a
rank that is connected and silent; it is long, because one rank may work while the others wait for it.

gloo carries what is on the CPU, nccl what is on a GPU. Sums are in an order that depends on the number of ranks alone,
so a run gives the same bits each time with the same number.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from softprompt_kernels.compress.parallel.failures import OtherRankFailed, Stop, hear, raise_lost, record, recorded
from softprompt_kernels.compress.parallel.launch import launched
from softprompt_kernels.compress.parallel.meeting import meet
from softprompt_kernels.compress.parallel.shares import shares
from softprompt_kernels.errors import SoftPromptError

TIMEOUT = timedelta(hours=6)
JOIN_TIMEOUT = timedelta(minutes=10)  # of a process for the others: one may still load its packages
LOOK_EVERY = 0.5  # seconds between two looks for a failure of another rank
SHORTEST_SLEEP, LONGEST_SLEEP = 2e-5, 2e-3
SEE_FILE = 60.0  # seconds until a file of another machine must be visible: a network disk remembers what was not there


@dataclass(frozen=True, eq=False)
class _Ranks:
    rank: int
    world: int
    store: dist.Store | None = None


_ALONE = _Ranks(0, 1)
_current = _ALONE
_meeting: dist.Store | None = None  # where the processes find each other; rank 0 may hold it, so it stays
_told = False


def rank() -> int:
    """The number of this process, from 0."""
    return _current.rank


def world() -> int:
    """How many processes there are."""
    return _current.world


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return _current.rank == 0


def told() -> bool:
    """Whether rank 0 knows how the last run of many ranks failed, so that this rank need not say it too."""
    return _told


@contextmanager
def started() -> Iterator[None]:
    """Within the context, the processes that torchrun started are the ranks of one run. Also a decorator.

    Within another such context, and for a process alone, nothing happens. A process group that the caller has started
    is used and left running.

    Raises:
        SoftPromptError: another rank has failed; the message has its number and its words.
        KeyboardInterrupt: another rank was stopped by a signal.
    """
    global _current, _told
    launch = launched()
    if launch.world == 1 or _current.world > 1:
        yield
        return
    _told = False
    own = not dist.is_initialized()
    store = _join(launch.rank, launch.world, launch.local_rank, own)
    _current = _Ranks(launch.rank, launch.world, store)
    try:
        yield
        barrier()
    except BaseException as error:
        _raise_as_known(error, store)
        raise
    finally:
        _current = _ALONE
        if own:
            with suppress(RuntimeError):
                dist.destroy_process_group()


def _join(rank: int, world: int, local_rank: int, own: bool) -> dist.Store:
    """Start the process group, if it is our own to start. Returns the store of this run."""
    global _meeting, _told
    gpu = torch.cuda.is_available() and dist.is_nccl_available()
    store: dist.Store | None = None
    try:
        if _meeting is None:
            _meeting, *_ = next(dist.rendezvous("env://", rank, world, timeout=JOIN_TIMEOUT))
        session = meet(_meeting, rank, world, JOIN_TIMEOUT)
        store = dist.PrefixStore(f"softprompt-{session}", _meeting)
        if own:
            if gpu and local_rank < torch.cuda.device_count():
                torch.cuda.set_device(local_rank)
            backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
            group_store = dist.PrefixStore(f"group-{session}", _meeting)
            dist.init_process_group(backend, store=group_store, rank=rank, world_size=world, timeout=TIMEOUT)
        return store
    except SoftPromptError:
        raise
    except (RuntimeError, ValueError) as error:
        with suppress(RuntimeError):
            if store is not None and (stop := recorded(store)) is not None:  # another has failed at once
                _told = hear(store, rank, world, _holds_store())
                stop.raise_here()
        raise SoftPromptError(
            f"torchrun: process {rank} of {world} cannot reach the others ({' '.join(str(error).split())}); accepted "
            "are processes that torchrun started, and a network between their machines"
        ) from error


def _holds_store() -> bool:
    """Whether the store ends with rank 0. torchrun's own lasts longer."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _raise_as_known(error: BaseException, store: dist.Store) -> None:
    """Record the end of this rank, and raise what stopped the run where that was another rank."""
    global _told
    try:
        stop = record(store, Stop.of(error, _current.rank))
        _told = hear(store, _current.rank, _current.world, _holds_store())
    except RuntimeError:  # the store is gone with the process that held it
        return
    caused = isinstance(error, SoftPromptError)
    if stop.rank != _current.rank and stop.signal is None and not caused:
        stop.raise_here()


def share(costs: Sequence[float], groups: Sequence[Hashable] | None = None) -> list[int]:
    """The indices of this rank's part of the work, ascending. It may be empty. See `shares`."""
    return shares(costs, _current.world, groups)[_current.rank]


def barrier(*paths: Path) -> None:
    """Wait until all ranks are here, and until this one sees the files that another has written.

    Raises:
        SoftPromptError: a file cannot be seen.
    """
    if _current.world == 1:
        return
    sum_of(0.0)
    for path in paths:
        end = time.monotonic() + SEE_FILE
        while not path.exists():
            if time.monotonic() > end:
                raise SoftPromptError(
                    f"output: process {_current.rank} does not see {path}, which another process has written; accepted "
                    "is a folder on a disk that all machines share"
                )
            time.sleep(0.2)


def sum_(tensors: Sequence[Tensor], group: Any = None) -> None:
    """Replace tensors by their sums over all ranks. They have the same shapes on all ranks, and one device.

    One exchange, in fp32; in float64 if all are. The sum is rounded to the dtype of a tensor at the end.

    Args:
        tensors: changed in place.
        group: of torch.distributed, some of the ranks; None: all of them.
    """
    if _current.world == 1 or not tensors:
        return
    dtype = torch.float64 if all(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
    flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in tensors])
    _wait(dist.all_reduce(flat, group=group, async_op=True))
    with torch.no_grad():
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


def copy_first_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by those of rank 0. Same shapes and dtypes on all ranks."""
    if _current.world == 1:
        return
    for tensor in tensors:
        given = tensor.detach().contiguous()
        _wait(dist.broadcast(given, 0, async_op=True))
        with torch.no_grad():
            tensor.copy_(given)


def sum_of(*values: float) -> tuple[float, ...]:
    """The sums over all ranks of a few numbers, in float64."""
    if _current.world == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device="cpu")
    _wait(dist.all_reduce(total, async_op=True))
    return tuple(total.tolist())


def gather(value: Any) -> list[Any]:
    """The values of all ranks, rank by rank. Of many ranks they come back as JSON has them: tuples as lists."""
    if _current.world == 1:
        return [value]
    own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64, device="cpu") for _ in range(_current.world)]
    _wait(dist.all_gather(sizes, torch.tensor([own.numel()], device="cpu"), async_op=True))
    longest = int(max(sizes))
    padded = torch.zeros(longest, dtype=torch.uint8, device="cpu")
    padded[: own.numel()] = own
    found = [torch.empty_like(padded) for _ in range(_current.world)]
    _wait(dist.all_gather(found, padded, async_op=True))
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(found, sizes, strict=True)]


def of_first(value: Any) -> Any:
    """The value of rank 0, as JSON has it: for decisions that a file or a clock might make differently elsewhere."""
    return gather(value if is_first() else None)[0]


def check_alone(what: str) -> None:
    """Refuse many processes, within `started` or not, for what is made for one.

    Raises:
        SoftPromptError: torchrun has started many; the message says for `what`.
    """
    if (processes := launched().world) > 1:
        raise SoftPromptError(f"torchrun: got {processes} processes for {what}, accepted is one")


def check_same(facts: dict[str, Any], accepted: str) -> None:
    """Compare what all ranks must have in common.

    Args:
        facts: by name; JSON values.
        accepted: ends the message.

    Raises:
        SoftPromptError: on all ranks, if they differ; names a rank that differs from rank 0, and in what.
    """
    every = gather(facts)
    for number, other in enumerate(every):
        names = sorted(n for n in {*every[0], *other} if every[0].get(n) != other.get(n))
        if names:
            raise SoftPromptError(
                f"torchrun: process {number} of {len(every)} differs from process 0 in {', '.join(names)}; {accepted}"
            )


def _wait(work: Any) -> None:
    """Wait for an exchange, and for nothing longer than until a signal comes or another rank stops."""
    store = _current.store
    assert store is not None
    begin = looked = time.monotonic()
    pause = SHORTEST_SLEEP
    try:
        while not work.is_completed():
            time.sleep(pause)
            pause, now = min(2 * pause, LONGEST_SLEEP), time.monotonic()
            if now - looked > LOOK_EVERY:
                looked = now
                if (stop := recorded(store)) is not None:
                    stop.raise_here()
            if now - begin > TIMEOUT.total_seconds():
                raise RuntimeError("an exchange took too long")
        work.wait()
    except (OtherRankFailed, KeyboardInterrupt):
        raise
    except RuntimeError as error:
        raise_lost(store, error)
