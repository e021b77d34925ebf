"""A conversation without a terminal: each answer is that of the model on the rendered chat behind the prefix."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from softprompt_kernels.cli.chat import session as module
from softprompt_kernels.cli.chat.session import Session
from softprompt_kernels.cli.commands.generate import generation_config
from softprompt_kernels.compress import ChatFormat, load_model
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, generate
from softprompt_kernels.prompts import Prefix

TEXT = "The red house by the river is number seven."
Make = Callable[..., Session]


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path) -> tuple[PreTrainedModel, ChatFormat, Prefix]:
    """The model, its chat format, and a captured text in the place of a prompt."""
    model, tokenizer = load_model(str(tiny_model_folder))
    chat = ChatFormat(tokenizer)
    return model, chat, capture(model, chat.context_ids(TEXT))


@pytest.fixture
def session(loaded: tuple[PreTrainedModel, ChatFormat, Prefix]) -> Iterator[Make]:
    model, chat, prefix = loaded

    def make(temperature: float = 0.0, seed: int = 0, new_tokens: int = 8, ends: list[int] | None = None) -> Session:
        settings = generation_config(model, chat, new_tokens, temperature)
        settings.eos_token_id = ends if ends is not None else settings.eos_token_id
        return Session(model, chat, {"prompt": lambda: prefix, "nothing": lambda: None}, settings, seed)

    state = torch.get_rng_state()
    yield make
    torch.set_rng_state(state)


def by_hand(loaded: tuple[PreTrainedModel, ChatFormat, Prefix], *texts: str, prefix: bool = True) -> str:
    """The greedy answer of 8 tokens to the chat that the template renders."""
    model, chat, captured = loaded
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    text = chat.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([chat.tokenizer(text, add_special_tokens=False)["input_ids"]])
    found = generate(model, ids, captured if prefix else None, max_new_tokens=8, do_sample=False)
    return chat.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_the_answer_to_a_second_question_is_that_of_the_rendered_chat(session: Make, loaded) -> None:
    one, parts = session(), []
    first = one.ask("Who owns it?").answer
    second = one.ask("And where?", parts.append).answer
    assert first.text == by_hand(loaded, "Who owns it?")
    assert second.text == by_hand(loaded, "Who owns it?", first.text, "And where?")
    assert second.text != by_hand(loaded, "And where?")
    assert "".join(parts).strip() == second.text and (second.left_out, second.end) == (0, "length")


def test_each_token_is_read_once(session: Make, loaded, monkeypatch) -> None:
    read: list[int] = []

    def counted(model, ids, *options, **more):
        read.append(ids.shape[1])
        return capture(model, ids, *options, **more)

    monkeypatch.setattr(module, "capture", counted)
    one, texts = session(), [f"{word}, who owns it?" for word in ("First", "Then", "And")]
    for text in texts:
        one.ask(text)
    whole = loaded[1].conversation_ids(one.messages()[:-1])
    assert len(read) == 3 and sum(read) == len(whole) - 1
    assert one.undo().question == texts[2]
    again = one.ask(texts[2]).answer
    assert sum(read) == len(whole) - 1, "asked again: all of it is known"
    monkeypatch.setattr(module, "_LARGE", -1)
    other = session()
    assert [other.ask(text).answer for text in texts][2] == again and len(read) == 3
    one.reset()
    assert one.turns == [] and one.ask(texts[0]).answer == other.turns[0].answer


def test_the_turns_stay_when_the_prefix_changes(session: Make, loaded) -> None:
    one = session()
    first = one.ask("Who owns it?").answer
    one.read("nothing")
    second = one.ask("And where?")
    assert second.read == "nothing"
    assert second.answer.text == by_hand(loaded, "Who owns it?", first.text, "And where?", prefix=False)
    assert [message["role"] for message in one.messages()] == ["user", "assistant"] * 2
    assert one.messages()[3] == {
        "role": "assistant",
        "content": second.answer.text,
        "read": "nothing",
        "seed": 1,
        "end": "length",
    }


def test_a_comparison_repeats_the_last_answer_and_changes_nothing(session: Make) -> None:
    one = session(temperature=1.0, seed=5)
    one.ask("Who owns it?")
    last = one.ask("And where?")
    found = one.compare()
    assert list(found) == ["prompt", "nothing"]
    assert found["prompt"] == last.answer and found["nothing"] != last.answer
    other = one.compare("Why?")
    assert len(one.turns) == 2 and one.ask("Why?").answer == other["prompt"]
    assert one.undo().question == "Why?" and one.ask("Why?").answer != other["prompt"], "asked again: another sample"


def test_there_is_nothing_to_compare_before_the_first_question(session: Make) -> None:
    with pytest.raises(SoftPromptError, match="no question yet"):
        session().compare()
    assert session().undo() is None


def test_an_answer_that_is_stopped_is_kept(session: Make, loaded) -> None:
    one, calls = session(), iter([False, False, True])
    parts: list[str] = []
    first = one.ask("Who owns it?", parts.append, lambda: next(calls)).answer
    assert first.end == "stopped" and first.text and by_hand(loaded, "Who owns it?").startswith(first.text)
    assert len(first.text) < len(by_hand(loaded, "Who owns it?")) and "".join(parts).strip() == first.text
    assert one.ask("And where?").answer.text == by_hand(loaded, "Who owns it?", first.text, "And where?")
    assert list(one.compare(stopped=lambda: True)) == ["prompt"], "the rest is left out"


def test_the_token_that_ends_an_answer_is_neither_shown_nor_kept(session: Make, loaded) -> None:
    model, chat, prefix = loaded
    ids = torch.tensor([chat.query_ids("Who owns it?")])
    third = int(generate(model, ids, prefix, max_new_tokens=3, do_sample=False)[0, -1])
    parts: list[str] = []
    answer = session(ends=[third]).ask("Who owns it?", parts.append).answer
    assert answer.end == "end" and by_hand(loaded, "Who owns it?").startswith(answer.text)
    assert "".join(parts).strip() == answer.text and len(answer.text) < len(by_hand(loaded, "Who owns it?"))


def test_the_oldest_turns_are_left_out_when_the_window_is_full(session: Make, loaded) -> None:
    one = session()
    texts = [f"{number} {'and so on ' * 8}?" for number in range(5)]
    turns = [one.ask(text) for text in texts]
    dropped = [turn.answer.left_out for turn in turns]
    assert dropped[0] == 0 and dropped == sorted(dropped) and 0 < dropped[-1] < 4
    newest = [text for turn in turns[dropped[-1] : -1] for text in (turn.question, turn.answer.text)]
    assert turns[-1].answer.text == by_hand(loaded, *newest, texts[-1])
    one.read("nothing")
    assert one.compare("Why?")["nothing"].left_out < one.compare("Why?")["prompt"].left_out
    with pytest.raises(SoftPromptError, match=r"question: it has \d+ tokens .* the model's window of 512 has 512 left"):
        one.ask("so " * 200)
    assert len(one.turns) == 5


def test_a_question_without_a_word_is_refused(session: Make) -> None:
    with pytest.raises(SoftPromptError, match="got an empty text"):
        session().ask(" \n")
