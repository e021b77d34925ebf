"""Composition where recall is known: two contexts of key-value pairs with keys of their own, in 8 tokens each."""

import random
from pathlib import Path

import pytest

from softprompt_kernels.compress import CompressConfig, compose, compress
from tests.compress.distill import recall_model
from tests.compress.distill.recall_model import RecallTask, save_recall_model

SETTINGS = {"tokens": 8, "selfstudy": 0, "new_tokens": 1, "steps": 0, "device": "cpu"}


@pytest.mark.usefixtures("no_plot")
def test_moving_keys_and_one_sink_lose_less_and_training_wins_some_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_recall_model(tmp_path / "model")
    keys, runs = random.Random(0).sample(recall_model.KEYS, 32), []
    for number in range(2):
        monkeypatch.setattr(recall_model, "KEYS", keys[16 * number : 16 * number + 16])
        folder = tmp_path / str(number)
        folder.mkdir()
        files = RecallTask.of(number).write(folder)
        compress(CompressConfig.model_validate({**SETTINGS, **files, "model": str(model), "output": folder / "run"}))
        runs.append(folder / "run")
    figures = compose(runs, tmp_path / "both", steps=50, batch_size=16, learning_rate=0.02, device="cpu")
    mean = figures["mean"]["heldout"]
    assert mean["alone"] > 0.97
    assert mean["naive"] + 0.02 < mean["joined"] < mean["prompt"] - 0.02
    assert mean["prompt"] > 0.95
    assert mean["all"] > 0.99, "the other pairs do not disturb the model itself"
