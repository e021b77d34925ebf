"""Which answers go on with the next turn."""

import pytest
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat
from softprompt_kernels.compress.diagnose.turns import TurnMarks
from softprompt_kernels.compress.sources.sequences import Example


@pytest.fixture
def copied(tokenizer: PreTrainedTokenizerBase, tiny_model_folder) -> PreTrainedTokenizerBase:
    """A tokenizer that a test may change."""
    return type(tokenizer).from_pretrained(tiny_model_folder)


def goes_on(tokenizer: PreTrainedTokenizerBase, answer: str) -> bool:
    chat = ChatFormat(tokenizer)
    ids = tuple(tokenizer(answer, add_special_tokens=False).input_ids)
    return TurnMarks.of(chat).goes_on(tokenizer, Example((1,), ids), chat.end_tokens)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("Ada Brook keeps it.<|im_end|>", False),
        ("Ada Brook keeps it", False),
        ("Ada.<|pad|> And more", True),
        ("Ada.\n<|im_start|>user\nWho?", True),
        ("Ada.\n<|im_start|>assistant\nBrook.", False),
        ("<|im_end|>", False),
    ],
)
def test_control_tokens_within_an_answer(tokenizer: PreTrainedTokenizerBase, answer: str, found: bool) -> None:
    assert goes_on(tokenizer, answer) == found


@pytest.mark.parametrize(("answer", "found"), [("Ada.\nusers may do so", False), ("Ada.\nuser\nWho?", True)])
def test_a_mark_that_is_only_a_word_is_a_line_of_its_own(
    copied: PreTrainedTokenizerBase, answer: str, found: bool
) -> None:
    copied.chat_template = copied.chat_template.replace("<|im_start|>", "")
    assert goes_on(copied, answer) == found


@pytest.mark.parametrize(
    ("answer", "found"),
    [(" Ada.\nQuestion: Who?", True), (" Ada.\n\n  Question: Who?", True), (" Ada has a Question: who?", False)],
)
def test_the_next_question_of_a_chat_without_a_template(
    copied: PreTrainedTokenizerBase, answer: str, found: bool
) -> None:
    copied.chat_template = None
    assert TurnMarks.of(ChatFormat(copied)).end_rendered, "plain text renders none, and needs none"
    assert goes_on(copied, answer) == found


def test_a_template_that_opens_parts_of_an_answer_with_control_tokens(copied: PreTrainedTokenizerBase) -> None:
    copied.chat_template = copied.chat_template.replace(
        "{{ message['content'] }}", "{% if message['role'] == 'assistant' %}<|pad|>{% endif %}{{ message['content'] }}"
    )
    assert not goes_on(copied, "<|pad|>Ada keeps it.<|im_end|>")
    assert goes_on(copied, "<|pad|>Ada keeps it.<|im_start|>user\nWho?")


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (None, ("<|im_start|>user", "<|im_start|>assistant", True)),
        (
            "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% else %}[INST] "
            "{{ m['content'] }} [/INST]{% endif %}{% endfor %}",
            ("[INST]", "[/INST]", False),
        ),
        (
            "{{ bos_token }}{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|pad|>\n{% endfor %}"
            "{% if add_generation_prompt %}assistant\n{% endif %}",
            ("user", "assistant", True),
        ),
    ],
)
def test_the_marks_of_a_template(
    copied: PreTrainedTokenizerBase, template: str | None, marks: tuple[str, str, bool]
) -> None:
    copied.chat_template = template or copied.chat_template
    found = TurnMarks.of(ChatFormat(copied))
    assert (found.question, found.opening, found.end_rendered) == marks
