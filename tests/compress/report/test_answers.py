"""The page of answers: questions and answers stand beside each other, and nothing in them is taken for Markdown."""

import re

from softprompt_kernels.compress.report.answers import WIDTH, Comparison, answers_page, comparison_text


def code_blocks(page: str) -> list[str]:
    """The content of the code blocks, each of which ends at the first line that is its own fence."""
    return [content for _, content in re.findall(r"^(`{3,})text\n(.*?)\n\1$", page, flags=re.DOTALL | re.MULTILINE)]


def test_the_answers_stand_below_their_question() -> None:
    text = comparison_text(Comparison("Who?\nAnd when?", {"full context": "Mira\nin May", "soft prompt": ""}))
    assert text.splitlines() == [
        "> Who?",
        "> And when?",
        "  full context | Mira",
        "               | in May",
        "  soft prompt  |",
    ]


def test_a_page_has_a_section_for_each_set_and_a_block_for_each_question() -> None:
    same, other = {"full context": "Mira", "soft prompt": "Mira"}, {"full context": "Mira", "soft prompt": "Ada"}
    page = answers_page({"held-out": [Comparison("Who?", same), Comparison("Who else?", other)], "test": []}, 48, 0.5)
    assert re.findall("^## .*", page, flags=re.MULTILINE) == ["## Held-out queries", "## Test queries"]
    assert "Questions: 2. Word for word the same answer: 1." in page
    assert "has at most 48 tokens" in page
    assert code_blocks(page) == [
        comparison_text(Comparison("Who?", same)),
        comparison_text(Comparison("Who else?", other)),
    ]


def test_markdown_in_a_question_or_an_answer_stays_in_its_block() -> None:
    answers = {"full context": "```\n# not a heading\n````text\n<b>", "soft prompt": "\u2028```\r````\x0b`````"}
    page = answers_page({"test": [Comparison("`````\n* what?", answers), Comparison("next", answers)]}, 8, 0.0)
    first, second = code_blocks(page)
    assert first.startswith("> `````\n> * what?\n  full context | ```\n")
    assert second.startswith("> next\n")
    assert page.count("\n``````text\n") == page.count("\n``````\n") == 2


def test_control_characters_are_replaced() -> None:
    page = answers_page({"test": [Comparison("a\x00b", {"soft prompt": "c\x1b[2Jd\te"})]}, 8, 0.0)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", page)
    assert "> a\ufffdb" in page and "c\ufffd[2Jd" in page


def test_long_lines_are_wrapped_on_the_page_and_lose_no_word() -> None:
    words = [f"word{index}" for index in range(200)]
    (block,) = code_blocks(answers_page({"test": [Comparison("Say all.", {"soft prompt": " ".join(words)})]}, 8, 0.0))
    lines = block.splitlines()[1:]
    assert len(lines) > 10 and max(len(line.partition(" | ")[2]) for line in lines) <= WIDTH
    assert re.findall(r"word\d+", block) == words
