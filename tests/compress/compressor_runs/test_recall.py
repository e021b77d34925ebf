"""The model that recalls (tests/compress/distill/recall_model.py): a compressor learns to read pairs that it never saw.

A short form of `measure_recall.py`: one pair a context, and few steps.
"""

from pathlib import Path

import pytest

from softprompt_kernels.compress import load_model, train_compressor
from tests.compress.compressor_runs.measure_recall import recovered, training
from tests.compress.distill.recall_model import save_recall_model


@pytest.mark.usefixtures("one_thread")
def test_a_compressor_recovers_pairs_of_contexts_that_it_was_not_trained_on(tmp_path: Path) -> None:
    model = save_recall_model(tmp_path / "model")
    loaded = load_model(str(model), "float32", "cpu")
    config = training(
        tmp_path / "run",
        model,
        0,
        pairs=1,
        words=0,
        contexts=48,
        tested=8,
        tokens=2,
        lora_rank=8,
        steps=50,
        batch_contexts=8,
        evaluate_every=50,
        learning_rate=2e-2,
        lora_learning_rate=2e-2,
        max_grad_norm=None,
    )
    figures = train_compressor(config, None, loaded)
    unseen = [one for name in ("heldout", "test") for one in figures[name]["contexts"].values()]
    assert recovered(unseen) > 0.2
    records = (config.output / "metrics.jsonl").read_text().splitlines()
    assert len(records) == 50
