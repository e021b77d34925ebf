"""Where a long text is cut."""

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat
from softprompt_kernels.compress.sequential.segments import cut

PARAGRAPHS = "\n\n".join(f"Part {n} is here. It has two sentences, or {n} more." for n in range(9))


@pytest.fixture
def chat(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    return ChatFormat(tokenizer)


@pytest.mark.parametrize("text", [PARAGRAPHS, "  \n\n" + PARAGRAPHS + "\n \n", "x" * 400, "é…字" * 60, "a b c"])
@pytest.mark.parametrize("most", [60, 130, 1000])
def test_segments_are_the_tokens_of_the_whole_text(chat: ChatFormat, text: str, most: int) -> None:
    whole = chat.context_ids(text)[0]
    segments = cut(chat, text, most, 25)
    tail = sum(start >= len(text.strip()) for start, _ in chat.context_tokens(text).spans)
    assert chat.tokenizer.decode(whole[-tail:]).startswith("<|im_end|>")
    bodies = [segment.ids[0, : segment.tokens - tail] for segment in segments]
    assert torch.equal(torch.cat([*bodies, segments[-1].ids[0, -tail:]]), whole)
    assert all(torch.equal(segment.ids[0, -tail:], whole[-tail:]) for segment in segments)
    assert max(segment.tokens for segment in segments) <= most
    assert "".join(segment.text for segment in segments) == text.strip()
    for segment in segments:
        pieces = [torch.tensor(ids) for ids, _ in segment.pieces]
        assert torch.equal(torch.cat([piece[: len(piece) - tail] for piece in pieces]), segment.ids[0, :-tail])
        assert "".join(piece for _, piece in segment.pieces) == segment.text
        assert max(len(piece) - tail for piece in pieces) <= 25


def test_cuts_are_at_the_ends_of_paragraphs_or_else_of_sentences(chat: ChatFormat) -> None:
    of_paragraphs = cut(chat, PARAGRAPHS, 200, 1000)
    assert len(of_paragraphs) > 2
    assert all(segment.text.startswith("Part") for segment in of_paragraphs)
    of_sentences = cut(chat, PARAGRAPHS.replace("\n\n", " "), 150, 1000)
    assert all(segment.text.rstrip().endswith(".") for segment in of_sentences)


def test_segments_are_about_equally_long(chat: ChatFormat) -> None:
    lengths = [len(segment.text) for segment in cut(chat, "x" * 1010, 250, 1000)]
    assert len(lengths) == 5 and max(lengths) < 1.5 * min(lengths)
