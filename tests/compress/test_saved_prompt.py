"""The evaluation of a saved prompt: it measures, and writes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress import CompressConfig, compress, evaluate_prompt
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]

pytestmark = pytest.mark.usefixtures("no_plot")


def files_in(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def evaluate(config: CompressConfig, **options: Any) -> dict[str, Any]:
    settings = {"context": config.context, "prompt_dir": config.output / "prompt", "queries": config.queries}
    return evaluate_prompt(config.model, **(settings | {"new_tokens": 6, "device": "cpu"} | options))


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_a_saved_prompt_has_the_figures_of_its_run(make_config: Make, tmp_path: Path, kind: str) -> None:
    config = make_config(kind=kind)
    figures = compress(config)
    saved = [json.loads(line) for line in (config.output / "queries.jsonl").read_text().splitlines()]
    held = [line for line in saved if line["split"] == "heldout"]
    # The same sequences as in the run: an answer depends on the seed and the query alone.
    examples = json.loads((config.output / "cache" / "examples.json").read_text())["heldout"]
    assert len(held) == len(examples)
    before = files_in(tmp_path)
    path = tmp_path / "again.jsonl"
    path.write_text("".join(json.dumps({"input": line["input"]}) + "\n" for line in held))
    found = evaluate(config, queries=path, seed=config.seed)
    assert {key: found[key] for key in ("context_tokens", "prompt_tokens", "ratio")} == {
        key: figures[key] for key in ("context_tokens", "prompt_tokens", "ratio")
    }
    heldout = figures["heldout"]
    for name in ("kl_none", "kl_truncated", "kl_untrained", "kl_prompt", "recovered", "top1_agreement", "tokens"):
        assert found["queries"][name] == pytest.approx(heldout[name], rel=1e-5), name
    assert files_in(tmp_path) == {**before, path: path.read_bytes()}


def test_given_outputs_are_evaluated_unchanged(make_config: Make, tmp_path: Path) -> None:
    config = make_config(steps=1)
    compress(config)
    path = tmp_path / "answered.jsonl"
    path.write_text('{"input": "Who keeps it?", "output": "Mira Vale."}\n')
    first, second = (evaluate(config, queries=path, seed=seed)["queries"] for seed in (0, 1))
    assert first == second
    assert first["tokens"] == len("Mira Vale.") + 1


def test_training_ignores_references_and_evaluation_judges_by_them(make_config: Make, tmp_path: Path) -> None:
    config = make_config(steps=1)
    lines = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    with_references = tmp_path / "judged.jsonl"
    with_references.write_text("".join(json.dumps({**line, "references": ["x"]}) + "\n" for line in lines))
    figures = compress(config)
    judged = config.model_copy(update={"queries": with_references, "output": tmp_path / "other"})
    assert compress(judged)["heldout"] == figures["heldout"]
    found = evaluate(judged, metric="contains", dissimilarity=lambda one, other: 0.5)
    assert set(found["answers"]["accuracy"]) == {"contains"} and found["answers"]["questions"] == len(lines)
    own = [value for name, value in found["answers"]["dissimilarity"].items() if "lambda" in name]
    assert own == [{"none": 0.5, "truncated": 0.5, "prompt": 0.5}]


def test_a_context_other_than_the_prompts_own_gives_a_message(
    make_config: Make, tmp_path: Path, recording_reporter: Any
) -> None:
    config = make_config(steps=1)
    compress(config)
    same_text, other_text = recording_reporter(), recording_reporter()
    evaluate(config, reporter=same_text)
    assert same_text.messages == []
    other = tmp_path / "other.txt"
    other.write_text("The lighthouse of Brae has a red door and 212 steps.")
    evaluate(config, context=other, reporter=other_text)
    assert other_text.messages == [f"The prompt in {config.output / 'prompt'} was made from another text than {other}."]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt_dir": "nothing"}, "is not a saved prompt"),
        ({"queries": "missing.jsonl"}, "queries: .* cannot be read"),
        ({"context": "missing.txt"}, "context: .* cannot be read"),
        ({"new_tokens": 500}, "accepted are 512, the model's window"),
    ],
    ids=str,
)
def test_bad_input_is_refused(make_config: Make, tmp_path: Path, options: dict[str, Any], reason: str) -> None:
    config = make_config(steps=1)
    compress(config)
    named = {name: value if name == "new_tokens" else tmp_path / value for name, value in options.items()}
    with pytest.raises(SoftPromptError, match=reason):
        evaluate(config, **named)


def test_a_truncated_prompt_is_refused(make_config: Make) -> None:
    config = make_config(steps=1)
    compress(config)
    path = config.output / "prompt" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(SoftPromptError, match="is truncated or not a safetensors file"):
        evaluate(config)
