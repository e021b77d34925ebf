"""Text in pieces: together they are the text of all tokens, no piece has half a character, and stop strings cut."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models

from softprompt_kernels.serve.text import AnswerText, StopStrings, TokenText

WORDS = "naïve 漢字 😀👩‍👩‍👧 ok \ufffd end"


def of_bytes(tokens: list[int]) -> str:
    """As the decoder of a byte-level tokenizer does it."""
    return bytes(tokens).decode(errors="replace")


def with_fallback(tokens: list[int]) -> str:
    """As tokenizers with byte fallback do it: a run of bytes that are no text gives one mark for each byte."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁the": 256, "字": 257}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made.decode(tokens)


def pieces(tokens: list[int], decode) -> list[str]:
    text = TokenText(decode)
    return [*(text.put(token) for token in tokens), text.rest()]


@pytest.mark.parametrize("decode", [of_bytes, with_fallback])
def test_characters_of_several_tokens_come_whole(decode):
    found = pieces(list(WORDS.encode()), decode)
    assert "".join(found) == WORDS
    assert all("\ufffd" not in piece for piece in found[:-8])
    assert max(map(len, found)) <= 2, "text comes as soon as it is whole"


def test_tokens_of_whole_characters_between_bytes():
    tokens = [256, *"é".encode(), 257, 256, *"漢".encode()]
    assert "".join(pieces(tokens, with_fallback)) == " theé字 the漢"


def test_random_bytes_give_the_text_of_all_of_them_at_bounded_cost():
    draw, longest = random.Random(0), 0

    def decode(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return of_bytes(tokens)

    for length in (1, 7, 300):
        tokens = [draw.randrange(256) for _ in range(length)]
        assert "".join(pieces(tokens, decode)) == of_bytes(tokens)
    assert "".join(pieces([0x80] * 500 + [65], decode)) == of_bytes([0x80] * 500 + [65])
    assert longest < 40


@pytest.mark.parametrize(
    ("stops", "given", "expected"),
    [
        (["END"], ["a E", "N", "D b"], "a "),
        (["END"], ["a EN", "", "X E", "N"], "a ENX EN"),
        (["b", "abc"], ["xa", "bc"], "x"),  # the one that begins first
        (["aab"], ["a", "a", "a", "b", "c"], "a"),
        (["\n\n"], ["one\n", "two\n", "\nthree"], "one\ntwo"),
        ([], ["a", "b"], "ab"),
    ],
)
def test_stop_strings_cut_wherever_pieces_end(stops, given, expected):
    text = StopStrings(stops)
    found = [text.put(piece) for piece in given]
    assert "".join(found) + text.rest() == expected
    assert text.found == (expected != "".join(given))


def test_a_stop_string_of_characters_of_several_tokens():
    text, found = AnswerText(of_bytes, ["字😀"]), []
    for token in "漢字 字😀 rest".encode():
        found.append(text.put(token))
        if text.stopped:
            break
    assert "".join(found) == "漢字 "
    assert "字" not in found[-1]
