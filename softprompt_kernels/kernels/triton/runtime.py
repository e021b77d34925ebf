"""Whether Triton can run here, and which tensors it takes.

TRITON_INTERPRET=1, set before Python starts, runs the kernels on CPU tensors in Triton's interpreter: slow, for tests.
"""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@cache
def missing() -> str | None:
    """Why the kernels cannot run here, None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton (torch's CUDA and ROCm builds bring it)"
    return None


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unsupported_tensor(name: str, tensor: Tensor) -> str | None:
    """Why a tensor cannot be given to the kernels; None if it can."""
    if tensor.dtype not in _DTYPES:
        return f"{name} is {tensor.dtype}, and it computes in fp32"
    if tensor.device.type == "cpu" and not interpreting():
        return f"{name} is on cpu, and it serves cuda (set TRITON_INTERPRET=1 to run it in Triton's interpreter)"
    if tensor.device.type not in ("cuda", "cpu", "meta"):
        return f"{name} is on {tensor.device.type}, and it serves cuda"
    if tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16:
        return f"{name} is {tensor.dtype}, which Triton's interpreter computes wrongly; it takes float32 and float16"
    return None


def float32_precision() -> str:
    """How fp32 products are made: Triton's "ieee", or "tf32" where torch's own matrix products may use it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
