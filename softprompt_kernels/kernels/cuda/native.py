"""Loads the compiled CUDA kernels and launches them: on a GPU or, for tests, on the host.

The same kernels serve two backends. Each has its own compiled module and its own `Launcher`:

    DEVICE   "cuda", module `_native`: tensors on NVIDIA GPUs, launched on torch's current stream of their device
    HOST     "simt", module `_simt`: tensors on the CPU, kernels run by `csrc/simt`, which checks every memory access
"""

import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.tensors import DTYPES

Tensors = Iterable[Tensor | None]

_TEGRA = (87, 101, 110)
_HOST_MULTIPROCESSORS = 4  # few, so that small problems are split as large ones are on a GPU


class Launcher(ABC):
    """A compiled module of the kernels, and how to launch them."""

    def __init__(self, module_name: str, device_type: str, how_to_get: str) -> None:
        self.device_type = device_type
        self._module_name = f"softprompt_kernels.kernels.cuda.{module_name}"
        self._how_to_get = how_to_get

    @cached_property
    def _loaded(self) -> ModuleType | str:
        """The module, or the reason why it is missing."""
        try:
            module = importlib.import_module(self._module_name)
        except ModuleNotFoundError:
            return f"its module was not built: {self._how_to_get}"
        except ImportError as error:
            return f"its module cannot be loaded: {error}"
        problem = module.device_problem()
        return f"it cannot run here: {problem}" if problem else module

    def missing(self) -> str | None:
        """Why the kernels cannot run here. None if they can."""
        return self._loaded if isinstance(self._loaded, str) else None

    def module(self) -> ModuleType:
        """The compiled module.

        Raises:
            RuntimeError: it is missing.
        """
        if isinstance(self._loaded, str):
            raise RuntimeError(self._loaded)
        return self._loaded

    def unsupported_tensor(self, name: str, tensor: Tensor) -> str | None:
        """Why the kernels cannot take a tensor. None if they can: fp32, bf16 and fp16 on the right device."""
        if tensor.device.type != self.device_type:
            place = "the CPU" if self.device_type == "cpu" else "NVIDIA GPUs"
            return f"{name} is on {tensor.device}, and it serves {place}"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, and it computes in fp32"
        return None

    @abstractmethod
    def stream(self, device: torch.device) -> int:
        """The address of the stream for launches on a device."""

    @abstractmethod
    def multiprocessors(self, device: torch.device) -> int:
        """The number of multiprocessors: each runs at least one block at a time."""

    @abstractmethod
    def launching(self, reads: Tensors, writes: Tensors) -> AbstractContextManager[ModuleType]:
        """The module, for launches that access only these tensors and write only to `writes`."""


class GpuLauncher(Launcher):
    """Launches on NVIDIA GPUs."""

    def __init__(self) -> None:
        super().__init__("_native", "cuda", "install nvcc, and the package again with SOFTPROMPT_CUDA=1")

    def unsupported_tensor(self, name: str, tensor: Tensor) -> str | None:
        """Also refuses a GPU that the module has no code for."""
        reason = super().unsupported_tensor(name, tensor)
        if reason is not None:
            return reason
        if torch.version.hip is not None:
            return f"{name} is on an AMD GPU, and it serves NVIDIA's"
        if self.missing():
            return None  # ops/dispatch.py reports that
        return _unsupported_arch(torch.cuda.get_device_capability(tensor.device), self.module().archs)

    def stream(self, device: torch.device) -> int:
        """Torch's current stream."""
        return int(torch.cuda.current_stream(device).cuda_stream)

    def multiprocessors(self, device: torch.device) -> int:
        """The number of the GPU."""
        return _multiprocessors(device)

    @contextmanager
    def launching(self, reads: Tensors, writes: Tensors) -> Iterator[ModuleType]:
        """Makes the tensors' device CUDA's current device.

        Raises:
            ValueError: the tensors are on several devices.
        """
        devices = {tensor.device for tensor in (*reads, *writes) if tensor is not None}
        if len(devices) != 1:
            raise ValueError(f"tensors of a launch must be on one device; got {sorted(map(str, devices))}")
        with torch.cuda.device(devices.pop()):
            yield self.module()


class HostLauncher(Launcher):
    """Launches on the host, one at a time."""

    def __init__(self) -> None:
        super().__init__("_simt", "cpu", "it is for tests; install g++, and the package again with SOFTPROMPT_SIMT=1")
        self._lock = threading.Lock()

    def stream(self, device: torch.device) -> int:
        """0: the host has one stream."""
        return 0

    def multiprocessors(self, device: torch.device) -> int:
        """A constant that makes small problems use splits, as large ones do on a GPU."""
        return _HOST_MULTIPROCESSORS

    @contextmanager
    def launching(self, reads: Tensors, writes: Tensors) -> Iterator[ModuleType]:
        """Registers the memory of the tensors. Any other access raises SimtError."""
        module = self.module()
        with self._lock:
            registered = []
            try:
                for first, end, writable in _memory_ranges(reads, writes):
                    module.register(first, end - first, writable)
                    registered.append(first)
                yield module
            finally:
                for first in registered:
                    module.unregister(first)


DEVICE = GpuLauncher()
HOST = HostLauncher()


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _unsupported_arch(capability: tuple[int, int], archs: str) -> str | None:
    """Why a module built for `archs`, such as "80;90", cannot run on a GPU. None if it can.

    Machine code runs on later minor versions of its architecture. The module also holds PTX of the newest one, which
    runs on every later GPU. Machine code is not compatible between Tegra (systems on a chip) and other GPUs.
    """
    major, minor = capability
    built = [int(arch) for arch in archs.split(";")]
    arch = 10 * major + minor
    has_machine_code = arch in built or (
        arch not in _TEGRA and any(each // 10 == major and each <= arch for each in built if each not in _TEGRA)
    )
    if has_machine_code or arch > max(built):
        return None
    return (
        f"the GPU is of sm_{arch}, and its module was built for {', '.join(f'sm_{each}' for each in built)}: "
        f"install the package again with SOFTPROMPT_CUDA_ARCHS={arch}"
    )


def _memory_ranges(reads: Tensors, writes: Tensors) -> list[tuple[int, int, bool]]:
    """(first byte, end, writable) of the tensors' memory. Tensors that overlap are merged into one range."""
    ranges: list[tuple[int, int, bool]] = []
    for first, end, writable in sorted((*_spans(reads, False), *_spans(writes, True))):
        if ranges and first < ranges[-1][1]:
            first, end, writable = ranges[-1][0], max(end, ranges[-1][1]), writable or ranges[-1][2]
            ranges.pop()
        ranges.append((first, end, writable))
    return ranges


def _spans(tensors: Tensors, writable: bool) -> Iterator[tuple[int, int, bool]]:
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            yield tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size(), writable
