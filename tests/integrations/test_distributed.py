"""Patched models in DistributedDataParallel and FSDP2, on one rank: the gradients of PEFT, and what unpatch says."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from softprompt_kernels import patch, unpatch
from softprompt_kernels.errors import SoftPromptError

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model, tokens) -> dict[str, torch.Tensor]:
    """Of a step with padding, by the names that the parameters had before they were wrapped."""
    ids, mask = tokens(3, 7), torch.ones(3, 7, dtype=torch.int64)
    mask[1, :3] = 0
    model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    found = {name.removeprefix("module."): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def shard(model, decoder):
    for layer in decoder.layers:
        fully_shard(layer)
    return fully_shard(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_gradients_of_a_wrapped_prompt(wrapper, checkpointing, kind, pair, tokens) -> None:
    model, patched = pair(kind)
    if checkpointing:
        patched.gradient_checkpointing_enable({"use_reentrant": False})
        patched.train()
    wrapped = DistributedDataParallel(patched) if wrapper == "DDP" else shard(patched, patched.base_model.model)
    torch.testing.assert_close(gradients(wrapped, tokens), gradients(model, tokens), atol=1e-6, rtol=0)
    if wrapper == "FSDP2":
        with pytest.raises(SoftPromptError, match="its class became FSDPSharedPromptModel after patch"):
            unpatch(patched)


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
def test_gradients_of_a_wrapped_transformers_model(wrapper, build, tokens) -> None:
    model, patched = (build("llama").requires_grad_(True) for _ in range(2))
    patch(patched)
    wrapped = DistributedDataParallel(patched) if wrapper == "DDP" else shard(patched, patched.model)
    ids = tokens(3, 7)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    model(input_ids=ids, labels=ids).loss.backward()
    for (name, one), other in zip(wrapped.named_parameters(), model.parameters(), strict=True):
        grad = one.grad.full_tensor() if hasattr(one.grad, "full_tensor") else one.grad
        torch.testing.assert_close(grad, other.grad, atol=1e-6, rtol=0, msg=name)
