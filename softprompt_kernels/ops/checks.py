"""Argument checks shared by the ops. They look at shapes, dtypes and devices only, so no check waits for a device."""

import math

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int32, torch.int64)


def floating(name: str, tensor: Tensor) -> None:
    """The tensor is real-valued."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64; got {tensor.dtype}")


def same_dtype_and_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The tensor has the dtype and device of another argument."""
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have {other_name}'s dtype {other.dtype}; got {tensor.dtype}")
    device(name, tensor, other.device)


def device(name: str, tensor: Tensor, expected: torch.device) -> None:
    """The tensor is on the device of the call."""
    if tensor.device != expected:
        raise ValueError(f"{name} must be on {expected}; got {tensor.device}")


def shape(name: str, tensor: Tensor, words: str, expected: tuple[int, ...]) -> None:
    """The tensor has the expected shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {words} = {list(expected)}; got {list(tensor.shape)}")


def integers(name: str, tensor: Tensor | None, length: int | None, words: str, expected: torch.device) -> None:
    """The tensor is None or a vector of integers of the given length."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be None or a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in INTEGER:
        raise TypeError(f"{name} must be int32 or int64; got {tensor.dtype}")
    if tensor.dim() != 1 or (length is not None and tensor.shape[0] != length):
        size = words if length is None else f"{words} = {length}"
        raise ValueError(f"{name} must have shape [{size}]; got {list(tensor.shape)}")
    device(name, tensor, expected)


def positive(name: str, number: float | None) -> None:
    """The number is None or finite and above 0."""
    if number is not None and not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be None or a finite number above 0; got {number}")


def as_int64(tensor: Tensor | None) -> Tensor | None:
    """Kernels take indices and lengths as int64."""
    return None if tensor is None else tensor.to(torch.int64)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, what a matrix multiplication would make of its inputs: the autocast dtype, float64 kept."""
    device_type = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype not in FLOATING or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
