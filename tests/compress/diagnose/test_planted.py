"""A cause is planted in a run, and the diagnosis names it first. The model is constructed, so each cause is certain."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt_kernels.compress import CompressConfig, compress, diagnose_run
from softprompt_kernels.compress.evaluate.details import read_details
from softprompt_kernels.compress.evaluate.diagnosis import Diagnosis, read_diagnosis
from softprompt_kernels.errors import SoftPromptError
from tests.compress.distill.recall_model import FILLERS, KEYS, VALUES, RecallTask

MakeRun = Callable[..., Path]
TRAINED = {"init": "strided", "learning_rate": 0.3, "steps": 60, "batch_size": 28}


def causes(found: Diagnosis) -> list[str]:
    return [finding.cause for finding in found.findings]


@pytest.mark.parametrize("options", [{}, TRAINED], ids=["matched", "trained"])
def test_a_good_prompt_has_nothing_wrong(make_run: MakeRun, options: dict[str, Any]) -> None:
    found = diagnose_run(make_run(**options))
    assert causes(found) == ["nothing wrong"]
    assert found.heldout_recovered is not None and found.heldout_recovered > 0.95
    assert (found.capacity, found.rate_test) == ((), None), "nothing is tried where nothing is wrong"


@pytest.mark.parametrize("options", [{}, TRAINED], ids=["matched", "trained"])
def test_1_fewer_tokens_than_pairs(make_run: MakeRun, options: dict[str, Any]) -> None:
    folder = make_run(tokens=4, **options)
    found = diagnose_run(folder)
    assert causes(found)[0] == "capacity"
    first = found.findings[0]
    assert first.options == "--tokens 8"
    assert [point.tokens for point in found.capacity] == [1, 2, 4, 8, 16]
    curve = [point.heldout for point in found.capacity]
    assert curve == sorted(curve) and curve[2] < 0.6 and curve[3] > 0.95
    # What it promises is what a run with these options gives.
    assert found.heldout_recovered is not None and first.gain is not None
    changed = make_run(tokens=8, output=folder.with_name("changed"), **options)
    recovered = json.loads((changed / "evaluation.json").read_text())["heldout"]["recovered"]
    assert found.heldout_recovered + first.gain == pytest.approx(recovered, abs=0.05)
    assert (found.rate_test is None) == (not options)


@pytest.mark.parametrize(("rate", "what"), [(1e-3, "below"), (30.0, "above")])
def test_2_a_learning_rate_100_times_too_small_or_too_large(make_run: MakeRun, rate: float, what: str) -> None:
    folder = make_run(**TRAINED | {"learning_rate": rate})
    found = diagnose_run(folder)
    assert causes(found)[0] == "optimisation"
    assert f"The learning rate {rate:g} is {what} the range in which the loss falls" in found.findings[0].sentence
    option, suggested = found.findings[0].options.split()
    assert option == "--learning-rate"
    mended = make_run(**TRAINED | {"learning_rate": float(suggested), "output": folder.with_name("mended")})
    assert causes(diagnose_run(mended)) == ["nothing wrong"]


def test_3_a_likelihood_of_greedy_answers_ruins_the_distribution(make_run: MakeRun) -> None:
    options = {"objective": "nll", "sample_temperature": 0, "init": "matched", "learning_rate": 0.1}
    found = diagnose_run(make_run(**TRAINED | options))
    assert causes(found)[0] == "objective"
    assert found.findings[0].options == "--objective kl"
    assert ("top-1 agreement, training queries", "1.00") in found.findings[0].evidence


@pytest.mark.parametrize("options", [{}, TRAINED], ids=["matched", "trained"])
def test_4_training_queries_that_miss_a_family(make_run: MakeRun, tmp_path: Path, options: dict[str, Any]) -> None:
    task = RecallTask.of()
    asked = list(task.pairs)[:4]
    missed = {query for query in task.heldout if query.split()[1] not in asked}
    heldout = tmp_path / "families.jsonl"
    lines = [{"input": query, "family": "missed" if query in missed else "asked"} for query in task.heldout]
    heldout.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = replace(task, train=tuple(query for query in task.train if query.split()[1] in asked))
    found = diagnose_run(make_run(task, heldout=heldout, **options))
    assert causes(found)[0] == "data"
    assert found.families[0].name == "missed" and found.families[0].share > 0.9
    shown = [name for name, _ in found.findings[0].evidence if name.startswith("far from the teacher: ")]
    assert shown and all(name.removeprefix("far from the teacher: ") in missed for name in shown)
    assert "--queries" in found.findings[0].change or "queries.txt" in found.findings[0].change


def needless(count: int) -> tuple[str, ...]:
    """Queries that hold the pair that they ask for, with keys that the context does not have."""
    draw, new = random.Random(0), [key for key in KEYS if key not in RecallTask.of().pairs]
    asked: dict[str, None] = {}
    while len(asked) < count:
        word, key, value = draw.choice(FILLERS), draw.choice(new), draw.choice(VALUES)
        asked[f"{word} {key} {value} {word} {key}"] = None
    return tuple(asked)


def test_5_queries_that_do_not_need_the_context(make_run: MakeRun) -> None:
    queries = needless(25)
    found = diagnose_run(make_run(replace(RecallTask.of(), train=queries[:18], heldout=queries[18:])))
    assert causes(found) == ["nothing to compress"]
    assert ("queries that do not need the text", "25 of 25 queries") in found.findings[0].evidence
    assert found.capacity == ()


def test_5_a_run_that_was_refused_for_this_is_diagnosed(make_run: MakeRun, tmp_path: Path) -> None:
    queries = needless(60)
    task = replace(RecallTask.of(), train=queries[:10], heldout=queries[10:])
    details = read_details(make_run(task, output=tmp_path / "first") / "details.json")
    least = sorted(details.sets["heldout"], key=lambda one: one.kl["none"])[:2]
    with pytest.raises(SoftPromptError, match="the context does not matter"):
        make_run(replace(task, heldout=tuple(one.query for one in least)))
    assert not (tmp_path / "run" / "evaluation.json").exists()
    found = diagnose_run(tmp_path / "run", full=True)
    assert causes(found) == ["nothing to compress"]
    assert "The run was refused for this." in found.findings[0].sentence
    assert (found.heldout_recovered, found.families, found.capacity) == (None, (), ())
    assert read_diagnosis(tmp_path / "run" / "diagnosis.json") == found


def test_6_a_template_without_the_end_of_an_answer(make_run: MakeRun, recall_folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "broken"
    model.mkdir()
    for path in recall_folder.iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert "<end>" in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace("<end>", "")
    tokenizer.save_pretrained(model)
    options = {"new_tokens": 32, "sample_temperature": 0}
    found = diagnose_run(make_run(RecallTask.of(wordings=1), model=str(model), **options))
    assert causes(found) == ["broken template"]
    assert "writes no token at the end of an answer" in found.findings[0].sentence
    assert ("the template's end of an answer", "no token") in found.findings[0].evidence


def test_6_a_model_that_ends_its_turn_with_another_token(
    make_config: Callable[..., CompressConfig], tiny_model_folder: Path, tmp_path: Path, no_plot: None
) -> None:
    """It was trained with <|im_end|>, and its tokenizer says that <|pad|> ends an answer."""
    folder = tmp_path / "broken"
    tokenizer, model = (
        auto.from_pretrained(tiny_model_folder) for auto in (AutoTokenizer, AutoModelForCausalLM)
    )  # fmt: skip
    ids = torch.tensor([tokenizer("Who keeps it?").input_ids])
    with torch.no_grad():
        state = model.model(ids).last_hidden_state[0].mean(0)
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] = 9 * state / state.norm() ** 2
    tokenizer.eos_token = "<|pad|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "")
    model.generation_config.eos_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = make_config(model=str(folder), steps=0, new_tokens=12)
    compress(config)
    found = diagnose_run(config.output)
    assert causes(found)[0] == "broken template"
    assert "go on with the next turn" in found.findings[0].sentence
    assert any(name == "one that goes on" and "<|im_end|>" in text for name, text in found.findings[0].evidence)
