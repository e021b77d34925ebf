"""What stands before a query when there is no context: what the chat template puts there, no less."""

from pathlib import Path

from transformers import AutoTokenizer

from softprompt_kernels.compress import ChatFormat

USER_TURN = "<|im_start|>user\n"


def rendered(tokenizer, query: str) -> list[int]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": query}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def before_and_query(tokenizer, query: str) -> list[int]:
    chat = ChatFormat(tokenizer)
    bare = chat.bare_ids()
    return ([] if bare is None else bare[0].tolist()) + chat.query_ids(query)


def test_a_template_that_adds_nothing_has_nothing_before_the_query(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    assert ChatFormat(tokenizer).bare_ids() is None
    assert before_and_query(tokenizer, "why?") == rendered(tokenizer, "why?")


def test_a_system_turn_that_the_template_brings_along_is_there(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    default = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    tokenizer.chat_template = default + tokenizer.chat_template
    assert ChatFormat(tokenizer).bare_ids() is not None
    assert before_and_query(tokenizer, "why?") == rendered(tokenizer, "why?")


def test_a_template_without_a_system_role_keeps_the_opening_of_the_user_turn(tiny_model_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}<|im_start|>"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    assert before_and_query(tokenizer, "why?") == rendered(tokenizer, "why?")
