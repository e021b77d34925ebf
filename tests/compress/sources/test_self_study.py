"""Self-study: the requested number of different questions, reproducible by seed, from all parts of the text."""

import hashlib
from pathlib import Path

import pytest

from softprompt_kernels.compress.sources.self_study import (
    GENERAL,
    few_about_text,
    find_phrases,
    self_study,
    split_sentences,
)

SENTENCES = [
    "Mira Vale keeps the blue mill.",
    "It grinds 40 sacks of barley a day.",
    "The river Osk turns it.",
    "Visitors pay 3 crowns and {curly} braces.",
]
TEXT = "The Mill\n\n" + " ".join(SENTENCES)


def inputs(text: str, count: int, seed: int = 0) -> list[str]:
    queries = self_study(text, count, seed)
    assert all(query.output is None for query in queries)
    return [query.input for query in queries]


@pytest.mark.parametrize("count", [0, 1, 7, 64, 150])
def test_the_requested_number_of_different_queries(count: int) -> None:
    found = inputs(TEXT, count)
    assert len(found) == len(set(found)) == count


def test_the_seed_determines_the_queries() -> None:
    assert inputs(TEXT, 60, 3) == inputs(TEXT, 60, 3)
    assert inputs(TEXT, 60, 3) != inputs(TEXT, 60, 4)
    assert inputs(TEXT, 60, 3)[:20] == inputs(TEXT, 20, 3)


def test_many_queries_cover_every_sentence_phrase_and_general_request() -> None:
    found = inputs(TEXT, 100_000)
    for sentence in SENTENCES:
        assert any(sentence in query for query in found)
    for phrase in find_phrases(SENTENCES):
        assert f"What is {phrase}?" in found
    assert set(GENERAL) <= set(found)
    assert len(found) == len(set(found))


def test_even_a_few_queries_cover_every_sentence() -> None:
    found = inputs(TEXT, 24)
    for sentence in SENTENCES:
        assert any(" ".join(sentence.split()[:2]) in query for query in found)


def test_names_numbers_and_long_words_are_phrases() -> None:
    phrases = find_phrases(["Mira Vale keeps the Blue Mill.", "It grinds 1,400 sacks."])
    assert {"Mira Vale", "Blue Mill", "1,400 sacks", "keeps", "grinds"} <= set(phrases)
    assert "It" not in phrases


def test_sentences_have_at_least_three_words() -> None:
    assert split_sentences("The Mill\n\nIt is old. Yes! Who knows why? One two; three four five") == [
        "It is old.",
        "Who knows why?",
        "three four five",
    ]


def test_a_text_without_full_stops_is_cut_into_pieces() -> None:
    words = [f"word{index}" for index in range(1000)]
    found = inputs(" ".join(words), 100_000)
    assert max(len(query.split()) for query in found) < 80
    assert all(any(word in query for query in found) for word in words)


@pytest.mark.parametrize("text", ["", "   ", "Mill", "!!!", "a b c"])
def test_short_texts_give_fewer_queries(text: str) -> None:
    found = inputs(text, 500)
    assert len(found) == len(set(found)) >= len(GENERAL)


@pytest.mark.parametrize(
    "text",
    [
        "米拉看守蓝色的磨坊。它每天磨四十袋大麦。奥斯克河推动它。",
        "Мира держит синюю мельницу. Она мелет 40 мешков в день. Река Оск крутит её.",
        "ميرا تحرس الطاحونة الزرقاء. تطحن ٤٠ كيسا في اليوم.",
        "मीरा नीली चक्की रखती है। यह एक दिन में ४० बोरे पीसती है।",
        "🙂 🙂 🙂 {0} {phrase} %s \\1",
    ],
)
def test_other_scripts_and_special_characters_work(text: str) -> None:
    found = inputs(text, 60)
    assert len(found) == len(set(found)) >= len(GENERAL)


UNSPACED = {
    "Chinese": "米拉看守蓝色的磨坊。它每天磨四十袋大麦。奥斯克河推动它。游客付三个克朗。",
    "one Chinese sentence": "米拉看守蓝色的磨坊，它每天磨四十袋大麦，奥斯克河推动它，游客付三个克朗" * 20,
    "Japanese": "ミラは青い水車を守っている。「毎日四十袋の大麦をひく。」オスク川がそれを回す！",
    "Thai": "มิราดูแลโรงสีสีน้ำเงิน มันบดข้าวบาร์เลย์วันละสี่สิบกระสอบ แม่น้ำออสก์หมุนมัน",
    "Hindi": "मीरा नीली चक्की रखती है। यह एक दिन में ४० बोरे पीसती है।नदी उसे घुमाती है।",
    "CSV": "name,river,sacks\nMira,Osk,40\nTom,Ada,9\nBrook,Lee,12\n",
    "JSON": '{"name":"Mira","river":"Osk","sacks":40,"owner":"Brook"}' * 30,
    "one word": "abcdefghijklmnopqrstuvwxyz" * 100,
}


@pytest.mark.parametrize("text", UNSPACED.values(), ids=UNSPACED)
def test_texts_without_blanks_get_queries_about_them(text: str) -> None:
    found = inputs(text, 60)
    about = [query for query in found if query not in GENERAL]
    assert len(about) > 30
    assert few_about_text(text, 60) is None
    assert max(map(len, found)) < 600


def test_a_full_stop_needs_no_blank_behind_it() -> None:
    assert split_sentences("它每天磨四十袋大麦。「奥斯克河推动它。」游客付三个克朗！") == [
        "它每天磨四十袋大麦。",
        "「奥斯克河推动它。」",
        "游客付三个克朗！",
    ]
    assert split_sentences("It has 3.5 m. See a.b.c for more") == ["It has 3.5 m.", "See a.b.c for more"]


def test_rows_of_a_table_are_sentences() -> None:
    assert split_sentences("a,b,c\n1;2;3\nx\ty\tz\na,b\n") == ["a,b,c", "1;2;3", "x\ty\tz"]


def test_long_words_are_cut_at_separators() -> None:
    found = split_sentences(",".join(f"{index}:value" for index in range(300)))
    assert all(len(part) <= 480 for part in found)
    assert "".join(found).replace(" ", "").startswith("0:value,1:value")
    assert all(part.endswith(",") for part in found[:-1])


def test_words_with_vowel_signs_are_words() -> None:
    assert "घुमावदार" in find_phrases(["यह घुमावदार नदी है"])


@pytest.mark.parametrize(("text", "count"), [("Mill", 40), ("a b c", 200), ("!!!", 10)])
def test_few_queries_about_the_text_are_said(text: str, count: int) -> None:
    sentence = few_about_text(text, count)
    assert sentence is not None and f"of the {count} queries" in sentence and "--queries" in sentence
    assert few_about_text(text, 0) is None
    assert few_about_text(TEXT, 60) is None


def test_queries_about_published_texts_stay_the_same() -> None:
    """The figures of the demo and of the study were measured with them."""
    root = Path(__file__).parents[3]
    digests = {
        "demo/handbook.txt": "0c10e525973ed9841d1753591b5cd57a122625f6e88e0d8ba33fa8e7ddb4e69e",
        "benchmarks/study/texts/garden.txt": "69c020e1ec3aedb8ab77897b5184fbf678dcaf2e68ad92c7a335cf649cca5d5d",
        "LICENSE": "a5d0aea6393b184179caafb26fd09dd357bdbebf41a6fe1daecf9e8566c7c0f3",
    }
    for name, digest in digests.items():
        text = (root / name).read_text(encoding="utf-8")
        found = [inputs(text, count, seed) for count in (40, 256, 2000) for seed in (0, 1)]
        assert hashlib.sha256(repr(found).encode()).hexdigest() == digest, name
