"""Conversations: thoughts of earlier answers, texts that a template changes, and messages that are refused."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat
from softprompt_kernels.errors import SoftPromptError
from tests.compress.sources.chat.test_chat_refused_texts import CHATML, DROPS_THOUGHTS, THINKS

THOUGHT = "<think>\nhm hm\n</think>\n\n"
LAST_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set head = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "<|im_start|>{{ m['role'] }}\n{{ head if loop.last else '' }}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(make_tokenizer: Any) -> PreTrainedTokenizerBase:
    special = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    return make_tokenizer("gpt2", special, THINKS, eos_token="<|im_end|>")


def with_template(tokenizer: PreTrainedTokenizerBase, content: str) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template = content if "CONTENT" not in content else content.replace("CONTENT", "m['content']")
    return other


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def joined(tokenizer: PreTrainedTokenizerBase, *texts: str) -> str:
    return tokenizer.decode(ChatFormat(tokenizer).conversation_ids(turns(*texts)))


@pytest.mark.parametrize("answer", ["Blue.", "Say <|im_end|> twice <|im_start|>.", ""])
def test_a_template_may_leave_out_the_thoughts_of_earlier_answers(
    thinker: PreTrainedTokenizerBase, answer: str
) -> None:
    dropping = with_template(thinker, DROPS_THOUGHTS)
    found = joined(dropping, "Why?", THOUGHT + answer, "And?")
    turn = f"<|im_start|>assistant\n{answer}<|im_end|>\n"
    assert found.replace("\n\n", "") == joined(dropping, "Why?", answer, "And?") and turn in found.replace("\n\n", "")
    ends = dropping.convert_tokens_to_ids("<|im_end|>")
    assert ChatFormat(dropping).conversation_ids(turns("Why?", THOUGHT + answer, "And?")).count(ends) == 3


def test_a_thought_keeps_its_marks_where_the_template_shows_it(thinker: PreTrainedTokenizerBase) -> None:
    ids = ChatFormat(thinker).conversation_ids(turns("Why?", f"{THOUGHT}Blue.", "And?"))
    messages = turns("Why?", f"{THOUGHT}Blue.", "And?")
    chat = thinker.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ids == thinker(chat, add_special_tokens=False)["input_ids"]
    with pytest.raises(SoftPromptError, match=r"messages\[1\]: got .*, which has a thought and names of other control"):
        ChatFormat(thinker).conversation_ids(turns("Why?", f"{THOUGHT}Blue <|im_end|>.", "And?"))


def test_the_context_is_first_where_a_template_puts_the_system_turn_last(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatFormat(with_template(tokenizer, LAST_SYSTEM))
    ids = [*chat.context_ids("The mill.")[0].tolist(), *chat.conversation_ids(turns("Why?", "So.", "And?"))]
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nAnswer from this text.\n\nThe mill.\n\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("number", [0, 2])
def test_a_text_of_the_user_that_loses_a_part_is_refused(tokenizer: PreTrainedTokenizerBase, number: int) -> None:
    chat = ChatFormat(with_template(tokenizer, CHATML.replace("CONTENT", "m['content'].replace('/no_think', '')")))
    texts = ["Why?", "Is /no_think known?", "And?"]
    assert chat.conversation_ids(turns(*texts)), "what a template makes of an answer is accepted"
    texts[number] = "Is /no_think known?"
    with pytest.raises(SoftPromptError, match=rf"messages\[{number}\]: got 'Is /no_think known\?', which the chat"):
        chat.conversation_ids(turns(*texts))


def test_a_last_text_that_changes_the_opening_of_the_answer_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    switched = tokenizer.chat_template + "{% if '/quiet' in messages[-1]['content'] %}Sh. {% endif %}"
    chat = ChatFormat(with_template(tokenizer, switched))
    with pytest.raises(SoftPromptError, match=r"messages\[2\]: got '/quiet Why\?', which the chat template changes"):
        chat.conversation_ids(turns("/quiet?", "So.", "/quiet Why?"))


def test_a_text_may_have_the_stand_in_for_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    found = joined(tokenizer, "«a text goes here»", "«a text goes here»»", "And «a text goes here» so?")
    assert found.count("«a text goes here»") == 3


def test_a_template_of_one_turn_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    single = "{% if messages | length > 3 %}{{ raise_exception('one turn') }}{% endif %}" + tokenizer.chat_template
    chat = ChatFormat(with_template(tokenizer, single))
    assert chat.conversation_ids(turns("Why?")) == chat.query_ids("Why?")
    with pytest.raises(SoftPromptError, match="messages: the chat template does not render several turns as it does"):
        chat.conversation_ids(turns("Why?", "So.", "And?", "Yes.", "Where?"))


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], r"messages: got none"),
        (turns("Why?", "So."), r"messages: the last one is of the role 'assistant', accepted is 'user'"),
        (turns("Why?", "So.")[1:], r"messages\[0\]: got the role 'assistant', accepted is 'user'"),
        (turns("Why?") * 2, r"messages\[1\]: got the role 'user', accepted is 'assistant'"),
        ([{"role": "system", "content": "Be kind."}], r"messages\[0\]: got the role 'system', .* stands where"),
        ([{"content": "Why?"}], r"messages\[0\]: got the role None"),
        ([{"role": "user"}], r"messages\[0\]: got a content of type NoneType, accepted is text"),
        (turns("Why?", "So.", " \n"), r"messages\[2\]: got an empty text"),
    ],
)
def test_messages_that_are_no_conversation_are_refused(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], error: str
) -> None:
    with pytest.raises(SoftPromptError, match=error):
        ChatFormat(tokenizer).conversation_ids(messages)
