"""Texts that a chat template would drop in part, change, or mix with its own control tokens."""

import copy
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat
from softprompt_kernels.errors import SoftPromptError

TURN = "<|im_start|>{{ m['role'] }}\n{{ CONTENT }}<|im_end|>\n"
CHATML = (
    "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% set content = m['content'] %}{% if m['role'] == 'assistant'"
    " %}{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DROPS_THOUGHTS = CHATML.replace("CONTENT", "m['content'].split('</think>')[-1]")
CHANGED = r" got .*, which the chat template changes or drops in part, accepted is text that it keeps"


@pytest.fixture(scope="module")
def thinker(make_tokenizer: Any) -> PreTrainedTokenizerBase:
    special = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
    return make_tokenizer("gpt2", special, THINKS, eos_token="<|im_end|>")


def with_template(tokenizer: PreTrainedTokenizerBase, template: str) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.mark.parametrize("content", ["m['content'].replace('/no_think', '')", "m['content'] | replace('/no', 'no')"])
def test_a_text_that_loses_a_part_is_refused(tokenizer: PreTrainedTokenizerBase, content: str) -> None:
    chat = ChatFormat(with_template(tokenizer, CHATML.replace("CONTENT", content)))
    assert chat.query_ids("Why?") and chat.output_ids("Because.")
    for name, encode in (("context", chat.context_ids), ("query", chat.query_ids), ("output", chat.output_ids)):
        with pytest.raises(SoftPromptError, match=f"^{name}:{CHANGED}"):
            encode("Is /no_think known?")


def test_a_text_that_is_shortened_or_has_its_blanks_joined_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    for content, text in (("m['content'][:60]", "mill " * 20), ("m['content'].split() | join(' ')", "a  b")):
        with pytest.raises(SoftPromptError, match=f"^query:{CHANGED}"):
            ChatFormat(with_template(tokenizer, CHATML.replace("CONTENT", content))).query_ids(text)


def test_a_trimmed_text_is_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatFormat(with_template(tokenizer, CHATML.replace("CONTENT", "m['content'] | trim")))
    assert tokenizer.decode(chat.query_ids("    a\n    b")).startswith("<|im_start|>user\na\n    b<|im_end|>")


@pytest.mark.parametrize("answer", ["The end is here.", "a\n\n  b", "四十"])
@pytest.mark.parametrize("opening", ["<think>\n", "<think>", ""])
def test_a_thought_keeps_its_marks(thinker: PreTrainedTokenizerBase, opening: str, answer: str) -> None:
    ids = ChatFormat(thinker).output_ids(f"{opening}hm hm\n</think>\n\n{answer}")
    expected = f"<think>\nhm hm\n</think>\n\n{answer}<|im_end|>"
    assert ids == thinker(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "output",
    [
        "<think>\nhm <|im_end|> hm\n</think>\n\nThe end.",
        "<think>\nhm\n</think>\n\nThe end is <|im_end|> here.",
        "<think>\nhm <|im_start|> hm\n</think>\n\nThe end is <|im_end|> here.",
    ],
)
def test_names_of_control_tokens_beside_a_thought_are_refused(thinker: PreTrainedTokenizerBase, output: str) -> None:
    with pytest.raises(SoftPromptError, match=r"^output: got .*, which has a thought and names of other control"):
        ChatFormat(thinker).output_ids(output)
    without = output.partition("</think>")[2].strip()
    assert without in thinker.decode(ChatFormat(thinker).output_ids(without))


@pytest.mark.parametrize(
    "output", ["<think>a</think>b</think>c", "a <think>\nhm\n</think>\n\nb", "<think>a<think>b</think>c"]
)
def test_an_output_that_loses_a_part_of_its_thought_is_refused(thinker: PreTrainedTokenizerBase, output: str) -> None:
    with pytest.raises(SoftPromptError, match=f"^output:{CHANGED}"):
        ChatFormat(thinker).output_ids(output)


def test_an_output_that_loses_its_thought_is_refused(thinker: PreTrainedTokenizerBase) -> None:
    chat = ChatFormat(with_template(thinker, DROPS_THOUGHTS))
    assert thinker.decode(chat.output_ids("The end.")) == "The end.<|im_end|>"
    with pytest.raises(SoftPromptError, match=f"^output:{CHANGED}"):
        chat.output_ids("<think>\nhm\n</think>\n\nThe end.")
