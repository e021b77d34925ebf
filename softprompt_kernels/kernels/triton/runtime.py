"""Whether Triton can run here, and which tensors its kernels accept.

TRITON_INTERPRET=1, set before Python starts, runs the kernels on CPU tensors in Triton's interpreter: slow, for tests.
"""

import importlib.metadata
import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

_OLDEST = (3, 9)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def missing() -> str | None:
    """Why the kernels cannot run here, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (torch's CUDA and ROCm builds bring it)"
    found = _version()
    if found is not None and found < _OLDEST:
        return f"triton {found[0]}.{found[1]} is older than {_OLDEST[0]}.{_OLDEST[1]}, the oldest tested version"
    return None


@cache
def _version() -> tuple[int, ...] | None:
    """Triton's (major, minor) version; None if the build has no metadata."""
    try:
        parts = importlib.metadata.version("triton").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(map(int, parts))


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_tensor(name: str, tensor: Tensor) -> str | None:
    """Why the kernels cannot take a tensor; None if they can."""
    if tensor.dtype not in _DTYPES:
        return f"{name} is {tensor.dtype}, and it computes in fp32"
    if tensor.device.type == "cpu" and not interpreting():
        return f"{name} is on cpu, and it serves cuda (set TRITON_INTERPRET=1 to run it in Triton's interpreter)"
    if tensor.device.type not in ("cuda", "cpu", "meta"):
        return f"{name} is on {tensor.device.type}, and it serves cuda"
    if tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16:
        return f"{name} is {tensor.dtype}, which Triton's interpreter computes wrongly; it takes float32 and float16"
    return _unsupported_device(name, tensor.device) if tensor.device.type == "cuda" else None


@cache
def _unsupported_device(name: str, device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None  # a pretended device, as in a FakeTensorMode
    if torch.version.hip is not None:
        arch = torch.cuda.get_device_properties(device).gcnArchName
        if not arch.startswith(("gfx90a", "gfx94", "gfx95")):
            return f"{name} is on a {arch}, and it serves AMD's MI200 and later, with 64 threads a wave"
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{name} is on a GPU of compute capability {major}.{minor}, and it serves 8.0 and above"
    return None


def float32_precision() -> str:
    """The input precision of fp32 dots: "tf32" where torch's own GEMMs may use TF32, else "ieee"."""
    matmul = torch.backends.cuda.matmul
    chosen = getattr(matmul, "fp32_precision", None)  # once this is set, reading the older allow_tf32 raises
    if chosen is None:
        return "tf32" if matmul.allow_tf32 else "ieee"
    if chosen == "none":
        chosen = getattr(torch.backends, "fp32_precision", None)
    return "tf32" if chosen == "tf32" else "ieee"
