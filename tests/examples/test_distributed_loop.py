"""The distributed loop gives on two ranks what it gives on one, with a whole model and with one in shards (FSDP2)."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from softprompt_kernels.errors import NotServedError, SoftPromptError
from softprompt_kernels.models import head_of
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, load
from tests.examples.conftest import time_ratio
from tests.examples.distributed_ranks import torchtitan_loss_of
from tests.examples.loop_problems import PlainLoss, start

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `distributed_ranks.py` found, and its folder."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog ran to the red house " * 3)
    start(Path(__file__).with_name("distributed_ranks.py"), tiny_model_folder, folder)
    results = torch.load(folder / "results.pt")
    assert results["ranks"] == 2
    return {**results, "folder": folder}


def run(problem, prompt=None, batch_size=4, epochs=2) -> tuple[list[float], Tensor]:
    """Losses, and what was trained."""
    from examples import distributed_loop, plain_loop

    model, text, sequences, _ = problem
    prompt = plain_loop.first_tokens(model, text, 8) if prompt is None else prompt
    moments = distributed_loop.teach_together(model, text, sequences)
    examples = plain_loop.numbered(sequences)
    losses = distributed_loop.train(model, prompt, examples, moments, epochs=epochs, batch_size=batch_size)
    return losses, torch.cat([parameter.detach().flatten() for parameter in prompt.parameters()])


def check_same(got: tuple[list[float], Tensor], expected: tuple[list[float], Tensor]) -> None:
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    assert (got[1] - expected[1]).norm() <= 1e-6 * expected[1].norm()


def test_losses_are_those_of_plain_transformers(problem, one_rank, monkeypatch) -> None:
    from examples import distributed_loop

    losses, _ = run(problem)
    monkeypatch.setattr(distributed_loop, "loss_sum", PlainLoss(problem))
    expected, _ = run(problem)
    assert len(losses) == 4 and losses[0] > 0.1
    assert losses == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["whole", "sharded", "recomputed"])
def test_two_ranks_give_the_losses_and_the_prompt_of_one(name, two_ranks, problem, one_rank) -> None:
    check_same(two_ranks[name], run(problem))


def test_two_ranks_train_an_embedding_prompt_as_one(two_ranks, problem, one_rank) -> None:
    prompt = EmbeddingPrompt(problem.model.get_input_embeddings()(problem.text[0, :8]))
    check_same(two_ranks["embedding"], run(problem, prompt))


def test_shards_change_no_bit(two_ranks) -> None:
    for sharded, whole in (("sharded", "whole"), ("recomputed", "whole"), ("tied", "tied whole")):
        assert two_ranks[sharded][0] == two_ranks[whole][0]
        assert torch.equal(two_ranks[sharded][1], two_ranks[whole][1])


def test_compiled_layers_in_shards_change_no_bit(problem, one_rank) -> None:
    from examples import distributed_loop, plain_loop

    problem = problem._replace(sequences=problem.text[0].split(10)[:4])  # of one length: two graphs to compile
    losses, trained = run(problem)
    model, prompt = problem.model, plain_loop.first_tokens(problem.model, problem.text, 8)
    distributed_loop.shard(model)
    moments = distributed_loop.teach_together(model, problem.text, problem.sequences)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    examples = plain_loop.numbered(problem.sequences)
    assert distributed_loop.train(model, prompt, examples, moments, epochs=2) == losses
    assert torch.equal(torch.cat([parameter.detach().flatten() for parameter in prompt.parameters()]), trained)


def test_each_rank_holds_half_of_the_layers(two_ranks, problem) -> None:
    whole = sum(parameter.nbytes for parameter in problem.model.model.layers.parameters())
    assert two_ranks["sharded: bytes"] == two_ranks["tied: bytes"] == whole / 2


def test_a_prompt_in_distributed_data_parallel_gives_the_same(two_ranks, problem, one_rank) -> None:
    check_same(two_ranks["wrapped"], run(problem, epochs=1))


def test_torchtitans_head_in_shards_gets_the_gradient_of_all_ranks(two_ranks, problem) -> None:
    from examples import torchtitan_loss

    model, teacher = (torchtitan_loss.Decoder(copy.deepcopy(problem.plain)) for _ in range(2))
    model.lm_head.requires_grad_(True)
    torchtitan_loss_of(model, teacher, problem, slice(None)).backward()
    assert model.lm_head.weight.grad.abs().max() > 1e-3
    torch.testing.assert_close(two_ranks["head"], model.lm_head.weight.grad, atol=1e-6, rtol=1e-5)


def test_ranks_with_different_data_are_refused(two_ranks) -> None:
    names = [said.partition(":")[0] for said in two_ranks["refused"]]
    assert names == ["text", "sequences", "examples, epochs and batch_size"]
    assert all("accepted is the same on all ranks" in said for said in two_ranks["refused"])


def test_command_line_on_two_ranks(two_ranks, problem) -> None:
    assert load(two_ranks["folder"] / "prompt", problem.model)[0].length == 16


def test_a_head_in_shards_is_refused(problem, one_rank) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(problem.model, mesh=dist.init_device_mesh("cpu", (1,)))
    with pytest.raises(NotServedError, match=r"weight of its head is a DTensor.*leave the head out of the .*sharding"):
        head_of(problem.model)


def test_a_prompt_of_another_model_is_refused(problem, one_rank) -> None:
    key = torch.zeros(3, 2, 8, 8)
    with pytest.raises(SoftPromptError, match="prefix: got 3 layers, 2 key heads of size 8, the model has 2, 2 and 8"):
        run(problem, KVPrompt(key, key))


def test_a_step_is_no_slower_than_plain_transformers(larger_problem, one_rank, monkeypatch) -> None:
    from examples import distributed_loop, plain_loop

    model, text, sequences, _ = larger_problem
    prompt, moments = plain_loop.first_tokens(model, text, 16), plain_loop.teach(model, text, sequences)
    plain_loss = PlainLoss(larger_problem)

    def train() -> None:
        distributed_loop.train(model, prompt, plain_loop.numbered(sequences), moments)

    def train_plain() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(distributed_loop, "loss_sum", plain_loss)
            train()

    assert time_ratio(train, train_plain) < 1  # about .55 is usual
