"""A saved prompt held against its text, and the dry run: both measure, neither writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from softprompt_kernels.compress import CompressConfig, compress, evaluate_prompt, plan
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plot takes longer than all the rest."""
    monkeypatch.setattr("softprompt_kernels.compress.run.save_curves", lambda *_: None)


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
    # Exactly the held-out sequences: outputs as sampled, greedy or not, are tokens that the run kept.
    examples = json.loads((config.output / "cache" / "examples.json").read_text())["heldout"]
    assert len(held) == len(examples)
    before = files_in(tmp_path)
    path = tmp_path / "again.jsonl"
    path.write_text("".join(json.dumps({"input": line["input"]}) + "\n" for line in held))
    found = evaluate(config, queries=path, seed=config.seed + 1)
    assert {key: found[key] for key in ("context_tokens", "prompt_tokens", "ratio")} == {
        key: figures[key] for key in ("context_tokens", "prompt_tokens", "ratio")
    }
    heldout = figures["heldout"]
    for name in ("kl_none", "kl_truncated", "kl_untrained", "kl_prompt", "recovered", "top1_agreement", "tokens"):
        assert found["queries"][name] == pytest.approx(heldout[name], rel=1e-5), name
    assert files_in(tmp_path) == {**before, path: path.read_bytes()}


def test_given_outputs_are_scored_as_they_are(make_config: Make, tmp_path: Path) -> None:
    config = make_config(steps=1)
    compress(config)
    path = tmp_path / "answered.jsonl"
    path.write_text('{"input": "Who keeps it?", "output": "Mira Vale."}\n')
    first, second = (evaluate(config, queries=path, seed=seed)["queries"] for seed in (0, 1))
    assert first == second
    assert first["tokens"] == len("Mira Vale.") + 1


def test_another_text_is_told(make_config: Make, tmp_path: Path, counting: Any) -> None:
    config = make_config(steps=1)
    compress(config)
    silent, told = counting(), counting()
    evaluate(config, reporter=silent)
    assert silent.messages == []
    other = tmp_path / "other.txt"
    other.write_text("The lighthouse of Brae has a red door and 212 steps.")
    evaluate(config, context=other, reporter=told)
    assert told.messages == [f"The prompt in {config.output / 'prompt'} was made from another text than {other}."]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"prompt_dir": "nothing"}, "is not a saved prompt"),
        ({"queries": "missing.jsonl"}, "queries: .* cannot be read"),
        ({"context": "missing.txt"}, "context: .* cannot be read"),
        ({"new_tokens": 500}, "accepted is the model's window of 512"),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated_is_refused(
    make_config: Make, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
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


@pytest.mark.parametrize("options", [{}, {"kind": "embedding"}, {"objective": "jsd"}, {"init": "random"}], ids=str)
def test_a_plan_measures_and_writes_nothing(make_config: Make, tmp_path: Path, options: dict[str, Any]) -> None:
    config = make_config(**options)
    before = files_in(tmp_path)
    found = plan(config)
    assert files_in(tmp_path) == before
    assert not config.output.exists()
    assert found.prompt_tokens == 8
    assert found.ratio == found.context_tokens / 8
    # Keys and values of 2 layers, 2 heads of 8 numbers, fp32.
    assert found.prompt_bytes == 8 * 2 * 2 * 2 * 8 * 4
    assert found.context_kv_bytes == found.prompt_bytes * found.context_tokens // 8
    assert (found.train_queries, found.heldout_queries) == (4, 2)
    assert found.kl_none > 0.01
    assert found.seconds_per_step > 0
    assert found.estimated_seconds["training"] == pytest.approx(found.seconds_per_step * config.steps)
    assert all(seconds >= 0 for seconds in found.estimated_seconds.values())


def test_a_plan_knows_the_context_of_the_run(make_config: Make) -> None:
    config = make_config(steps=1)
    assert plan(config).context_tokens == compress(config)["context_tokens"]


def test_a_plan_refuses_what_the_run_would(make_config: Make) -> None:
    with pytest.raises(SoftPromptError, match="tokens: got 10000 for a context of"):
        plan(make_config(tokens=10_000))
