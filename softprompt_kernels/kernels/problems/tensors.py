"""What the compiled kernels of the CPU and of CUDA share about tensors: dtype numbers, and the strides they accept."""

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes that the compiled kernels read, with their numbers in `csrc/tensor.h`."""


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension has stride 1, else its contiguous form.

    A last dimension of size 1 may keep any stride. An empty tensor is replaced by a new one: it may be an expanded view
    whose strides the bindings would refuse.
    """
    if tensor.numel() == 0:
        return tensor.new_empty(tensor.shape)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
