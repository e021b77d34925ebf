"""FSDP2 in recipes, for recipe_ranks.py: models in shards against whole ones with the batches of all ranks."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import AutoModelForCausalLM, Trainer

from examples import peft_prompts_trainer, torchtitan_loss, torchtune_loss

IDS = torch.randint(0, 300, (4, 10), generator=torch.Generator().manual_seed(0))
LABELS = torch.where(torch.arange(10) < torch.tensor([[5], [10], [10], [8]]), IDS, -100)  # 12 and 16 tokens a rank
Outcome = tuple[list[float], dict[str, Tensor]]


def both(train: Any, *arguments: Any) -> tuple[Outcome, Outcome]:
    """Losses and weights: in shards, and whole."""
    rank, outcomes = dist.get_rank(), []
    for sharded, part in ((True, slice(2 * rank, 2 * rank + 2)), (False, slice(None))):
        losses, model = train(*arguments, sharded, part)
        weights = {
            name: getattr(weight, "full_tensor", lambda weight=weight: weight)().detach()
            for name, weight in model.named_parameters()
        }
        outcomes.append((losses, weights))
    return outcomes[0], outcomes[1]


def shard(model: nn.Module, layers: Any, *others: nn.Module, **options: Any) -> None:
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*layers, *others):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh, **options)


def summed(value: Tensor, sharded: bool) -> Tensor:
    """Over the ranks, where each has a part."""
    value = value.detach().clone()
    if sharded:
        dist.all_reduce(value)
    return value


def train_prompt(student: Path, kind: str, sharded: bool, part: slice) -> tuple[list[float], nn.Module]:
    """A patched model of PEFT in shards. The prompt is whole on each rank, and its gradient is summed."""
    torch.manual_seed(0)
    model = peft_prompts_trainer.make_model(peft_prompts_trainer.PromptArguments(str(student), Path(), kind, 5))
    prompt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if sharded:
        shard(model, model.base_model.model.layers, model.get_input_embeddings(), ignored_params={*prompt})
    optimizer, tokens, losses = torch.optim.AdamW(prompt, lr=0.05), (LABELS[:, 1:] >= 0).sum(), []
    for _ in range(3):
        inputs = {"input_ids": IDS[part], "attention_mask": (LABELS[part] >= 0).long(), "labels": LABELS[part]}
        loss = model(**inputs, num_items_in_batch=tokens).loss
        loss.backward()
        for parameter in prompt:
            parameter.grad = summed(parameter.grad, sharded)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(summed(loss, sharded)))
    return losses, model


def train_titan(student: Path, teacher: Path, sharded: bool, part: slice) -> tuple[list[float], nn.Module]:
    """As torchtitan: gradients are sums over the ranks. The head is outside of the student's forward."""
    models = [torchtitan_loss.Decoder(AutoModelForCausalLM.from_pretrained(folder)) for folder in (student, teacher)]
    for model in models if sharded else ():
        shard(model, model.model.layers, model.lm_head)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
    loss_fn = torchtitan_loss.DistillationLoss()
    loss_fn.set_lm_head(models[0].lm_head)
    loss_fn.watch(*models)
    models[0]._skip_lm_head = True
    tokens = (LABELS[:, 1:] >= 0).sum()
    return steps(models[0], sharded, lambda: loss_fn(models[0](IDS[part, :-1]), LABELS[part, 1:], tokens)[0]), models[0]


def train_tune(student: Path, teacher: Path, sharded: bool, part: slice) -> tuple[list[float], nn.Module]:
    """As torchtune: gradients are means over the ranks, of losses times the number of ranks over all tokens."""
    models = [torchtune_loss.Decoder(AutoModelForCausalLM.from_pretrained(folder)) for folder in (student, teacher)]
    for model in models if sharded else ():
        shard(model, model.model.layers, model.output)
    loss_fn, labels = torchtune_loss.LinearForwardKLLoss(), LABELS[part, 1:]
    loss_fn.set_model_output(*models)
    share = (labels >= 0).sum() / (LABELS[:, 1:] >= 0).sum()

    def loss() -> Tensor:
        with torch.no_grad():
            hidden = models[1](IDS[part, :-1])
        return loss_fn(models[0](IDS[part, :-1]), hidden, labels) * share

    return steps(models[0], sharded, loss, dist.get_world_size() if sharded else 1), models[0]


def steps(model: nn.Module, sharded: bool, compute_loss: Any, factor: int = 1) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []  # to see a wrong factor of a gradient
    for _ in range(3):
        loss = compute_loss()
        (loss * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(summed(loss, sharded)))
    return losses


def refused(train: Any) -> str:
    """What a recipe says to FSDP. accelerate shards on GPUs alone, so it is told that these ranks are such."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    create = Trainer.create_accelerator_and_postprocess

    def pretend(trainer: Trainer) -> None:
        AcceleratorState._reset_state()
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        create(trainer)

    with patch.object(Trainer, "create_accelerator_and_postprocess", pretend):
        try:
            train()
        except ValueError as error:
            return str(error)
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
    return "nothing"
