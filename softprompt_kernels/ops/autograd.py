"""What the registered ops share around their kernels."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels.problems.attention import accumulate_dtype
from softprompt_kernels.ops.checks import any_autocast

NO_SECOND_DERIVATIVE = "{} has no second derivative: its backward cannot be differentiated"


def run_kernel(device: torch.device, kernel: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a kernel with autocast off: the op has already chosen its dtypes."""
    if not (any_autocast() and torch.is_autocast_enabled(device.type)):
        return kernel(*arguments)
    with torch.autocast(device.type, enabled=False):
        return kernel(*arguments)


# What torch has to tell about itself for a call to go past its dispatcher; it promises none of it.
_CAN_TELL = hasattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch") and all(
    hasattr(torch._C, f"_{name}")
    for name in (
        "any_requires_grad",
        "are_functorch_transforms_active",
        "dispatch_keys",
        "get_tracing_state",
        "len_torch_dispatch_stack",
        "len_torch_function_stack",
    )
)
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, type(None)})
_PLAIN_KEYS = 0
for _key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA"):
    _PLAIN_KEYS |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key)).raw_repr()


def are_plain(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all are tensors whose numbers are what lies in their memory, on the CPU or a GPU, or None.

    Not so are subclasses, tensors without memory, negated or conjugated views, and what transforms wrap.
    """
    given = tuple(tensors)
    if not _PLAIN_TYPES.issuperset(map(type, given)):
        return False
    keys = [torch._C._dispatch_keys(tensor).raw_repr() for tensor in given if tensor is not None]
    return not any(key & ~_PLAIN_KEYS for key in keys)


def is_watched() -> bool:
    """Whether this thread has a compiler, tracer, profiler, mode or transform that would see an op that is called."""
    return bool(
        not _CAN_TELL
        or torch.compiler.is_dynamo_compiling()
        or torch._C._get_tracing_state()
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._len_torch_dispatch_stack()
        or torch._ops._len_torch_dispatch_stack_pre_dispatch()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
    )


_library = torch.library.Library("softprompt_kernels", "FRAGMENT")


@dataclass(frozen=True)
class Op:
    """An op that is differentiated by one `autograd.Function`.

    Args:
        dispatched: as PyTorch's dispatcher has it.
        direct: the same without the dispatcher, for `are_plain` inputs where the call `is_watched` by nobody: its code
            and tables, with what leads there, are fetched anew after every large operation, and take as long then as
            attention over a small batch.
    """

    dispatched: Any
    direct: Callable[..., Any]


def define_op(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Op:
    """An op as `custom_op` and `register_autograd` would make it, which take 50 µs more for a call with a gradient.

    Args:
        name: the op is `softprompt_kernels::<name>`; its schema is that of `kernel`.
        kernel, fake: what it computes, and the same for tensors without memory.
        setup_context, backward: as for `torch.library.register_autograd`; `ctx.direct` tells a direct call.
    """
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"softprompt_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.softprompt_kernels, name).default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, is_direct: bool, *inputs: Any) -> Any:
            ctx.direct = is_direct
            if is_direct:
                output = kernel(*inputs)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return None, *backward(ctx, *gradients)

    Function.__name__ = name  # what shows as grad_fn

    def dispatched(*inputs: Any) -> Any:
        return Function.apply(False, *inputs)

    def direct(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Function.apply(True, *inputs)
        return kernel(*inputs)

    _library.impl(name, dispatched, "Autograd")
    return Op(op, direct)


def forbid_double_backward(backward_op: Any, name: str) -> None:
    """Makes a derivative of the op's backward an error that says so."""

    def raise_error(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE.format(name))

    backward_op.register_autograd(raise_error)


def row_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that row gradients wait in between forward and backward.

    That of the hidden states, except fp16: before they are multiplied by a loss scale, small gradients leave its range.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("softprompt_kernels::scale_rows", mutates_args=())
def scale_rows_op(stored: Tensor, scale: Tensor, hidden: Tensor, op: str) -> Tensor:
    return (stored * scale[:, None].to(accumulate_dtype(stored.dtype))).to(hidden.dtype)


@scale_rows_op.register_fake
def _(stored: Tensor, scale: Tensor, hidden: Tensor, op: str) -> Tensor:
    return stored.new_empty(stored.shape, dtype=hidden.dtype)


def scale_rows(stored: Tensor, scale: Tensor, hidden: Tensor, op: str) -> Tensor:
    """stored [N, d] times scale [N] in hidden's dtype, in a new tensor: a second backward finds the first one's input.

    An op of its own that also takes the hidden states, so that a second derivative by either is an error rather than
    one that takes the stored gradient for a constant.
    """
    scaled: Tensor = scale_rows_op(stored, scale, hidden, op)
    return scaled


def _setup_scale_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.op = inputs[3]


def _backward_scale_rows(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE.format(ctx.op))


scale_rows_op.register_autograd(_backward_scale_rows, setup_context=_setup_scale_rows)
