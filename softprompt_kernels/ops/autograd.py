"""Registration of the ops with PyTorch: autograd, autocast, and calls that bypass the dispatcher."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from softprompt_kernels.kernels import ranges
from softprompt_kernels.kernels.problems.attention import accumulate_dtype
from softprompt_kernels.ops import dispatch
from softprompt_kernels.ops.checks import any_autocast

NO_SECOND_DERIVATIVE = "{} has no second derivative: its backward cannot be differentiated"


def run_kernel(name: str, kernel: Any, device: torch.device, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function with autocast off: the op has already chosen its dtypes.

    For profilers, the call is a range: `name` is its op and pass, `kernel` the kernel module that dispatch chose.
    """
    if ranges.observed():
        function = _in_ranges(name, kernel, function)
    if not (any_autocast() and torch.is_autocast_enabled(device.type)):
        return function(*arguments)
    with torch.autocast(device.type, enabled=False):
        return function(*arguments)


def _in_ranges(name: str, kernel: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function within the range of the call, and that of its kernel if the kernel module says that it has one."""
    backend = dispatch.backend_of(kernel)
    only = getattr(kernel, "ONLY_KERNEL", {}).get(name.rpartition(".")[2])

    def run(*arguments: Any) -> Any:
        with ranges.call_range(name, backend), ranges.kernel_range(*only) if only else nullcontext():
            return function(*arguments)

    return run


# The private functions of torch that `is_intercepted` needs. Without them, no call bypasses the dispatcher.
_HAS_PRIVATE_FUNCTIONS = hasattr(torch._ops, "_len_torch_dispatch_stack_pre_dispatch") and all(
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
_ORDINARY_TYPES = frozenset({Tensor, torch.nn.Parameter, type(None)})
_ORDINARY_KEYS = 0
for _key in ("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA"):
    _ORDINARY_KEYS |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key)).raw_repr()


def are_ordinary(tensors: Iterable[Tensor | None]) -> bool:
    """Whether each is None or a tensor on the CPU or a GPU whose memory holds its values.

    Other tensors are subclasses, tensors without memory, negated or conjugated views, and those wrapped by transforms.
    """
    tensors = tuple(tensors)
    if not _ORDINARY_TYPES.issuperset(map(type, tensors)):
        return False
    keys = [torch._C._dispatch_keys(tensor).raw_repr() for tensor in tensors if tensor is not None]
    return not any(key & ~_ORDINARY_KEYS for key in keys)


def is_intercepted() -> bool:
    """Whether a compiler, tracer, profiler, mode or transform of this thread has to see the ops that are called."""
    return bool(
        not _HAS_PRIVATE_FUNCTIONS
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
    """An op whose gradient is one `autograd.Function`.

    Args:
        through_dispatcher: the op that is registered with PyTorch's dispatcher.
        bypassing_dispatcher: the same op without the dispatcher, for inputs that `are_ordinary`, in calls that nothing
            intercepts (`is_intercepted`). The code and tables of the dispatcher leave the cache with every large
            operation. To fetch them again takes as long as attention over a small batch.
    """

    through_dispatcher: Any
    bypassing_dispatcher: Callable[..., Any]


def define_op(
    name: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> Op:
    """Defines an op as `custom_op` and `register_autograd` would. Those take 50 µs more for a call with a gradient.

    Args:
        name: the op becomes `softprompt_kernels::<name>`, with the schema of `kernel`.
        kernel, fake: the implementation, and the fake implementation for tensors without memory.
        setup_context, backward: as for `torch.library.register_autograd`. `ctx.bypassed_dispatcher` says how the
            forward was called.
    """
    schema = torch.library.infer_schema(kernel, mutates_args=())
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"softprompt_kernels::{name}", fake, lib=_library)
    op = getattr(torch.ops.softprompt_kernels, name).default

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, bypasses: bool, *inputs: Any) -> Any:
            ctx.bypassed_dispatcher = bypasses
            if bypasses:
                output = kernel(*inputs)
            else:
                with torch._C._AutoDispatchBelowAutograd():
                    output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return None, *backward(ctx, *gradients)

    Function.__name__ = name  # shown as grad_fn

    def through_dispatcher(*inputs: Any) -> Any:
        return Function.apply(False, *inputs)

    def bypassing_dispatcher(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return Function.apply(True, *inputs)
        return kernel(*inputs)

    _library.impl(name, through_dispatcher, "Autograd")
    return Op(op, bypassing_dispatcher)


def forbid_double_backward(backward_op: Any, name: str) -> None:
    """Makes a second derivative of the op a RuntimeError that names the op."""

    def raise_error(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(NO_SECOND_DERIVATIVE.format(name))

    backward_op.register_autograd(raise_error)


def row_gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which row gradients are stored from forward to backward.

    It is that of the hidden states, but fp32 for fp16: before the loss scale multiplies them, small gradients would
    underflow in fp16.
    """
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.custom_op("softprompt_kernels::scale_rows", mutates_args=())
def scale_rows_op(stored: Tensor, scale: Tensor, hidden: Tensor, op: str) -> Tensor:
    with ranges.call_range(f"{op}.backward", "torch"):
        return (stored * scale[:, None].to(accumulate_dtype(stored.dtype))).to(hidden.dtype)


@scale_rows_op.register_fake
def _(stored: Tensor, scale: Tensor, hidden: Tensor, op: str) -> Tensor:
    return stored.new_empty(stored.shape, dtype=hidden.dtype)


def scale_rows(stored: Tensor, scale: Tensor, hidden: Tensor, op: str) -> Tensor:
    """stored [N, d] times scale [N], in hidden's dtype, in a new tensor: a second backward reads `stored` again.

    It is an op of its own that also takes the hidden states. So a second derivative by either of them is an error,
    instead of a wrong result that treats the stored gradient as a constant.
    """
    scaled: Tensor = scale_rows_op(stored, scale, hidden, op)
    return scaled


def _setup_scale_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.op = inputs[3]


def _backward_scale_rows(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(NO_SECOND_DERIVATIVE.format(ctx.op))


scale_rows_op.register_autograd(_backward_scale_rows, setup_context=_setup_scale_rows)
