"""Details of an evaluation: pieces of text that join, figures that average to evaluation.json, families and heads."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress import CompressConfig, compress
from softprompt_kernels.compress.evaluate.details import Details, read_details
from softprompt_kernels.compress.evaluate.token_texts import token_texts
from softprompt_kernels.compress.folder import RunFolder
from softprompt_kernels.errors import SoftPromptError

Make = Callable[..., CompressConfig]


@pytest.mark.parametrize("text", ["plain words", "Größe, 猫 und 😀!", "", " \n two\n", "猫" * 9])
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == f"{text}{tokenizer.eos_token}"
    assert [piece for piece in pieces if piece] == [*text, tokenizer.eos_token], "bytes wait for their character"


def test_bytes_that_are_no_character_join_too(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = list(range(120, 200)) + tokenizer("é", add_special_tokens=False)["input_ids"][:1]
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.fixture
def detailed(make_config: Make, test_file: Path, no_plot: None) -> tuple[CompressConfig, dict[str, Any], Details]:
    config = make_config(test=test_file, selfstudy=8, steps=1, new_tokens=5)
    return config, compress(config), read_details(config.output / "details.json")


def test_a_run_has_details_that_average_to_its_figures(
    detailed: tuple[CompressConfig, dict[str, Any], Details], tokenizer: PreTrainedTokenizerBase
) -> None:
    config, figures, details = detailed
    assert set(details.sets) == {"train", "heldout", "test"}
    for name, examples in details.sets.items():
        of_set = figures[name]
        students = {key.removeprefix("kl_") for key in of_set if key.startswith("kl_")}
        for example in examples:
            assert set(example.kl) == set(example.agrees) == students
            lengths = {len(part) for part in (example.tokens, example.entropy, *example.kl.values())}
            assert lengths == {len(example.agrees["prompt"])}
        for student in students:
            kl = [value for example in examples for value in example.kl[student]]
            assert len(kl) == of_set["tokens"]
            assert mean(kl) == pytest.approx(of_set[f"kl_{student}"], rel=1e-4)
        agrees = [value for example in examples for value in example.agrees["prompt"]]
        assert mean(agrees) == pytest.approx(of_set["top1_agreement"])
    saved = [json.loads(line) for line in RunFolder(config.output).queries.read_text().splitlines()]
    by_query = {line["input"]: line for line in saved if line["split"] == "test"}
    special = set(tokenizer.all_special_tokens)
    for example in details.sets["test"]:
        line = by_query[example.query]
        assert "".join(token for token in example.tokens if token not in special) == line["output"]
        given = line["output"] == "Mira's."
        assert example.ended == (given or example.tokens[-1] in special), "5 sampled tokens end nothing"
    assert all(example.prompt_answer is not None for example in details.sets["heldout"])
    assert {example.prompt_answer for example in details.sets["train"]} == {None}


def test_the_family_of_a_query_is_kept(detailed: tuple[CompressConfig, dict[str, Any], Details]) -> None:
    config, _, details = detailed
    saved = [json.loads(line) for line in RunFolder(config.output).queries.read_text().splitlines()]
    families = {line["input"]: line.get("family", "given") for line in saved}
    assert set(families.values()) == {"general", "phrase", "sentence", "given"}
    for examples in details.sets.values():
        assert {example.query: example.family for example in examples}.items() <= families.items()


def test_the_match_error_is_that_of_every_head_also_after_a_resume(
    detailed: tuple[CompressConfig, dict[str, Any], Details],
) -> None:
    config, figures, details = detailed
    assert details.match_error is not None
    assert [len(layer) for layer in details.match_error] == [4, 4]
    assert all(0 < error < 1 for layer in details.match_error for error in layer)
    folder = RunFolder(config.output)
    folder.evaluation.unlink()
    folder.details.unlink()
    assert compress(config)["heldout"] == figures["heldout"]
    assert read_details(folder.details) == details


def test_a_prompt_that_is_not_matched_has_no_match_error(make_config: Make, no_plot: None) -> None:
    config = make_config(init="first", steps=0)
    compress(config)
    assert read_details(config.output / "details.json").match_error is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "details.json cannot be read"),
        ('{"format": 1, "sets": {"heldout": [{"query": 3}]}}', r"sets.heldout.0.query"),
        ('{"format": 99, "sets": {}}', "has format 99, accepted is 1"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "details.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SoftPromptError, match=message):
        read_details(path)
