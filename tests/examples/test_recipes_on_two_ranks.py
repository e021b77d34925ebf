"""The recipes for trainers give on two ranks what they give in one process, with the same batches a step."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.examples import recipe_ranks
from tests.examples.loop_problems import start
from tests.examples.recipe_ranks import KINDS, Run

pytest.importorskip("peft")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


@pytest.fixture(scope="module")
def two_ranks(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `recipe_ranks.py` found, and its folder."""
    folder = tmp_path_factory.mktemp("ranks")
    start(Path(__file__).with_name("recipe_ranks.py"), *folders, folder)
    return {**torch.load(folder / "results.pt"), "folder": folder}


def check_same(got: tuple, expected: Run) -> None:
    """All losses and gradient norms, and the weights, within rounding."""
    got = Run(*got)
    assert {name: len(values) for name, values in got.log.items()} == {n: len(v) for n, v in expected.log.items()}
    for name, values in expected.log.items():
        assert got.log[name] == pytest.approx(values, rel=1e-6), name
    assert got.final_loss == pytest.approx(expected.final_loss, rel=1e-6)
    assert got.trained.keys() == expected.trained.keys()
    for name, weight in expected.trained.items():
        assert (got.trained[name] - weight).norm() <= 1e-6 * weight.norm(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_the_trainer(kind, two_ranks, folders, tmp_path: Path) -> None:
    expected = recipe_ranks.train_prompt(folders[0], tmp_path / "one", kind)
    assert len(expected.log["loss"]) == (4 if kind == "PROMPT_TUNING" else 8)
    check_same(two_ranks[kind], expected)


def test_a_resumed_prompt_is_that_of_the_unbroken_run(two_ranks) -> None:
    unbroken, resumed = (Run(*two_ranks[name]) for name in ("PREFIX_TUNING", "resumed"))
    saved = {path.name for path in (two_ranks["folder"] / "PREFIX_TUNING-stopped").glob("checkpoint-*")}
    assert saved == {
        "checkpoint-4",
        "checkpoint-6",
        "checkpoint-8",
    }  # the first of them was given, and 2 was not redone
    assert resumed.log == unbroken.log
    assert all(torch.equal(resumed.trained[name], weight) for name, weight in unbroken.trained.items())


def test_the_best_prompt_is_kept(two_ranks) -> None:
    run = Run(*two_ranks["CARTRIDGE"])
    assert run.best_loss == max(run.log["eval_loss"]) > run.log["eval_loss"][-1] + 1e-3
    assert run.final_loss == pytest.approx(run.best_loss, rel=1e-6)


def test_distillation_with_accumulated_batches(two_ranks, folders, tmp_path: Path) -> None:
    expected = recipe_ranks.distil(*folders, tmp_path, gradient_accumulation_steps=2)
    assert len(expected.log["loss"]) == 4
    check_same(two_ranks["distilled"], expected)


@pytest.mark.parametrize("name", [*KINDS, "torchtitan", "torchtune"])
def test_models_in_shards(name, two_ranks) -> None:
    """Trained prompts on a sharded base, and students whose loss gathers the weight of a sharded head."""
    (losses, weights), (expected, whole) = two_ranks["sharded"][name]
    assert losses == pytest.approx(expected, rel=1e-6) and expected[-1] < expected[0]
    assert weights.keys() == whole.keys()
    for weight, value in whole.items():
        assert (weights[weight] - value).norm() <= 1e-6 * value.norm(), weight


def test_the_trainers_fsdp_is_refused_before_any_work(two_ranks) -> None:
    for said, reason in zip(two_ranks["refused"], ("it shards the head", "PEFT cannot save a prompt"), strict=True):
        assert said.startswith("fsdp: got True, accepted is False (DDP): " + reason)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Position ids are not supported")
def test_trl_with_a_compiled_model(two_ranks, folders, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    expected = recipe_ranks.distil_with_trl(*folders, tmp_path)
    assert len(expected.log["loss"]) == 2 and expected.log["loss"][0] > 0.1
    check_same(two_ranks["trl"], expected)
