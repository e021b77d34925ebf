"""Forgetting: what a prefix changes on text of other subjects, against plain logits."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat, SilentReporter
from softprompt_kernels.compress.evaluate import forgetting as module
from softprompt_kernels.compress.evaluate.forgetting import GENERAL_TEXT, forgetting, general_text, pieces
from softprompt_kernels.compress.report.answer_table import forgetting_remark
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import prompted_logits
from softprompt_kernels.prompts import Prefix

TEXT = "Soup needs salt, and time. Tides follow the moon."


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    return ChatFormat(tokenizer)


def test_figures_equal_those_of_plain_logits(
    model: PreTrainedModel, chat: ChatFormat, context: Prefix, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PIECE_TOKENS", 20)
    monkeypatch.setattr(module, "_ROWS", 7)
    half = context.slice(0, 10)
    found = forgetting(model, chat, TEXT, None, {"full": context, "prompt": half}, SilentReporter())
    ids = torch.tensor(chat.tokenizer(TEXT)["input_ids"])
    parts = ids.split(20)
    assert found["tokens"] == len(ids) - len(parts)
    log_p = {}
    for key, prefix in (("none", None), ("full", context), ("prompt", half)):
        rows = [prompted_logits(model, part[None], prefix)[0, :-1].double().log_softmax(-1) for part in parts]
        log_p[key] = torch.cat(rows)
        labels = torch.cat([part[1:] for part in parts])
        nll = -log_p[key].gather(1, labels[:, None]).mean()
        assert found[f"perplexity_{key}"] == pytest.approx(float(nll.exp()), rel=1e-4)
    for key in ("full", "prompt"):
        kl = (log_p["none"].exp() * (log_p["none"] - log_p[key])).sum(-1).mean()
        assert found[f"kl_{key}"] == pytest.approx(float(kl), rel=1e-4)
    assert found["kl_full"] > 1e-3


def test_a_prefix_that_is_what_the_template_puts_there_breaks_nothing(
    model: PreTrainedModel, chat: ChatFormat, context: Prefix
) -> None:
    found = forgetting(model, chat, TEXT, context, {"prompt": context}, SilentReporter())
    assert found["kl_prompt"] == pytest.approx(0, abs=1e-6) and found["top1_agreement_prompt"] == 1
    assert found["perplexity_prompt"] == found["perplexity_none"]


def test_pieces_fit_behind_the_longest_prefix(model: PreTrainedModel, chat: ChatFormat) -> None:
    examples = pieces(model, chat, TEXT, 9)
    assert max(example.length + 1 for example in examples) == 9
    text = "".join(chat.tokenizer.decode([*e.input_ids, *e.output_ids]) for e in examples)
    assert TEXT.startswith(text) and len(text) > len(TEXT) - 2
    assert sum(e.length + 1 for e in pieces(model, chat, TEXT * 100, 512)) == module.MOST_TOKENS


def test_the_texts_that_come_with_the_package_and_of_the_user(tmp_path: Path) -> None:
    text = general_text(None)
    assert text.count("\n\n") == 7 and 3000 < len(text) < 4000
    assert general_text(GENERAL_TEXT) == text
    mine = tmp_path / "mine.txt"
    for content, reason in (("", "is empty"), (" a ", "is empty"), (None, "cannot be read")):
        mine.unlink(missing_ok=True)
        if content is not None:
            mine.write_text(content)
        with pytest.raises(SoftPromptError, match=f"general: .*mine.txt {reason}"):
            general_text(mine)


def test_a_text_of_one_token_is_refused(model: PreTrainedModel, chat: ChatFormat) -> None:
    with pytest.raises(SoftPromptError, match="general: got a text of one token"):
        pieces(model, chat, "a", 100)


def test_the_remark_names_the_figures() -> None:
    figures = {"tokens": 9, "perplexity_none": 4, "kl_full": 0.5, "perplexity_full": 6, "kl_prompt": 0.25}
    text = forgetting_remark({**figures, "perplexity_prompt": 5})
    assert "soft prompt KL 0.250, perplexity 5.00; full context KL 0.500, perplexity 6.00" in text
    assert "no context perplexity 4.00" in text and "9 tokens" in text
