"""A head that is split over two ranks, and decoder layers in FSDP2's shards, give what the whole model gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from softprompt_kernels.compress.distill.objective import Objective
from softprompt_kernels.compress.teacher.moments_cache import TargetWriter, read_targets
from softprompt_kernels.errors import NotServedError
from softprompt_kernels.models import capture, generate, head_of, prepare, prompted_hidden, prompted_logits, sample
from softprompt_kernels.prompts import KVPrompt
from tests.ranks import run_ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")

VOCABULARY, CONTEXT, OWN = 101, 9, 7
OBJECTIVES: dict[str, dict[str, Any]] = {
    "kl": {"name": "kl"},
    "kl and labels": {"name": "kl", "nll_weight": 0.4},
    "reverse_kl": {"name": "reverse_kl"},
    "jsd by entropy": {"name": "jsd", "token_weights": "entropy"},
    "nll": {"name": "nll"},
    "own": {"name": "own", "function": lambda *given: own_loss(*given)},
}


def own_loss(student: torch.Tensor, teacher: torch.Tensor, head: Any, labels: torch.Tensor) -> torch.Tensor:
    """A loss that computes all logits."""
    return -head.logits(student).log_softmax(-1).gather(1, labels[:, None])[:, 0]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    prepare(model)
    nn.init.normal_(model.lm_head.weight, std=0.3)
    return model


def results_of(model: LlamaForCausalLM, folder: Path) -> dict[str, torch.Tensor]:
    """What a run needs of a model: keys and values, hidden states, losses with their gradients, answers."""
    ids = torch.randint(3, VOCABULARY, (2, CONTEXT + OWN), generator=torch.Generator().manual_seed(1))
    context, own, labels = ids[:1, :CONTEXT], ids[:, CONTEXT:], ids[:, CONTEXT:].flatten()
    prefix, head = capture(model, context), head_of(model)
    found = {"keys": prefix.layers[1][0], "logits": prompted_logits(model, own, prefix)}
    teacher = prompted_hidden(model, own, prefix).flatten(0, 1)
    found["logits of one token"] = head.logits(teacher[0])
    for name, options in OBJECTIVES.items():
        objective, targets = Objective(head=head, **options), None
        if objective.form is not None:
            writer = TargetWriter(folder / name.replace(" ", "_"), head, objective.form, 1.0)
            writer.add(0, teacher)
            writer.close("key")
            targets = read_targets(writer.folder, "key", head, objective.form, 1.0)
        prompt = KVPrompt.from_prefix(prefix.slice(0, 3))
        hidden = prompted_hidden(model, own, prompt.prefix()).flatten(0, 1)
        loss = objective.loss(hidden, labels, [0], targets).loss
        loss.backward()
        found[name] = torch.cat(
            [loss.detach()[None], *(p.grad.flatten() for p in prompt.parameters() if p.grad is not None)]
        )
    answers = sample(model, own.tolist(), prefix, new_tokens=5, seed=1)
    found["answers"] = torch.tensor([answer.tokens for answer in sorted(answers, key=lambda each: each.index)])
    return found


def on_a_rank(folder: Path) -> dict[str, dict[str, torch.Tensor] | str]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, mine = dist.init_device_mesh("cpu", (2,)), folder / str(dist.get_rank())
    split = tiny_model()
    weight = split.lm_head.weight.detach()
    split.lm_head.weight = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)]), requires_grad=False)
    found: dict[str, Any] = {"head": results_of(split, mine / "head"), "rows": head_of(split).weight.shape[0]}
    try:
        generate(split, torch.tensor([[3, 4]]), None, max_new_tokens=2)
    except NotServedError as error:
        found["generate"] = str(error)
    parallel = tiny_model()
    query = parallel.model.layers[0].self_attn.q_proj
    query.weight = nn.Parameter(distribute_tensor(query.weight.detach(), mesh, [Shard(0)]), requires_grad=False)
    try:
        prepare(parallel)
    except NotServedError as error:
        found["tensor parallel"] = str(error)
    layers = tiny_model()
    for layer in layers.model.layers:
        fully_shard(layer, mesh=mesh)
    prepare(layers)
    found["layers"] = results_of(layers, mine / "layers")
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return results_of(tiny_model(), tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def ranks(whole: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, on_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("part", ["head", "layers"])
def test_a_model_in_two_parts_gives_what_the_whole_one_gives(part, whole, ranks) -> None:
    for found in ranks:
        assert found[part].keys() == whole.keys()
        for name, tensor in whole.items():
            atol = 1e-6 * max(1.0, float(tensor.abs().max()))
            torch.testing.assert_close(found[part][name], tensor, rtol=0, atol=atol, msg=f"{part}: {name}")


def test_each_rank_holds_a_part_of_the_head(ranks) -> None:
    assert [found["rows"] for found in ranks] == [51, 50]


def test_transformers_generate_is_refused_with_a_head_in_parts(ranks) -> None:
    assert all(
        "its head is split over ranks, accepted by generate is a whole one" in found["generate"] for found in ranks
    )


def test_tensor_parallel_layers_are_refused(ranks) -> None:
    said = "weight model.layers.0.self_attn.q_proj.weight is split over ranks by tensor parallelism, accepted are"
    assert all(said in found["tensor parallel"] for found in ranks)
