"""Counts what Triton kernels do when they run in Triton's interpreter. It works for kernels of any package.

    with Traffic() as traffic:
        ...                                  # TRITON_INTERPRET=1, CPU tensors
    traffic.launches[0].tensors["query"].issued_read

Loads, stores and atomics are counted lane by lane, where the interpreter's builder performs them. Lanes that are masked
out do not count. Lanes of one access that share an address count once, as in the hardware. An address is attributed to
the tensor argument that contains it. Each tensor of a launch has three figures, all in bytes:

    issued    what the programs ask for, summed over the programs: the traffic of the L1 caches
    missed    what misses the L2 cache, by a model: programs run in the order of their index, in waves of as many as the
              GPU holds. What several programs of a wave read is fetched once, and not at all if the wave before
              read it too. The model holds where the reads of two waves fit into the cache. Tiles of keys that many
              rows read do. Rows of a whole vocabulary that a program reads twice do not; for them, use `issued`
    unique    every byte that is touched, once: what no kernel can avoid

A GEMM counts 2·M·N·K FLOP for whole tiles, and an exponential counts for every lane: masks reduce neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

WAVE = 132  # programs that run at a time: one on each multiprocessor of an H100
OUTSIDE = "(no argument)"


@dataclass
class TensorTraffic:
    """Bytes of one tensor argument in one launch."""

    issued_read: int = 0
    issued_written: int = 0
    missed_read: int = 0
    missed_written: int = 0
    unique_read: int = 0
    unique_written: int = 0


@dataclass
class LaunchTraffic:
    """The counts of one launch of a kernel."""

    kernel: str
    programs: int
    flop: int = 0
    exponentials: int = 0
    atomics: int = 0
    tensors: dict[str, TensorTraffic] = field(default_factory=dict)

    def total(self, figure: str, *, accept: Callable[[str], bool] = lambda _: True) -> int:
        """A figure of `TensorTraffic`, summed over the tensors whose name `accept` accepts.

        "missed_read" counts reads only; "missed" counts reads and writes.
        """
        figures = (figure,) if "_" in figure else (f"{figure}_read", f"{figure}_written")
        return sum(getattr(tensor, name) for key, tensor in self.tensors.items() if accept(key) for name in figures)


class Traffic:
    """Counts the kernels that are launched inside the `with` block.

    Args:
        wave: programs that run at a time and share what they read.
    """

    def __init__(self, wave: int = WAVE) -> None:
        self.wave = wave
        self.launches: list[LaunchTraffic] = []
        self._recorder: _LaunchRecorder | None = None
        self._restore: list[tuple[Any, str, Any]] = []

    def total(self, figure: str, *, accept: Callable[[str], bool] = lambda _: True) -> int:
        """A figure summed over all launches: an attribute of `LaunchTraffic`, or a figure of `TensorTraffic`."""
        if figure in ("flop", "exponentials", "atomics"):
            return sum(getattr(launch, figure) for launch in self.launches)
        return sum(launch.total(figure, accept=accept) for launch in self.launches)

    def __enter__(self) -> Traffic:
        from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

        def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
            original = getattr(owner, name)
            self._restore.append((owner, name, original))
            setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))

        wrap(GridExecutor, "__call__", self._launch)
        wrap(InterpreterBuilder, "create_masked_load", self._load)
        wrap(InterpreterBuilder, "create_masked_store", self._store)
        wrap(InterpreterBuilder, "create_atomic_rmw", self._atomic)
        wrap(InterpreterBuilder, "create_atomic_cas", self._compare_and_swap)
        wrap(InterpreterBuilder, "create_dot", self._dot)
        wrap(InterpreterBuilder, "create_exp", self._exponential)
        wrap(InterpreterBuilder, "create_exp2", self._exponential)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._restore:
            owner, name, original = self._restore.pop()
            setattr(owner, name, original)

    def _launch(self, original: Callable[..., Any], executor: Any, *args: Any, **kwargs: Any) -> Any:
        named = {**dict(zip(executor.arg_names, args, strict=False)), **kwargs}
        grid = executor.grid(named) if callable(executor.grid) else executor.grid
        record = LaunchTraffic(executor.fn.__name__, int(np.prod(grid)))
        recorder = self._recorder = _LaunchRecorder(record, _regions(named), self.wave)
        # The interpreter itself works with tensors too. That is no work of the kernel.
        with _disable_current_modes():
            try:
                result = original(executor, *args, **kwargs)
            finally:
                self._recorder = None
        recorder.finish()
        self.launches.append(record)
        return result

    def _load(
        self, original: Callable[..., Any], builder: Any, pointers: Any, mask: Any, *rest: Any, **more: Any
    ) -> Any:
        if self._recorder is not None:
            self._recorder.access(builder, pointers, mask.data, read=True)
        return original(builder, pointers, mask, *rest, **more)

    def _store(
        self, original: Callable[..., Any], builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        if self._recorder is not None:
            self._recorder.access(builder, pointers, mask.data, read=False)
        return original(builder, pointers, value, mask, *rest)

    def _atomic(
        self, original: Callable[..., Any], builder: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        if self._recorder is not None:
            self._recorder.atomic(builder, pointers, mask.data)
        return original(builder, kind, pointers, value, mask, *rest)

    def _compare_and_swap(self, original: Callable[..., Any], builder: Any, pointers: Any, *rest: Any) -> Any:
        if self._recorder is not None:
            self._recorder.atomic(builder, pointers, np.ones_like(pointers.data, dtype=bool))
        return original(builder, pointers, *rest)

    def _dot(self, original: Callable[..., Any], builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        if self._recorder is not None:
            self._recorder.record.flop += 2 * a.data.size * b.data.shape[-1]
        return original(builder, a, b, *rest)

    def _exponential(self, original: Callable[..., Any], builder: Any, value: Any) -> Any:
        if self._recorder is not None:
            self._recorder.record.exponentials += value.data.size
        return original(builder, value)


@dataclass
class _Region:
    """The memory of one tensor argument, or of several that overlap: addresses `begin` to `end`."""

    name: str
    begin: int
    end: int
    element: int  # bytes


class _LaunchRecorder:
    """Records the accesses of one launch."""

    def __init__(self, record: LaunchTraffic, regions: list[_Region], wave: int) -> None:
        self.record, self.regions, self.wave = record, regions, wave
        self.begins = np.array([region.begin for region in regions], dtype=np.uint64)
        # (region, read, wave) -> for each element of the region, whether it was accessed
        self.touched: dict[tuple[int, bool, int], np.ndarray] = {}

    def access(self, builder: Any, pointers: Any, mask: np.ndarray, *, read: bool) -> None:
        """Record a load or a store."""
        element = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses, mask = np.broadcast_arrays(pointers.data, mask)
        addresses = addresses[mask.astype(bool)] if not mask.all() else addresses.ravel()
        if addresses.size == 0:
            return
        first = int(np.searchsorted(self.begins, addresses.min(), side="right")) - 1

        if first >= 0 and int(addresses.max()) < self.regions[first].end:
            self._touch(builder, first, addresses, element, read)
            return
        where = np.searchsorted(self.begins, addresses, side="right") - 1
        for index in np.unique(where):
            self._touch(builder, int(index), addresses[where == index], element, read)

    def atomic(self, builder: Any, pointers: Any, mask: np.ndarray) -> None:
        """Record an atomic operation, which reads and writes."""
        self.record.atomics += int(np.broadcast_to(mask, pointers.data.shape).sum())
        self.access(builder, pointers, mask, read=True)
        self.access(builder, pointers, mask, read=False)

    def finish(self) -> None:
        """Turn the accessed elements into bytes."""
        unique: dict[tuple[int, bool], np.ndarray] = {}
        for (index, read, wave), touched in self.touched.items():
            before = self.touched.get((index, read, wave - 1))
            missed = touched if before is None or not read else touched & ~before
            self._add(index, "missed", read, int(missed.sum()) * self.regions[index].element)
            seen = unique.setdefault((index, read), np.zeros_like(touched))
            seen |= touched
        for (index, read), touched in unique.items():
            self._add(index, "unique", read, int(touched.sum()) * self.regions[index].element)

    def _touch(self, builder: Any, index: int, addresses: np.ndarray, element: int, read: bool) -> None:
        region = self.regions[index]
        if index < 0 or int(addresses.max()) >= region.end:
            self._add(-1, "issued", read, np.unique(addresses).size * element)
            return
        elements = ((addresses - np.uint64(region.begin)) // np.uint64(region.element)).astype(np.int64)
        low, high = int(elements.min()), int(elements.max()) + 1
        accessed = np.zeros(high - low, dtype=bool)  # each address of this access once
        accessed[elements - low] = True
        self._add(index, "issued", read, int(accessed.sum()) * element)
        x, y, z = builder.grid_idx
        program = x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
        key = (index, read, program // self.wave)
        if key not in self.touched:
            self.touched[key] = np.zeros(-(-(region.end - region.begin) // region.element), dtype=bool)
        self.touched[key][low:high] |= accessed

    def _add(self, index: int, figure: str, read: bool, count: int) -> None:
        name = self.regions[index].name if index >= 0 else OUTSIDE
        figures = self.record.tensors.setdefault(name, TensorTraffic())
        figure = f"{figure}_{'read' if read else 'written'}"
        setattr(figures, figure, getattr(figures, figure) + count)


def _regions(arguments: dict[str, Any]) -> list[_Region]:
    """The memory of the tensor arguments, sorted by address. Tensors that overlap are one region, named "a=b"."""
    found: list[_Region] = []
    for name, tensor in _tensors(arguments):
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            size = tensor.element_size()
            found.append(_Region(name, tensor.data_ptr(), tensor.data_ptr() + (last + 1) * size, size))
    merged: list[_Region] = []
    for region in sorted(found, key=lambda region: region.begin):
        if merged and region.begin < merged[-1].end:
            merged[-1].end = max(merged[-1].end, region.end)
            merged[-1].element = min(merged[-1].element, region.element)
            if region.name not in merged[-1].name.split("="):
                merged[-1].name += f"={region.name}"
        else:
            merged.append(region)
    return merged


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All tensors with their names; one inside a tuple has a dotted name such as "inputs.query"."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            fields = getattr(value, "_fields", None) or [str(index) for index in range(len(value))]
            yield from _tensors({f"{name}.{part}": item for part, item in zip(fields, value, strict=True)})


def interpreting() -> str | None:
    """Why kernels cannot be counted in this process; None if they can."""
    from softprompt_kernels.kernels.triton import runtime

    if reason := runtime.missing():
        return reason
    return None if runtime.interpreting() else "kernels are counted in Triton's interpreter: set TRITON_INTERPRET=1"
