"""Counts what Triton kernels do when they run in Triton's interpreter, whoever wrote them.

    with Traffic() as traffic:
        ...                                  # TRITON_INTERPRET=1, CPU tensors
    traffic.launches[0].tensors["query"].issued_read

Loads, stores and atomics are seen where the interpreter's builder performs them, lane by lane, and only lanes that no
mask takes away count. An address that several lanes of one access share counts once, as in the hardware. An address
belongs to the tensor argument that it lies in. Three figures for each tensor of a launch, all in bytes:

    issued    what programs ask for, each for itself: the traffic of the L1 caches
    grouped   what misses the L2 cache by this model: programs start in the order of their index, in groups of as many
              as the GPU holds; what a group reads is fetched once for all of them, and not at all if the group before
              it read it too. It holds where the reads of two groups fit the cache: tiles of keys that many rows look at
              do, whole rows of a vocabulary that a program reads twice do not, and for those `issued` is the figure
    unique    every byte that is touched, once: what no kernel can do without

Products count 2·M·N·K FLOP, whole tiles, and exponentials a lane: masks spare neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

GROUP = 132  # multiprocessors of an H100, one program each
OTHER = "(no argument)"


@dataclass
class TensorTraffic:
    """Bytes of one tensor argument in one launch."""

    issued_read: int = 0
    issued_written: int = 0
    grouped_read: int = 0
    grouped_written: int = 0
    unique_read: int = 0
    unique_written: int = 0


@dataclass
class LaunchTraffic:
    """One launch."""

    kernel: str
    programs: int
    flop: int = 0
    exponentials: int = 0
    atomics: int = 0
    tensors: dict[str, TensorTraffic] = field(default_factory=dict)

    def total(self, figure: str, *, of: Callable[[str], bool] = lambda _: True) -> int:
        """A figure of `TensorTraffic`, summed over the tensors whose name `of` accepts; "grouped" is both ways."""
        figures = (figure,) if "_" in figure else (f"{figure}_read", f"{figure}_written")
        return sum(getattr(tensor, name) for key, tensor in self.tensors.items() if of(key) for name in figures)


class Traffic:
    """Counts while it is entered.

    Args:
        group: programs that share what they read.
    """

    def __init__(self, group: int = GROUP) -> None:
        self.group = group
        self.launches: list[LaunchTraffic] = []
        self._watch: _Watch | None = None
        self._restore: list[tuple[Any, str, Any]] = []

    def total(self, figure: str, *, of: Callable[[str], bool] = lambda _: True) -> int:
        """A figure of all launches: of `LaunchTraffic` by its name, or one of `TensorTraffic`."""
        if figure in ("flop", "exponentials", "atomics"):
            return sum(getattr(launch, figure) for launch in self.launches)
        return sum(launch.total(figure, of=of) for launch in self.launches)

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
        watch = self._watch = _Watch(record, _regions(named), self.group)
        # What the interpreter itself does with tensors is no work of the kernel's.
        with _disable_current_modes():
            try:
                result = original(executor, *args, **kwargs)
            finally:
                self._watch = None
        watch.finish()
        self.launches.append(record)
        return result

    def _load(
        self, original: Callable[..., Any], builder: Any, pointers: Any, mask: Any, *rest: Any, **more: Any
    ) -> Any:
        if self._watch is not None:
            self._watch.access(builder, pointers, mask.data, read=True)
        return original(builder, pointers, mask, *rest, **more)

    def _store(
        self, original: Callable[..., Any], builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        if self._watch is not None:
            self._watch.access(builder, pointers, mask.data, read=False)
        return original(builder, pointers, value, mask, *rest)

    def _atomic(
        self, original: Callable[..., Any], builder: Any, kind: Any, pointers: Any, value: Any, mask: Any, *rest: Any
    ) -> Any:
        if self._watch is not None:
            self._watch.atomic(builder, pointers, mask.data)
        return original(builder, kind, pointers, value, mask, *rest)

    def _compare_and_swap(self, original: Callable[..., Any], builder: Any, pointers: Any, *rest: Any) -> Any:
        if self._watch is not None:
            self._watch.atomic(builder, pointers, np.ones_like(pointers.data, dtype=bool))
        return original(builder, pointers, *rest)

    def _dot(self, original: Callable[..., Any], builder: Any, left: Any, right: Any, *rest: Any) -> Any:
        if self._watch is not None:
            self._watch.record.flop += 2 * left.data.size * right.data.shape[-1]
        return original(builder, left, right, *rest)

    def _exponential(self, original: Callable[..., Any], builder: Any, value: Any) -> Any:
        if self._watch is not None:
            self._watch.record.exponentials += value.data.size
        return original(builder, value)


@dataclass
class _Region:
    """Memory of one tensor argument, or of several that overlap."""

    name: str
    begin: int
    end: int
    element: int  # bytes


class _Watch:
    """The accesses of one launch."""

    def __init__(self, record: LaunchTraffic, regions: list[_Region], group: int) -> None:
        self.record, self.regions, self.group = record, regions, group
        self.begins = np.array([region.begin for region in regions], dtype=np.uint64)
        self.touched: dict[tuple[int, bool, int], np.ndarray] = {}  # region, read, group -> each byte, whether

    def access(self, builder: Any, pointers: Any, mask: np.ndarray, *, read: bool) -> None:
        """A load or a store."""
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
        """Reads and writes."""
        self.record.atomics += int(np.broadcast_to(mask, pointers.data.shape).sum())
        self.access(builder, pointers, mask, read=True)
        self.access(builder, pointers, mask, read=False)

    def finish(self) -> None:
        """Turns what was touched into bytes."""
        unique: dict[tuple[int, bool], np.ndarray] = {}
        for (index, read, group), touched in self.touched.items():
            before = self.touched.get((index, read, group - 1))
            missed = touched if before is None or not read else touched & ~before
            self._add(index, "grouped", read, int(missed.sum()) * self.regions[index].element)
            seen = unique.setdefault((index, read), np.zeros_like(touched))
            seen |= touched
        for (index, read), touched in unique.items():
            self._add(index, "unique", read, int(touched.sum()) * self.regions[index].element)

    def _touch(self, builder: Any, index: int, addresses: np.ndarray, element: int, read: bool) -> None:
        region = self.regions[index]
        if index < 0 or int(addresses.max()) >= region.end:
            self._add(-1, "issued", read, np.unique(addresses).size * element)
            return
        places = ((addresses - np.uint64(region.begin)) // np.uint64(region.element)).astype(np.int64)
        low, high = int(places.min()), int(places.max()) + 1
        here = np.zeros(high - low, dtype=bool)  # each address of this access once
        here[places - low] = True
        self._add(index, "issued", read, int(here.sum()) * element)
        x, y, z = builder.grid_idx
        program = x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
        key = (index, read, program // self.group)
        if key not in self.touched:
            self.touched[key] = np.zeros(-(-(region.end - region.begin) // region.element), dtype=bool)
        self.touched[key][low:high] |= here

    def _add(self, index: int, figure: str, read: bool, count: int) -> None:
        name = self.regions[index].name if index >= 0 else OTHER
        figures = self.record.tensors.setdefault(name, TensorTraffic())
        figure = f"{figure}_{'read' if read else 'written'}"
        setattr(figures, figure, getattr(figures, figure) + count)


def _regions(arguments: dict[str, Any]) -> list[_Region]:
    """Where the tensor arguments lie, in order; those that overlap are one, named after all."""
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
    """ "query.base": tensors, also in tuples, by dotted names."""
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, tuple):
            fields = getattr(value, "_fields", None) or [str(index) for index in range(len(value))]
            yield from _tensors({f"{name}.{part}": item for part, item in zip(fields, value, strict=True)})


def interpreting() -> str | None:
    """Why kernels cannot be counted here; None if they can."""
    from softprompt_kernels.kernels.triton import runtime

    if reason := runtime.missing():
        return reason
    return None if runtime.interpreting() else "kernels are counted in Triton's interpreter: set TRITON_INTERPRET=1"
