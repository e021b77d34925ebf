"""The parameters of a model's language-model head, for losses that never store all logits.

logits = softcap(logit_scale · (W h + b)),   softcap(x) = c · tanh(x / c),   without a softcap: the identity
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from softprompt_kernels.errors import NotServedError
from softprompt_kernels.models.families import family_of, is_wrapper, text_config
from softprompt_kernels.models.registry import Family, find_family
from softprompt_kernels.models.sharded_logits import gathered_logits
from softprompt_kernels.prompts.offload import loaded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Head:
    """A linear head.

    Args:
        weight: `[V, d]`, the model's own tensor in its dtype, not a copy; with a group this rank's rows of it.
        bias: `[V]` or None; with a group this rank's part.
        softcap: c, or None.
        logit_scale: factor of the linear output.
        group: the ranks over which the rows are split, in their order; None: the head is whole. It is the argument
            `group` of the losses. All ranks must be given the same hidden states.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    group: ProcessGroup | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden [..., d]` to logits `[..., V]`. Both have the weight's dtype, and the logits are on its device.

        With a group they are the logits of the whole vocabulary on every rank, and a collective.
        """
        hidden = hidden.to(self.weight.device)
        if self.group is None:
            logits = nn.functional.linear(hidden, self.weight, self.bias)
        else:
            logits = gathered_logits(hidden, self.weight, self.bias, self.group)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model. An offloaded one is loaded, and stays so as long as the result.

    A weight that is a DTensor in shards of rows (`Shard(0)` on a mesh of one dimension) gives this rank's rows and the
    mesh's group. FSDP2's shards are refused: its ranks have different data.

    Hooks on the whole model are not run, because its decoder is run and its head is read, one after the other.

    Args:
        model: a transformers model, prepared or not.

    Raises:
        NotServedError: the model has no head, or one that computes more than a weight and a bias do: an adapter or
            another wrapper, hooks, a quantised weight.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise NotServedError(f"model: {type(model).__name__} has no language-model head, accepted is a ...ForCausalLM")
    _check_linear(head)
    with loaded(head):
        weight, bias = head.weight, head.bias
    weight, bias, group = _own_rows(model, weight, bias)
    _check_weight(weight)
    config, family, softcap = text_config(model), family_of(model), None
    if is_wrapper(model):  # wrappers leave out the softcap and the scale of their text model
        family = find_family(model.config.model_type) or Family()
    else:
        softcap = getattr(config, "final_logit_softcapping", None)
    return Head(weight, bias, softcap, 1.0 if family.logit_scale is None else family.logit_scale(config), group)


def is_split(model: PreTrainedModel) -> bool:
    """Whether the head's weight is in rows over ranks, as `head_of` takes it. The head itself cannot run then."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    return isinstance(weight, Tensor) and _own_rows(model, weight, None)[2] is not None


def _own_rows(
    model: PreTrainedModel, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, ProcessGroup | None]:
    """This rank's rows of a weight and a bias that are split over ranks, and the group; others as they are."""
    if type(weight) in (Tensor, nn.Parameter) or not torch.distributed.is_available():
        return weight, bias, None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard

    def in_rows(tensor: object) -> bool:
        return isinstance(tensor, DTensor) and tensor.placements == (Shard(0),)

    if not in_rows(weight) or not (bias is None or in_rows(bias)):
        return weight, bias, None
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return weight, bias, None
    rows, part = cast(DTensor, weight), cast("DTensor | None", bias)
    group = rows.device_mesh.get_group()
    return rows.to_local(), None if part is None else part.to_local(), group


def _check_linear(head: nn.Module) -> None:
    """Raise a NotServedError unless running `head` is `linear(hidden, head.weight, head.bias)`."""
    kind = type(head)
    if kind.forward is not nn.Linear.forward or kind.__call__ is not nn.Linear.__call__:
        raise NotServedError(
            f"model: its head is a {kind.__module__}.{kind.__qualname__}, accepted is a torch.nn.Linear: "
            "merge an adapter into it, or leave the head out"
        )
    hooks = [
        _name(hook)
        for registered in (
            head._forward_pre_hooks,
            head._forward_hooks,
            head._backward_pre_hooks,
            head._backward_hooks,
        )
        for hook in registered.values()
    ]
    if "forward" in vars(head) and not _only_moves(head):
        hooks.append("a forward of its own")
    if hooks:
        raise NotServedError(
            f"model: its head has hooks ({', '.join(hooks)}), accepted is a torch.nn.Linear without: "
            "its weight is read, and the module is not run"
        )


def _name(hook: Callable[..., Any]) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _only_moves(head: nn.Module) -> bool:
    """Whether what replaces the head's forward is accelerate, which moves weights and inputs to a device."""
    hook, original = getattr(head, "_hf_hook", None), getattr(head, "_old_forward", None)
    if hook is None or getattr(original, "__func__", None) is not nn.Linear.forward:
        return False
    from accelerate.hooks import AlignDevicesHook  # accelerate has made the hook, so it is installed

    return type(hook) is AlignDevicesHook


def _check_weight(weight: Tensor) -> None:
    """Raise a NotServedError unless `weight` is an ordinary matrix of numbers."""
    if weight.dim() != 2 or weight.dtype not in _DTYPES:
        raise NotServedError(
            f"model: its head is {weight.dtype} of shape {tuple(weight.shape)}, accepted is floating point [V, d] of "
            "16 bits or more: leave the head out of the quantisation"
        )
    if type(weight) not in (Tensor, nn.Parameter) or weight.layout != torch.strided:
        raise NotServedError(
            f"model: the weight of its head is a {type(weight).__qualname__} with layout {weight.layout}, accepted is "
            "an ordinary dense tensor: leave the head out of the quantisation, sparsity, sharding or tensor parallelism"
        )
    if weight.is_meta:
        raise NotServedError(
            "model: its head is on the meta device, without numbers; accepted is a head with numbers, or one that is "
            "offloaded by accelerate"
        )
