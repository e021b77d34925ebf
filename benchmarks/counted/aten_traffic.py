"""Counts bytes, FLOP and memory of PyTorch's own operations.

    with AtenTraffic() as traffic:
        ...                                  # any device; on "meta" nothing is computed, and tensors may be of any size

Each operation except a view reads its tensor arguments once and writes its results once. This is a lower bound, which
well-written kernels reach. A GEMM counts 2·M·N·K FLOP, attention (SDPA) 2·M·N·(D + Dv) for each head and 5/2 of that in
the backward, whatever its mask; softmax and exp count one exponential for each result. Memory is that of the storages
which were made inside and are still referenced: `peak` is its maximum, `kept` what is left at the end.

Inside `skip_launches()` Triton kernels are recorded by name and not run: tensors on "meta" have no memory to run on.
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
GEMMS = {"mm", "addmm", "bmm", "baddbmm"}
ATTENTION = "_scaled_dot_product"  # the beginning of the names of SDPA's operations
EXPONENTIALS = {"exp", "exp_", "_softmax", "_safe_softmax", "_log_softmax", "_log_softmax_backward_data", "logaddexp"}
WRITES_ONLY = {"fill_", "zero_", "copy_", "normal_", "uniform_"}  # they do not read the argument that they change


class AtenTraffic(TorchDispatchMode):
    """Bytes, FLOP, operations and memory of what PyTorch does inside the `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.flop = self.exponentials = self.operations = 0
        self.peak = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        # Storages that were made before. The references keep their keys from being reused.
        self._outside: dict[int, StorageWeakRef] = {}

    @property
    def kept(self) -> int:
        """Bytes that were made inside and are still alive."""
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace not in ("aten", "prims", "prim"):  # an op of a package: count the operations inside it
            with self:  # call its CPU kernel directly: a normal call would come back to this mode
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        result = function(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive and storage._cdata not in self._outside:
                self._outside[storage._cdata] = StorageWeakRef(storage)
        for tensor in outputs:
            self._track(tensor)
        self.peak = max(self.peak, self.kept)
        name = function._overloadpacket.__name__
        if not function.is_view and name not in ALLOCATES_ONLY:
            self._count(function, name, args, kwargs, outputs, result)
        return result

    def _track(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._outside and storage._cdata not in self._alive:
            self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def _count(self, function: Any, name: str, args: Any, kwargs: Any, outputs: list[Tensor], result: Any) -> None:
        if not outputs:
            return
        given = args[1:] if name in WRITES_ONLY else args
        read = tree_leaves((given, {key: value for key, value in kwargs.items() if key != "out"}))
        self.operations += 1
        self.read += sum(_bytes(tensor) for tensor in read if isinstance(tensor, Tensor))
        self.written += sum(_bytes(tensor) for tensor in outputs)
        if name in EXPONENTIALS:
            self.exponentials += outputs[0].numel()
        if name.startswith(ATTENTION):
            self._count_attention([value for value in args if isinstance(value, Tensor)], "backward" in name)
        flop = flop_registry.get(function._overloadpacket)
        if flop is not None and name in GEMMS:
            operands = [value for value in args if isinstance(value, Tensor)]  # other arguments do not matter here
            self.flop += int(flop(*operands, out_val=result))

    def _count_attention(self, tensors: list[Tensor], backward: bool) -> None:
        query, key, value = tensors[1:4] if backward else tensors[:3]
        scores = query.numel() // query.shape[-1] * key.shape[-2]
        products = scores * 2 * (key.shape[-1] + value.shape[-1])
        self.flop += products * 5 // 2 if backward else products
        self.exponentials += scores


def _bytes(tensor: Tensor) -> int:
    """Bytes of the memory that a tensor covers: expanded dimensions count once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else min(size, 1)
    return count * tensor.element_size()


@contextmanager
def skip_launches() -> Iterator[list[str]]:
    """Do not run Triton kernels; collect the names of those that were launched."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    skipped: list[str] = []

    def skip(kernel: Any, *args: Any, **kwargs: Any) -> None:
        skipped.append(kernel.__name__)

    before = {owner: owner.run for owner in (InterpretedFunction, JITFunction)}
    for owner in before:
        owner.run = skip
    try:
        yield skipped
    finally:
        for owner, run in before.items():
            owner.run = run


def bytes_of(*tensors: Tensor) -> int:
    """Bytes of all elements of all tensors."""

    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
