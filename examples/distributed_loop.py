"""Train a KV prompt on several ranks, each with a part of every batch, and the frozen model whole or in shards (FSDP2).

    gradient = Σ_ranks Σ_tokens ∂KL / Σ_ranks tokens       the same as that of one process, for any lengths

Only the prompt is trained. Each rank has all of it, and its gradient is summed over the ranks once a step. The model is
not wrapped: it has no gradients. DistributedDataParallel(prompt) works in place of `reduce_gradients`; it averages over
ranks, so multiply the loss by their number.

FSDP2 gathers one layer at a time. The head stays whole on each rank, because the loss reads its weight (V·d numbers).

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m examples.distributed_loop MODEL TEXT OUTPUT
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from examples.plain_loop import (
    PADDING,
    Example,
    Prompt,
    arguments,
    collate,
    first_tokens,
    load,
    loss_sum,
    numbered,
    passages,
    teach,
)
from softprompt_kernels import TeacherMoments
from softprompt_kernels.models import head_of
from softprompt_kernels.prompts import save


def shard(model: PreTrainedModel) -> None:
    """Shard the layers of a frozen model over the ranks, in place. The head and an embedding tied to it stay whole."""
    decoder, mesh = model.get_decoder(), dist.init_device_mesh(model.device.type, (dist.get_world_size(),))
    head = cast(nn.Parameter, head_of(model).weight)
    for layer in [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(decoder, mesh=mesh, ignored_params={head})  # not the model: its head is read


def gathered(value: Any) -> list[Any]:
    """The value of each rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def check_same(name: str, value: Any) -> None:
    """Raise a ValueError on all ranks if one has another value. Else they would wait for each other, or train apart."""
    if len(found := {*gathered(value)}) > 1:
        raise ValueError(f"{name}: the ranks have different ones ({found}), accepted is the same on all ranks")


def teach_together(model: PreTrainedModel, text: Tensor, sequences: Sequence[Tensor]) -> TeacherMoments:
    """As `teach`, each rank a share of it. All run the model equally often, as FSDP needs: some sequences run twice."""
    check_same("text", hash(tuple(text[0].tolist())))
    check_same("sequences", hash(tuple(token for ids in sequences for token in (len(ids), *ids.tolist()))))
    count, rank = -(-len(sequences) // dist.get_world_size()), dist.get_rank()
    share = [sequences[index % len(sequences)] for index in range(rank * count, (rank + 1) * count)]
    part = teach(model, text, share)
    tokens = sum(len(ids) for ids in sequences)
    whole: dict[str, Any] = {
        name: torch.cat([other.to(tensor.device) for other in gathered(tensor)])[:tokens]
        for name in ("mean", "entropy", "bias_mean")
        if (tensor := getattr(part, name)) is not None
    }
    return replace(part, **whole)


def reduce_gradients(parameters: Iterable[Tensor], tokens: Tensor) -> None:
    """From gradients of sums to the gradient of the mean over the tokens of all ranks."""
    for parameter in parameters:
        gradient = cast(Tensor, parameter.grad)
        dist.all_reduce(gradient)
        gradient /= tokens


def train(
    model: PreTrainedModel,
    prompt: Prompt,
    examples: Sequence[Example],
    moments: TeacherMoments,
    *,
    epochs: int = 1,
    batch_size: int = 4,
    learning_rate: float = 2e-2,
) -> list[float]:
    """Train `prompt` in place, `batch_size` examples a step and rank. Returns the mean loss of each step, of all ranks.

    The order does not depend on the number of ranks. Examples that do not divide by it are left out of an epoch.
    """
    check_same("examples, epochs and batch_size", (len(examples), epochs, batch_size))
    for tensor in prompt.state_dict().values():
        dist.broadcast(tensor, src=0)
    dataset = cast(Dataset[Example], examples)  # a DataLoader takes any sequence
    sampler: DistributedSampler[Example] = DistributedSampler(dataset, drop_last=True)
    loader = DataLoader(dataset, batch_size, sampler=sampler, collate_fn=collate)
    optimizer = torch.optim.AdamW(prompt.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = loss_sum(model, prompt, moments, batch)
            loss.backward()
            total = torch.stack((loss.detach(), (batch[1] != PADDING).sum()))
            dist.all_reduce(total)
            reduce_gradients(prompt.parameters(), total[1])
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(total[0] / total[1]))
    return losses


def main() -> None:
    options = arguments("Train a KV prompt of 16 tokens for a text, on the ranks of torchrun.")
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    model, text = load(options.model, options.text)
    prompt, sequences = first_tokens(model, text, 16), passages(text)
    shard(model)
    losses = train(model, prompt, numbered(sequences), teach_together(model, text, sequences), epochs=4)
    if dist.get_rank() == 0:
        save(options.output, prompt, model=load(options.model, options.text)[0])  # it reads a whole model's weights
        print(f"KL per token in the first step {losses[0]:.4f}, in the last {losses[-1]:.4f}")
    dist.barrier()  # a rank of gloo that ends while another still reads from it can crash
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
