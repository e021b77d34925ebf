"""Self-study: queries made from the context alone. The teacher then answers them with the context.

As in Cartridges (arXiv 2506.06266), the prompt is trained on what the teacher says about the context, so the queries
decide what the prompt keeps. Their variety is the limit, not the size of the prompt. There are three kinds:

- general requests that fit any text ("Who does what?", "Summarise …");
- questions about a phrase of the text: names, numbers and the longest words of every sentence, in many wordings;
- tasks about a sentence of the text: complete it, reword it, say what follows.

Templates, phrases and sentences are drawn without replacement, so that even a few queries cover the whole text.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence

from softprompt_kernels.compress.sources.queries import Query

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

_SENTENCE_END = re.compile(r"(?<=[.!?;:。！？])\s+|\n+")
_CAPITALISED = re.compile(r"\b[A-Z]\w+(?:[ -][A-Z]\w+)*")
_NUMBER = re.compile(r"\b\d[\d,.:]*(?:\s+\w+)?")
_LONG_WORDS = 3  # taken from each sentence
_SENTENCE_WORDS = 60  # longer sentences are cut


def self_study(context: str, count: int, seed: int = 0) -> list[Query]:
    """`count` different queries about a text; fewer if the text is too short for that many.

    Args:
        context: the text.
        count: 0 or more.
        seed: the same seed gives the same queries.
    """
    draw = random.Random(seed)
    sentences = split_sentences(context)
    general = list(GENERAL)
    draw.shuffle(general)
    about_phrase = _fill_templates(ABOUT_PHRASE, [{"phrase": phrase} for phrase in find_phrases(sentences)], draw)
    about_sentence = _fill_templates(ABOUT_SENTENCE, [_sentence_fields(sentence) for sentence in sentences], draw)
    chosen: dict[str, None] = {}
    # Of six queries one is general (as long as there are any), three are about phrases and two about sentences.
    turns = [iter(general), about_phrase, about_sentence, about_phrase, about_sentence, about_phrase]
    while turns and len(chosen) < count:
        source = turns.pop(0)
        text = next(source, None)
        if text is not None:
            chosen.setdefault(text)
            turns.append(source)
    return [Query(text) for text in chosen]


def split_sentences(text: str) -> list[str]:
    """Sentences and headings of at least three words. Sentences of more than `_SENTENCE_WORDS` words are cut.

    Without the cut, a text without full stops, such as a table or a program, would be one sentence and every query
    about it would contain the whole text.
    """
    parts = []
    for part in _SENTENCE_END.split(text):
        words = part.split()
        if len(words) <= _SENTENCE_WORDS:
            parts.append((part.strip(), len(words)))
            continue
        for start in range(0, len(words), _SENTENCE_WORDS):
            piece = words[start : start + _SENTENCE_WORDS]
            parts.append((" ".join(piece), len(piece)))
    return [part for part, count in parts if count >= 3]


def find_phrases(sentences: Sequence[str]) -> list[str]:
    """Names, numbers with the next word, and the longest words of each sentence, in order and without repeats."""
    found: dict[str, None] = {}
    for sentence in sentences:
        # A single capitalised word at the start of a sentence is rarely a name.
        names = [m.group() for m in _CAPITALISED.finditer(sentence) if m.start() or " " in m.group()]
        numbers = [m.group().rstrip(".,:") for m in _NUMBER.finditer(sentence)]
        words = sorted(re.findall(r"[^\W\d_]{5,}", sentence), key=len, reverse=True)[:_LONG_WORDS]
        for phrase in (*names, *numbers, *words):
            found.setdefault(phrase)
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
    return {"sentence": sentence, "half": " ".join(words[: max(2, len(words) // 2)])}
