"""The tokens before a query without a context: exactly what the chat template puts there."""

from pathlib import Path

from transformers import AutoTokenizer

from softprompt_kernels.compress import ChatFormat


def rendered(tokenizer, query: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": query}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def without_context(tokenizer, query: str) -> list[int]:
    chat = ChatFormat(tokenizer)
    ids = chat.no_context_ids()
    return ([] if ids is None else ids[0].tolist()) + chat.query_ids(query)


def test_a_template_that_adds_nothing_puts_nothing_before_the_query(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    assert ChatFormat(tokenizer).no_context_ids() is None
    assert without_context(tokenizer, "why?") == rendered(tokenizer, "why?")


def test_the_default_system_turn_of_a_template_is_kept(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    default = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    tokenizer.chat_template = default + tokenizer.chat_template
    assert ChatFormat(tokenizer).no_context_ids() is not None
    assert without_context(tokenizer, "why?") == rendered(tokenizer, "why?")


def test_a_template_without_a_system_role_keeps_the_opening_of_the_user_turn(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}<|im_start|>"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    assert without_context(tokenizer, "why?") == rendered(tokenizer, "why?")
