"""`torch.nn.functional.kl_div`, with less memory and in less time on a CPU.

    loss = Σ t (log t − x)      ∂loss/∂x = −t      with x = input, and t = target, or exp(target) with log_target

PyTorch computes this in passes over whole tensors and allocates up to two of the input's size meanwhile. Here the sum
runs over blocks of a few MiB, which the allocator and the cache keep, so only the gradient is allocated.

x need not be the logarithm of probabilities that sum to 1, and the gradient takes x as it is. The op `kl_div` takes
logits instead and normalises both sides. It saves both softmaxes, which cost more than the loss itself.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as torch_functional

BLOCK = 2**19  # elements: an fp32 block takes 2 MiB
__all__ = ["kl_div"]

_SERVED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def kl_div(
    input: Tensor,
    target: Tensor,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    """Pointwise `t · (log t − input)`, reduced: the arguments and the meaning of `torch.nn.functional.kl_div`.

    Formula and gradient are at the head of losses/functional.py.

    Args:
        input: logarithms of the student's probabilities, `[N, V]` or any other shape. They need not be normalised.
            Differentiable.
        target: the teacher's probabilities, or their logarithms with `log_target`, in input's shape. Differentiable.
        size_average, reduce: deprecated in PyTorch, with the meaning that it gives them.
        reduction: "none" (each element), "sum", "batchmean" (the sum over input.shape[0]), or "mean": over the number
            of *elements*, as in PyTorch.
        log_target: target holds logarithms.

    Returns:
        A scalar, or input's shape with "none", in input's dtype. Sums of 16-bit inputs are computed in fp32.

    Raises:
        ValueError, RuntimeError: PyTorch's own, for an unknown reduction and shapes that do not fit.

    A target of probability 0 contributes 0. Where it is given as −inf with `log_target`, or meets an input of −inf, the
    result is NaN, as in PyTorch. The op `kl_div` has a meaning for these.

    When it pays: for "sum", "batchmean" and "mean" on a CPU, outside torch.compile, without a gradient for the target.
    It spares temporaries of the input's size. Where these are fresh memory (with glibc, above 32 MiB), forward and
    backward together take .4 to .6 of PyTorch's time, on one thread and on two. Where the allocator has them at hand,
    they take the same time. All else is passed to PyTorch's function: "none", small tensors, a target that needs a
    gradient, broadcasting, mixed dtypes, the deprecated arguments, autocast, forward-mode derivatives, tensor
    subclasses, other devices, and compiled code, in which PyTorch fuses the passes itself.

    What pays more: `kl_div(log_softmax(s), softmax(t))` is `softprompt_kernels.kl_div(s, t)`, 2 to 10 times as fast on
    one thread, and exact near 0, where the rounding of log_softmax alone is 1e-6. `linear_kl_div` takes hidden states
    and needs no logits at all.
    """
    if size_average is None and reduce is None and _in_blocks(input, target, reduction):
        count = {"sum": 1, "batchmean": input.shape[0], "mean": input.numel()}[reduction]
        loss: Tensor = _BlockSum.apply(input, target, log_target, count)
        return loss
    return torch_functional.kl_div(input, target, size_average, reduce, reduction, log_target)


def _in_blocks(input: Tensor, target: Tensor, reduction: str) -> bool:
    """Whether the sum over blocks serves this call."""
    return (
        reduction in ("sum", "batchmean", "mean")
        and not torch.compiler.is_compiling()
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (input, target))
        and input.shape == target.shape
        and input.dtype == target.dtype
        and input.dtype in _SERVED_DTYPES
        and input.device == target.device
        and input.device.type == "cpu"
        and input.numel() > BLOCK  # with a smaller one, nothing is gained
        and not target.requires_grad
        and not torch.is_autocast_enabled("cpu")  # autocast chooses the dtype of PyTorch's function
        and getattr(forward_ad, "_current_level", -1) < 0  # `_BlockSum` has no forward-mode derivative
    )


class _BlockSum(torch.autograd.Function):
    """Σ t (log t − x) / count over all elements. Can be differentiated twice, as PyTorch's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, log_target: bool, count: int) -> Tensor:
        sums = []
        for x, t in _blocks(input, target, BLOCK):
            x, t = (x, t) if x.dtype in (torch.float32, torch.float64) else (x.float(), t.float())
            terms = t.exp() * (t - x) if log_target else torch.xlogy(t, t) - t * x
            sums.append(terms.sum())
        return (torch.stack(sums).sum() / count).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool, int], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.log_target, ctx.count = inputs[2:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (target,) = ctx.saved_tensors
        scale = -grad / ctx.count
        if ctx.log_target and not torch.is_grad_enabled():  # with it, this backward is differentiated too
            return target.exp().mul_(scale), None, None, None
        return (target.exp() if ctx.log_target else target) * scale, None, None, None


def _blocks(x: Tensor, t: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of both tensors with at most `size` elements, which cover them in any layout."""
    if x.numel() <= size:
        yield x, t
        return
    inner = x.numel() // x.shape[0]
    if inner > size:
        for x_i, t_i in zip(x, t, strict=True):
            yield from _blocks(x_i, t_i, size)
    else:
        yield from zip(x.split(size // inner), t.split(size // inner), strict=True)
