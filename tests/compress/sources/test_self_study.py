"""Self-study: the requested number of different questions, reproducible by seed, from all parts of the text."""

import pytest

from softprompt_kernels.compress.sources.self_study import GENERAL, find_phrases, self_study, split_sentences

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
