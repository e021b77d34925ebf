"""Argument checks shared by the ops. They read shapes, dtypes and devices only, so no check waits for a device."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER = (torch.int32, torch.int64)


# Whether autocast is on for any device. A torch without this function: assume so, and ask for the device.
any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


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


def shape(name: str, tensor: Tensor, symbols: str, expected: tuple[int, ...]) -> None:
    """The tensor has the expected shape."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must have shape {symbols} = {list(expected)}; got {list(tensor.shape)}")


def integers(name: str, tensor: Tensor | None, length: int | None, symbol: str, expected: torch.device) -> None:
    """The tensor is None, or a vector of integers of the given length (None: of any)."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be None or a tensor; got {type(tensor).__name__}")
    if tensor.dtype not in INTEGER:
        raise TypeError(f"{name} must be int32 or int64; got {tensor.dtype}")
    if tensor.dim() != 1 or (length is not None and tensor.shape[0] != length):
        size = symbol if length is None else f"{symbol} = {length}"
        raise ValueError(f"{name} must have shape [{size}]; got {list(tensor.shape)}")
    device(name, tensor, expected)


def positive(name: str, number: float | None) -> None:
    """The number is None or finite and above 0."""
    if number is not None and not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name} must be None or a finite number above 0; got {number}")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast, the tensors in the autocast dtype, as a GEMM would cast them; float64 stays."""
    if not any_autocast():
        return tensors
    device_type = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype not in FLOATING or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def rows_and_columns(name: str, tensor: Tensor) -> None:
    """The tensor has rows and columns: at least 2 dimensions."""
    if tensor.dim() < 2:
        raise ValueError(f"{name} must have at least 2 dimensions; got shape {list(tensor.shape)}")


def same_rows(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """The tensors agree in all but the last dimension."""
    if tensor.shape[:-1] != other.shape[:-1]:
        expected = list(other.shape[:-1])
        raise ValueError(
            f"{name} must have {other_name}'s leading dimensions {expected}; got {list(tensor.shape[:-1])}"
        )


def hidden_and_weight(hidden_name: str, hidden: Tensor, weight_name: str, weight: Tensor) -> None:
    """Hidden states [..., d] and the weight [V, d] of their head."""
    floating(hidden_name, hidden)
    floating(weight_name, weight)
    rows_and_columns(hidden_name, hidden)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        size = hidden.shape[-1]
        raise ValueError(
            f"{weight_name} must have shape [V, d] with d = {size} of {hidden_name}; got {list(weight.shape)}"
        )


def head_options(weight: Tensor, bias: Tensor | None, logit_scale: float, chunk_tokens: int | None) -> None:
    """The other arguments of a head: bias, scale and chunk size."""
    if bias is not None:
        floating("bias", bias)
        shape("bias", bias, "[V]", (weight.shape[0],))
        device("bias", bias, weight.device)
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite; got {logit_scale}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be None or at least 1; got {chunk_tokens}")


def whole(name: str, number: int | None) -> None:
    """The number is None or an int."""
    if number is not None and not isinstance(number, int):
        raise TypeError(f"{name} must be None or an int; got {type(number).__name__}")


def vocabulary(valid_vocab: int | None, *sizes: int) -> int:
    """The number of vocabulary entries that count, at most the smallest of the sizes."""
    if valid_vocab is None:
        return min(sizes)
    if not 1 <= valid_vocab <= min(sizes):
        raise ValueError(f"valid_vocab must be None or in [1, {min(sizes)}]; got {valid_vocab}")
    return valid_vocab
