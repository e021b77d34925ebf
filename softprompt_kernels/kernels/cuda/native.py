"""The compiled CUDA kernels, on a GPU or, for tests, on the host; or why they are not here.

One set of kernel modules serves two backends, which differ in their `Runner`:

    DEVICE   "cuda": tensors on NVIDIA GPUs, launched on torch's current stream of their device
    HOST     "simt": tensors on the CPU, kernels run by `csrc/simt`, which checks each of their accesses
"""

import importlib
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from types import ModuleType

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.tensors import DTYPES

Tensors = Iterable[Tensor | None]

_TEGRA = (87, 101, 110)
_HOST_MULTIPROCESSORS = 4  # few, so that small problems are cut as large ones are


class Runner:
    """A compiled module of the kernels, and how its launches are made."""

    def __init__(self, module_name: str, device_type: str, how_to_get: str) -> None:
        self.device_type = device_type
        self._module_name = f"softprompt_kernels.kernels.cuda.{module_name}"
        self._how_to_get = how_to_get

    @cached_property
    def _loaded(self) -> ModuleType | str:
        """The module, or why it is not there."""
        try:
            module = importlib.import_module(self._module_name)
        except ModuleNotFoundError:
            return f"its module was not built: {self._how_to_get}"
        except ImportError as error:
            return f"its module cannot be loaded: {error}"
        problem = module.device_problem()
        return f"it cannot run here: {problem}" if problem else module

    def missing(self) -> str | None:
        """Why the kernels cannot run here, None if they can."""
        return self._loaded if isinstance(self._loaded, str) else None

    def module(self) -> ModuleType:
        """The module.

        Raises:
            RuntimeError: it is missing.
        """
        if isinstance(self._loaded, str):
            raise RuntimeError(self._loaded)
        return self._loaded

    def unsupported_tensor(self, name: str, tensor: Tensor) -> str | None:
        """Why a tensor cannot be given to the kernels, which take fp32, bf16 and fp16."""
        if tensor.device.type != self.device_type:
            place = "the CPU" if self.device_type == "cpu" else "NVIDIA GPUs"
            return f"{name} is on {tensor.device}, and it serves {place}"
        if tensor.dtype not in DTYPES:
            return f"{name} is {tensor.dtype}, and it computes in fp32"
        return None

    def stream(self, device: torch.device) -> int:
        """What launches on a device are queued in, as an address."""
        raise NotImplementedError

    def multiprocessors(self, device: torch.device) -> int:
        """Blocks of threads that run beside each other, at least."""
        raise NotImplementedError

    @contextmanager
    def launching(self, reads: Tensors, writes: Tensors) -> Iterator[ModuleType]:
        """The module, for launches that touch no other memory than that of these tensors, and write to the latter."""
        raise NotImplementedError
        yield


class DeviceRunner(Runner):
    """Launches on GPUs."""

    def __init__(self) -> None:
        super().__init__("_native", "cuda", "install nvcc, and the package again with SOFTPROMPT_CUDA=1")

    def unsupported_tensor(self, name: str, tensor: Tensor) -> str | None:
        """Nor of a GPU that the module has no code for."""
        reason = super().unsupported_tensor(name, tensor)
        if reason is not None:
            return reason
        if torch.version.hip is not None:
            return f"{name} is on an AMD GPU, and it serves NVIDIA's"
        if self.missing():
            return None  # which the dispatcher says
        return _unsupported_arch(torch.cuda.get_device_capability(tensor.device), self.module().archs)

    def stream(self, device: torch.device) -> int:
        """Torch's current one."""
        return int(torch.cuda.current_stream(device).cuda_stream)

    def multiprocessors(self, device: torch.device) -> int:
        """Of the GPU."""
        return _multiprocessors(device)

    @contextmanager
    def launching(self, reads: Tensors, writes: Tensors) -> Iterator[ModuleType]:
        """With the tensors' device as CUDA's current one."""
        devices = {tensor.device for tensor in (*reads, *writes) if tensor is not None}
        if len(devices) != 1:
            raise ValueError(f"tensors of a launch must be on one device; got {sorted(map(str, devices))}")
        with torch.cuda.device(devices.pop()):
            yield self.module()


class HostRunner(Runner):
    """Launches on the host, one at a time."""

    def __init__(self) -> None:
        super().__init__("_simt", "cpu", "it is for tests; install g++, and the package again with SOFTPROMPT_SIMT=1")
        self._lock = threading.Lock()

    def stream(self, device: torch.device) -> int:
        """There is but one."""
        return 0

    def multiprocessors(self, device: torch.device) -> int:
        """A number that makes kernels share work as they do on GPUs."""
        return _HOST_MULTIPROCESSORS

    @contextmanager
    def launching(self, reads: Tensors, writes: Tensors) -> Iterator[ModuleType]:
        """With the tensors' memory known to the checks; any other access is a fault."""
        module = self.module()
        with self._lock:
            registered = []
            try:
                for first, end, writable in _pieces(reads, writes):
                    module.register(first, end - first, writable)
                    registered.append(first)
                yield module
            finally:
                for first in registered:
                    module.unregister(first)


DEVICE = DeviceRunner()
HOST = HostRunner()


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _unsupported_arch(capability: tuple[int, int], archs: str) -> str | None:
    """Machine code runs on its architecture's later minor versions; PTX of the newest on all that came after it.

    Between the GPUs of boards and those of systems on a chip (Tegra) machine code is not compatible.
    """
    major, minor = capability
    built = [int(arch) for arch in archs.split(";")]
    arch = 10 * major + minor
    runs = arch in built or (
        arch not in _TEGRA and any(each // 10 == major and each <= arch for each in built if each not in _TEGRA)
    )
    if runs or arch > max(built):
        return None
    return (
        f"the GPU is of sm_{arch}, and its module was built for {', '.join(f'sm_{each}' for each in built)}: "
        f"install the package again with SOFTPROMPT_CUDA_ARCHS={arch}"
    )


def _pieces(reads: Tensors, writes: Tensors) -> list[tuple[int, int, bool]]:
    """First byte, end, and whether it may be written to, of the memory of tensors; those that overlap are one piece."""
    pieces: list[tuple[int, int, bool]] = []
    for first, end, writable in sorted((*_spans(reads, False), *_spans(writes, True))):
        if pieces and first < pieces[-1][1]:
            first, end, writable = pieces[-1][0], max(end, pieces[-1][1]), writable or pieces[-1][2]
            pieces.pop()
        pieces.append((first, end, writable))
    return pieces


def _spans(tensors: Tensors, writable: bool) -> Iterator[tuple[int, int, bool]]:
    for tensor in tensors:
        if tensor is not None and tensor.numel():
            reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            yield tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size(), writable
