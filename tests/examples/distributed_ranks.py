"""What each rank of test_distributed_loop.py runs: `torchrun distributed_ranks.py MODEL FOLDER`."""

import copy
import sys
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from examples import distributed_loop, plain_loop, torchtitan_loss
from softprompt_kernels.prompts import EmbeddingPrompt
from tests.examples.loop_problems import Problem, end_if_stuck, read_problem


def main() -> None:
    end_if_stuck()
    model_folder, folder = sys.argv[1], Path(sys.argv[2])
    dist.init_process_group("gloo")
    problem = read_problem(model_folder)
    results = {"ranks": dist.get_world_size()}

    def train(name, problem: Problem, prompt=None, **options):
        model, text, sequences, _ = problem
        prompt = plain_loop.first_tokens(model, text, 8) if prompt is None else prompt
        moments = distributed_loop.teach_together(model, text, sequences)
        examples = plain_loop.numbered(sequences)
        losses = distributed_loop.train(model, prompt, examples, moments, epochs=2, batch_size=2, **options)
        results[name] = losses, torch.cat([parameter.detach().flatten() for parameter in prompt.parameters()])

    train("whole", problem)
    train("embedding", problem, EmbeddingPrompt(problem.model.get_input_embeddings()(problem.text[0, :8])))
    results["wrapped"] = train_wrapped(problem)
    results["refused"] = refusals(problem)
    results["head"] = head_gradient(problem)
    for name, tied in (("sharded", False), ("tied", True)):
        sharded = read_problem(model_folder)
        plain_loop.prepare(sharded.model)
        if tied:
            sharded.model.lm_head.weight = sharded.model.get_input_embeddings().weight
            train("tied whole", sharded._replace(model=copy.deepcopy(sharded.model)))
        distributed_loop.shard(sharded.model)
        train(name, sharded)
        results[f"{name}: bytes"] = sum(p.to_local().nbytes for p in sharded.model.model.layers.parameters())
        if not tied:
            sharded.model.activation_checkpointing_enable()
            sharded.model.train()
            train("recomputed", sharded)
    if dist.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    sys.argv[1:] = [model_folder, str(folder / "text.txt"), str(folder / "prompt")]
    with patch.object(dist, "init_process_group"):  # that was done above
        distributed_loop.main()


def train_wrapped(problem: Problem) -> tuple[list[float], torch.Tensor]:
    """The first two steps of `train`, with the prompt in DistributedDataParallel."""
    model, text, sequences, _ = problem
    inner = plain_loop.first_tokens(model, text, 8)
    prompt, ranks = DistributedDataParallel(inner), dist.get_world_size()
    moments, examples = plain_loop.teach(model, text, sequences), plain_loop.numbered(sequences)
    optimizer = torch.optim.AdamW(prompt.parameters(), 2e-2, betas=(0.9, 0.95), weight_decay=0.0)
    sampler = distributed_loop.DistributedSampler(examples, drop_last=True)
    losses = []
    for batch in distributed_loop.DataLoader(examples, 2, sampler=sampler, collate_fn=plain_loop.collate):
        tokens = (batch[1] >= 0).sum()
        dist.all_reduce(tokens)
        loss = plain_loop.loss_sum(model, prompt, moments, batch) / tokens
        (loss * ranks).backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(float(total))
    return losses, torch.cat([parameter.detach().flatten() for parameter in inner.parameters()])


def head_gradient(problem: Problem) -> torch.Tensor:
    """Of torchtitan's loss, where each rank has two of four sequences, and the head is in shards."""
    model, teacher = (torchtitan_loss.Decoder(copy.deepcopy(problem.plain)) for _ in range(2))
    fully_shard(model.lm_head.requires_grad_(True))
    first = 2 * dist.get_rank()
    torchtitan_loss_of(model, teacher, problem, slice(first, first + 2)).backward()
    return model.lm_head.weight.grad.full_tensor()


def torchtitan_loss_of(model: torch.nn.Module, teacher: torch.nn.Module, problem: Problem, rows: slice) -> torch.Tensor:
    """For some of four sequences of 15 tokens, the first two with 5 labels less, as a part of the mean over all."""
    loss = torchtitan_loss.DistillationLoss()
    loss.set_lm_head(model.lm_head)
    loss.watch(model, teacher)
    teacher.model.register_forward_hook(lambda _, __, output: setattr(output, "last_hidden_state", output[0] + 1))
    model._skip_lm_head = True
    ids = problem.text[0].view(4, 15)
    labels = ids.clone()
    labels[:2, :5] = -100
    return loss(model(ids[rows]), labels[rows], (labels != -100).sum())[0]


def refusals(problem: Problem) -> list[str]:
    """What is said of data that differ between the ranks."""
    model, text, sequences, _ = problem
    prompt, mine = plain_loop.first_tokens(model, text, 8), dist.get_rank()
    moments, examples = plain_loop.teach(model, text, sequences), plain_loop.numbered(sequences)
    said = []
    for call in (
        lambda: distributed_loop.teach_together(model, text + mine, sequences),
        lambda: distributed_loop.teach_together(model, text, sequences[mine:]),
        lambda: distributed_loop.train(model, prompt, examples[mine:], moments),
    ):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


if __name__ == "__main__":
    main()
