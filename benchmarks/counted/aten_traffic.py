"""Counts what PyTorch's own operations do, and how much memory is alive meanwhile.

    with AtenTraffic() as traffic:
        ...                                  # any device; on "meta" nothing is computed and sizes may be of any size

Each operation that is no view reads its tensor arguments once and writes its results once; that is a bound from below,
which fused and well-written kernels reach. Products count 2·M·N·K FLOP. Memory is that of storages which were made
inside and are still referenced by someone: `peak` is the most of it, `kept` what is left at the end.

Triton kernels inside `unlaunched()` are noted and not run, as tensors without memory require.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ALLOCATES_ONLY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
WRITES_ONLY = {"fill_", "zero_", "copy_", "normal_", "uniform_"}  # of the argument that they change


class AtenTraffic(TorchDispatchMode):
    """Bytes, FLOP, operations and memory of what PyTorch does while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.flop = self.operations = 0
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._known: dict[int, StorageWeakRef] = {}  # storages from outside; the references keep keys from being reused

    @property
    def kept(self) -> int:
        """Bytes that were made inside and are alive."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace not in (
            "aten",
            "prims",
            "prim",
        ):  # an op of a package: what counts is what it consists of
            with self:  # by its kernel for CPUs, past the modes that would bring it here again
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = function(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive and storage._cdata not in self._known:
                self._known[storage._cdata] = StorageWeakRef(storage)
        for tensor in outputs:
            self._watch(tensor)
        self.peak = max(self.peak, self.kept)
        name = function._overloadpacket.__name__
        if not function.is_view and name not in ALLOCATES_ONLY:
            self._count(function, name, args, kwargs, outputs, result)
        return result

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._known and storage._cdata not in self._alive:
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def _count(self, function: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor], result: Any) -> None:
        if not outputs:
            return
        given = args[1:] if name in WRITES_ONLY else args
        read = tree_leaves((given, {key: value for key, value in kwargs.items() if key != "out"}))
        self.operations += 1
        self.read += sum(_bytes(tensor) for tensor in read if isinstance(tensor, Tensor))
        self.written += sum(_bytes(tensor) for tensor in outputs)
        flop = flop_registry.get(function._overloadpacket)
        if flop is not None and name in PRODUCTS:
            operands = [value for value in args if isinstance(value, Tensor)]  # dtypes and factors change no count
            self.flop += int(flop(*operands, out_val=result))


def _bytes(tensor: Tensor) -> int:
    """Of memory that a tensor looks at: what is expanded counts once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


@contextmanager
def unlaunched() -> Iterator[list[str]]:
    """Triton kernels are noted by name, and not run."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    noted: list[str] = []

    def note(kernel: Any, *args: Any, **kwargs: Any) -> None:
        noted.append(kernel.__name__)

    before = {owner: owner.run for owner in (InterpretedFunction, JITFunction)}
    for owner in before:
        owner.run = note
    try:
        yield noted
    finally:
        for owner, run in before.items():
            owner.run = run


def bytes_of(*tensors: Tensor) -> int:
    """Of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
