"""A run goes on where its options, model and tokenizer mean the same, though they are written in another way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt_kernels.compress import CompressConfig, Interrupted, compress
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]

pytestmark = pytest.mark.usefixtures("no_plot")


def test_a_run_of_the_version_before_is_not_refused(make_config: Make) -> None:
    config = make_config(steps=1)
    figures = compress(config)
    record = config.output / "run.json"
    identity = json.loads(record.read_text())["identity"]
    del identity["model"]["body"], identity["model"]["rows"], identity["tokenizer"]["tokens_without_added"]
    newer = ("token_weights", "rounds", "student_share", "context_dtype", "save_best", "patience")
    for name in ("test", "relative_learning_rate", *newer):
        del identity[name]  # an option that it did not have
    identity["tokenizer"]["special_tokens"] = "0" * 64
    record.write_text(json.dumps({"identity": identity}))
    assert compress(config) == figures
    with pytest.raises(SoftPromptError, match="differs in relative_learning_rate;"):
        compress(make_config(steps=1, relative_learning_rate=False))
    identity["model"]["weights"] = {"float16": "0" * 64, "bfloat16": "0" * 64}
    record.write_text(json.dumps({"identity": identity}))
    with pytest.raises(SoftPromptError, match="differs in model;"):
        compress(config)


def test_a_run_resumes_on_its_base_with_more_tokens(
    make_config: Make, recording_reporter: Any, tiny_model_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        compress(make_config(), recording_reporter("Training", 3))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model.resize_token_embeddings(320)
    for one in (model, tokenizer):
        one.save_pretrained(tmp_path / "more")
    reporter = recording_reporter()
    compress(make_config(model=str(tmp_path / "more")), reporter)
    assert "Resuming from step 3." in reporter.messages
    assert not {"Teacher's answers", "Given answers"} & reporter.done.keys(), "what is recorded is read"
