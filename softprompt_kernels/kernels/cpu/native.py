"""The compiled module of the CPU kernels, or the reason why it is missing."""

import importlib
from types import ModuleType

# torch comes before the module, which uses the threads of torch's OpenMP runtime and brings no runtime of its own.
from torch import Tensor

from softprompt_kernels.kernels.problems.tensors import DTYPES

_why_missing: str | None = None
_module: ModuleType | None = None
try:
    _module = importlib.import_module("softprompt_kernels.kernels.cpu._native")
except ModuleNotFoundError:
    _why_missing = "its module was not built: install a C++ compiler, g++ or clang++, and install the package again"
except ImportError as error:
    _why_missing = f"its module cannot be loaded: {error}"


def missing() -> str | None:
    """Why the kernels cannot run on this machine, None if they can."""
    return _why_missing


def module() -> ModuleType:
    """The compiled module.

    Raises:
        RuntimeError: it is missing; the message says why.
    """
    if _module is None or _why_missing is not None:
        raise RuntimeError(_why_missing)
    return _module


def instruction_set() -> str:
    """The name of the instruction set that runs, "none" without the module.

    If SOFTPROMPT_ISA names an instruction set that is not available, the text of that error.
    """
    if _module is None:
        return "none"
    try:
        return str(_module.instruction_set())
    except ValueError as error:
        return str(error)


def unsupported_tensor(name: str, tensor: Tensor) -> str | None:
    """Why the kernels cannot take a tensor, None if they can: they take fp32, bf16 and fp16 on the CPU."""
    if tensor.device.type != "cpu":
        return f"{name} is on {tensor.device}, and it serves the CPU"
    if tensor.dtype not in DTYPES:
        return f"{name} is {tensor.dtype}, and it computes in fp32"
    return None
