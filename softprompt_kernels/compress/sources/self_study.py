"""Self-study: queries made from the context alone. The teacher then answers them with the context.

As in Cartridges (arXiv 2506.06266), the prompt is trained on what the teacher says about the context, so the queries
decide what the prompt keeps. Their variety is the limit, not the size of the prompt. There are three kinds:

- general requests that fit any text ("Who does what?", "Summarise …");
- questions about a phrase of the text: names, numbers and the longest words of every sentence, in many wordings;
- tasks about a sentence of the text: complete it, reword it, say what follows.

Templates, phrases and sentences are drawn without replacement, so that even a few queries cover the whole text.

Not every text has blanks between words and full stops behind sentences. Chinese, Japanese, Thai and others have no
blanks, and are counted and cut by characters. Rows of a table end with the line, and their fields count as words.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from softprompt_kernels.compress.sources.queries import Query
from softprompt_kernels.compress.sources.scripts import MARKS, UNSPACED

GENERAL = (
    "Summarise the text in one sentence.",
    "Summarise the text in a few sentences.",
    "What is this text about?",
    "List the people in the text.",
    "List the places in the text.",
    "List the most important numbers in the text.",
    "List the dates in the text and what happened on them.",
    "What are the main rules?",
    "What does a newcomer need to know?",
    "Tell me three facts from the text.",
    "Tell me a surprising detail from the text.",
    "How does it work?",
    "How did it begin?",
    "What is planned for the future?",
    "What went wrong in the past?",
    "Who is in charge?",
    "What does it cost?",
    "When is it open?",
    "What is forbidden, and why?",
    "What should I do first?",
    "Write a short advertisement based on the text.",
    "Write a quiz question about the text and answer it.",
    "Explain the text to a child.",
    "Write a letter to a friend about the text.",
    "Make a list of key points.",
    "Describe the place.",
    "Which names should I remember, and what do they stand for?",
    "What would a visitor find most interesting?",
    "Repeat the beginning of the text.",
    "Repeat the end of the text.",
    "How big, long, high or fast are the things in the text?",
    "Who does what?",
    "Where is each thing to be found?",
)

"""Requests that fit any text. Behind several texts, or parts of one, they have no single answer."""

ABOUT_PHRASE = (
    "What is {phrase}?",
    "Tell me about {phrase}.",
    "Who or what is {phrase}?",
    "What do you know about {phrase}?",
    "Where is {phrase}?",
    "Why is {phrase} important?",
    "What does the text say about {phrase}?",
    "How is {phrase} connected with the rest?",
    "When does {phrase} matter?",
    "Give me one fact about {phrase}.",
    "I have a question about {phrase}. What should I know?",
    "What happens with {phrase}?",
)

ABOUT_SENTENCE = (
    "Complete the sentence: {half}",
    "Is this true? {sentence}",
    "Explain this: {sentence}",
    "Say this in other words: {sentence}",
    "What comes after this in the text? {sentence}",
    "Ask a question whose answer is: {sentence}",
    "Continue: {half}",
)

_FULL_STOP = "。！？；｡．…।॥؟۔።༎။៕"  # of scripts that may have no blank behind it
_CLOSING = "」』”’）"
_SENTENCE_END = re.compile(
    rf"(?<=[.!?;:{_FULL_STOP}])\s+|(?<=[{_FULL_STOP}])(?![{_FULL_STOP}{_CLOSING}\s])"
    rf"|(?<=[{_FULL_STOP}][{_CLOSING}])\s*|\n+"
)
_RUN = re.compile(rf"[{UNSPACED}]+")
_FIELD = re.compile(r"[^,;|\t]+")
_WORD = re.compile(rf"(?:[^\W\d_][{MARKS}]*){{5,}}")  # vowel signs, as in Hindi, are marks and not letters
_UPPER = "A-ZÀ-ÖØ-ÞΑ-ΩЁА-Я"
_CAPITALISED = re.compile(rf"\b[{_UPPER}]\w+(?:[ -][{_UPPER}]\w+)*")
_NUMBER = re.compile(rf"\b\d[\d,.:]*(?:\s+\w[\w{MARKS}]*)?")
_LONG_WORDS = 3  # taken from each sentence
_SENTENCE_WORDS = 60  # longer sentences are cut
_SENTENCE_CHARACTERS = 480
_PIECE_CHARACTERS = 120  # of what is cut without a blank
_PHRASE_CHARACTERS = 60
_RUN_CHARACTERS = 8  # of a phrase in a script without blanks
_PIECE = re.compile(rf".{{1,{_PIECE_CHARACTERS - 1}}}[,;|、，；：)}}\]]|.{{1,{_PIECE_CHARACTERS}}}", re.DOTALL)


def self_study(context: str, count: int, seed: int = 0) -> list[Query]:
    """`count` different queries about a text; fewer if the text is too short for that many.

    Args:
        context: the text.
        count: 0 or more.
        seed: the same seed gives the same queries.

    Returns:
        Queries of the families "general", "phrase" and "sentence".
    """
    draw = random.Random(seed)
    sentences = split_sentences(context)
    general = list(GENERAL)
    draw.shuffle(general)
    about_phrase = _fill_templates(ABOUT_PHRASE, [{"phrase": phrase} for phrase in find_phrases(sentences)], draw)
    about_sentence = _fill_templates(ABOUT_SENTENCE, [_sentence_fields(sentence) for sentence in sentences], draw)
    chosen: dict[str, str] = {}
    # Of six queries one is general (as long as there are any), three are about phrases and two about sentences.
    phrase, sentence = ("phrase", about_phrase), ("sentence", about_sentence)
    turns = [("general", iter(general)), phrase, sentence, phrase, sentence, phrase]
    while turns and len(chosen) < count:
        family, source = turns.pop(0)
        text = next(source, None)
        if text is not None:
            chosen.setdefault(text, family)
            turns.append((family, source))
    return [Query(text, family=family) for text, family in chosen.items()]


def few_about_text(context: str, count: int, seed: int = 0) -> str | None:
    """A sentence for the user if less than half of the queries that were asked for are about the text, else None."""
    made = self_study(context, count, seed)
    about = sum(query.input not in GENERAL for query in made)
    if 2 * about >= count:
        return None
    return (
        f"selfstudy: {about} of the {count} queries asked for are about the text, {len(made) - about} fit any text. "
        "The text offers no more sentences and phrases; give questions of your own with --queries."
    )


def split_sentences(text: str) -> list[str]:
    """Sentences, headings and rows of at least three words. Long ones are cut, by words and by characters.

    Without the cut, a text without full stops, such as a table or a program, would be one sentence and every query
    about it would contain the whole text.
    """
    parts: list[str] = []
    for part in _SENTENCE_END.split(text):
        words = part.split()
        if len(words) <= _SENTENCE_WORDS and len(part) <= _SENTENCE_CHARACTERS:
            parts.append(part.strip())
            continue
        piece: list[str] = []
        for word in (one for uncut in words for one in _cut_word(uncut)):
            if len(piece) == _SENTENCE_WORDS or len(" ".join([*piece, word])) > _SENTENCE_CHARACTERS:
                parts.append(" ".join(piece))
                piece = []
            piece.append(word)
        parts.append(" ".join(piece))
    return [part for part in parts if _count_words(part) >= 3]


def _cut_word(word: str) -> list[str]:
    """A word, or the pieces of what is too long to be one: at separators, if there are any."""
    return [word] if len(word) <= _PIECE_CHARACTERS else _PIECE.findall(word)


def _count_words(part: str) -> int:
    """The words of a part. Where blanks do not tell: its fields, or half the characters of scripts without blanks."""
    words = len(part.split())
    if words >= 3:
        return words
    fields = sum(1 for field in _FIELD.findall(part) if field.strip())
    return max(words, fields, sum(map(len, _RUN.findall(part))) // 2)


def find_phrases(sentences: Sequence[str]) -> list[str]:
    """Names, numbers with the next word, and the longest words of each sentence, in order and without repeats.

    Of a script without blanks they are pieces of the longest runs of its characters.
    """
    found: dict[str, None] = {}
    for sentence in sentences:
        # A single capitalised word at the start of a sentence is rarely a name.
        names = [m.group() for m in _CAPITALISED.finditer(sentence) if m.start() or " " in m.group()]
        numbers = [m.group().rstrip(".,:") for m in _NUMBER.finditer(sentence)]
        words = sorted(_WORD.findall(_RUN.sub(" ", sentence)), key=len, reverse=True)[:_LONG_WORDS]
        runs = sorted(_RUN.findall(sentence), key=len, reverse=True)[:_LONG_WORDS]
        pieces = [run[start : start + _RUN_CHARACTERS] for run in runs for start in range(0, len(run), _RUN_CHARACTERS)]
        for phrase in (*names, *numbers, *words, *(piece for piece in pieces if len(piece) > 1)):
            found.setdefault(phrase[:_PHRASE_CHARACTERS])
    return list(found)


def _fill_templates(templates: Sequence[str], fields: Sequence[dict[str, str]], draw: random.Random) -> Iterator[str]:
    """Every template filled with every set of fields, in rounds: a round uses every set once, with a new template."""
    order = list(range(len(fields)))
    draw.shuffle(order)
    shift = {index: draw.randrange(len(templates)) for index in order}
    for turn in range(len(templates)):
        for index in order:
            yield templates[(shift[index] + turn) % len(templates)].format(**fields[index])


def _sentence_fields(sentence: str) -> dict[str, str]:
    words = sentence.split()
    few = len(words) < 3  # without blanks, half of the characters
    half = sentence[: max(1, len(sentence) // 2)] if few else " ".join(words[: max(2, len(words) // 2)])
    return {"sentence": sentence, "half": half}
