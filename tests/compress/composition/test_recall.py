"""Two contexts of key-value pairs: what joining loses, and what training wins back."""

from pathlib import Path

import pytest

from tests.compress.composition.recall_compositions import recovered
from tests.compress.distill.recall_model import save_recall_model


@pytest.mark.usefixtures("no_plot")
def test_moving_keys_and_one_sink_lose_less_and_training_wins_some_back(tmp_path: Path) -> None:
    model = save_recall_model(tmp_path / "model")
    mean = recovered(model, tmp_path, 2, seed=0, steps=50, batch_size=16, learning_rate=0.02)
    assert mean["alone"] > 0.97
    assert mean["naive"] + 0.02 < mean["joined"] < mean["prompt"] - 0.02
    assert mean["prompt"] > 0.94
    assert mean["all"] > 0.99, "the other pairs do not disturb the model itself"
