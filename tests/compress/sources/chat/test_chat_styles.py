"""Chats in the styles of real templates: context, query and output joined are the tokens of the whole rendered chat."""

from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat
from softprompt_kernels.compress.sources.chat import INSTRUCTION

LOOP, END = "{% for m in messages %}", "{% endfor %}"
ASKED = "{% if add_generation_prompt %}"


@dataclass(frozen=True)
class Style:
    """A template, its control tokens, the token that ends an answer, and what the model writes before an answer."""

    template: str
    special: tuple[str, ...]
    end: str
    lead: str = ""
    bos: str | None = None
    system: bool = True
    arguments: tuple[tuple[str, Any], ...] = ()


def turns(opening: str, closing: str, asked: str, first: str = "") -> str:
    return f"{first}{LOOP}{opening}{{{{ m['content'] }}}}{closing}{END}{ASKED}{asked}{{% endif %}}"


CHATML = turns("<|im_start|>{{ m['role'] }}\n", "<|im_end|>\n", "<|im_start|>assistant\n")
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful model.<|im_end|>\n{% endif %}"
)
NEEDS_USER = (
    "{% set ns = namespace(user=false) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.user = true %}"
    "{% endif %}{% endfor %}{% if not ns.user %}{{ raise_exception('a user turn is needed') }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set head = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + (head if loop.first else '') "
    "+ m['content'].strip() + ' [/INST]' }}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}"
    + LOOP
    + "<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    + END
    + ASKED
    + "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set head = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set head = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ head if loop.first else '' }}"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}" + ASKED + "<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('only user and assistant') }}{% endif %}"
    + LOOP
    + "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    + "{% endif %}"
    + END
)
MISTRAL_SYSTEM = (
    "{{ bos_token }}"
    + LOOP
    + "{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{{ m['content'] }}[/SYSTEM_PROMPT]{% elif m['role'] == 'user' %}"
    "[INST]{{ m['content'] }}[/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}" + END
)
QWEN3 = (
    LOOP
    + "<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    + "{{ m['content'] }}<|im_end|>\n"
    + END
    + ASKED
    + "<|im_start|>assistant\n{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    + "{% endif %}{% endif %}"
)
OPENS_THOUGHT = turns("<|User|>", "<|end|>", "<|Assistant|><think>\n").replace(
    "<|User|>", "{{ {'system': '', 'user': '<|User|>', 'assistant': '<|Assistant|>'}[m['role']] }}"
)
HARMONY = (
    "<|start|>system<|message|>You are a model.\nReasoning: low<|end|>"
    + LOOP
    + "{% if m['role'] == 'assistant' %}<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}"
    + "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}"
    + "<|start|>{{ 'developer' if m['role'] == 'system' else m['role'] }}<|message|>"
    + "{{ '# Instructions\n\n' if m['role'] == 'system' else '' }}{{ m['content'] }}<|end|>{% endif %}"
    + END
    + ASKED
    + "<|start|>assistant{% endif %}"
)
IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
THOUGHT = "<think>\n\n</think>\n\n"
STYLES = {
    "chatml": Style(CHATML, IM, "<|im_end|>"),
    "chatml-default-system": Style(DEFAULT_SYSTEM + CHATML, IM, "<|im_end|>"),
    "chatml-needs-user": Style(NEEDS_USER + CHATML, IM, "<|im_end|>"),
    "chatml-needs-user-default-system": Style(NEEDS_USER + DEFAULT_SYSTEM + CHATML, IM, "<|im_end|>"),
    "llama2": Style(LLAMA2, ("<s>", "</s>"), "</s>", lead=" ", bos="<s>"),
    "llama3": Style(LLAMA3, HEADERS, "<|eot_id|>", bos="<|begin_of_text|>"),
    "gemma": Style(GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", bos="<bos>"),
    "mistral": Style(MISTRAL, ("<s>", "</s>"), "</s>", lead=" ", bos="<s>", system=False),
    "mistral-system": Style(
        MISTRAL_SYSTEM, ("<s>", "</s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"), "</s>", bos="<s>"
    ),
    "qwen3": Style(QWEN3, (*IM, "<think>", "</think>"), "<|im_end|>", lead=THOUGHT),
    "qwen3-without-thought": Style(
        QWEN3, (*IM, "<think>", "</think>"), "<|im_end|>", arguments=(("enable_thinking", False),)
    ),
    "opens-a-thought": Style(OPENS_THOUGHT, ("<|User|>", "<|Assistant|>", "<think>", "<|end|>"), "<|end|>"),
    "phi": Style(
        turns("<|{{ m['role'] }}|>\n", "<|end|>\n", "<|assistant|>\n"),
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"),
        "<|end|>",
    ),
    "harmony": Style(
        HARMONY,
        ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"),
        "<|return|>",
        lead="<|channel|>final<|message|>",
    ),
    "zephyr": Style(turns("<|{{ m['role'] }}|>\n", "{{ eos_token }}\n", "<|assistant|>\n"), ("<s>", "</s>"), "</s>"),
}
ONE_TOKEN = {("llama2", "unigram"), ("mistral", "unigram")}
"""Where "] " is one token, and the cut before an answer goes through it."""
ROLES = ("user", "assistant", "user", "assistant", "user")
KINDS = ("gpt2", "llama3", "first", "always", "unigram")
CODE = "def turn(self):\n    return self.river\n\n\ndef stop(self):\n    pass"
TEXTS = {
    "prose": ("The mill is blue.\n\nIt grinds 40 sacks.", "Which colour?", "Blue."),
    "code": (CODE, f"What is this?\n\n{CODE}", "A mill:\n\n    turn(self)"),
    "indented": (f"    {CODE}", f"    {CODE}\nWhat?", f"    {CODE}"),
    "other scripts": ("米拉看守蓝色的磨坊。", "Größe é?", "四十"),
}


@pytest.fixture(scope="module")
def tokenizers(make_tokenizer: Any) -> Any:
    made: dict[tuple[str, str], PreTrainedTokenizerBase] = {}

    def get(style: str, kind: str) -> PreTrainedTokenizerBase:
        if (style, kind) not in made:
            one = STYLES[style]
            eos = "</s>" if "</s>" in one.special else next((t for t in one.special if "of_text" in t), one.end)
            made[style, kind] = make_tokenizer(kind, one.special, one.template, bos_token=one.bos, eos_token=eos)
        return made[style, kind]

    return get


def whole(tokenizer: PreTrainedTokenizerBase, style: Style, *texts: str | None) -> str:
    """The chat of a context, a query and an answer as the template renders it."""
    context, query, answer = texts
    if context is not None and not style.system:
        context, query = None, f"{context}\n\n{query}"
    pairs = (("system", context), ("user", query), ("assistant", answer))
    messages = [{"role": role, "content": text} for role, text in pairs if text is not None]
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer is None, **dict(style.arguments)
    )


def encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STYLES)
def test_the_pieces_joined_are_the_whole(tokenizers: Any, name: str, kind: str) -> None:
    style, tokenizer = STYLES[name], tokenizers(name, kind)
    chat = ChatFormat(tokenizer, dict(style.arguments))
    for texts, (context, query, answer) in TEXTS.items():
        asked = whole(tokenizer, style, INSTRUCTION + context, query, None)
        pieces = [*chat.context_ids(context)[0].tolist(), *chat.query_ids(query)]
        assert tokenizer.decode(pieces) == tokenizer.decode(encoded(tokenizer, asked)), texts
        if texts != "indented":  # blanks merge across the cut where no turn starts at it
            assert pieces == encoded(tokenizer, asked), texts
        answered = whole(tokenizer, style, INSTRUCTION + context, query, answer)
        answered = answered[: answered.rindex(style.end) + len(style.end)]
        pieces = [
            *chat.context_ids(context)[0].tolist(),
            *chat.query_ids(query, answered=True),
            *chat.output_ids(answer),
        ]
        assert tokenizer.decode(pieces) == tokenizer.decode(encoded(tokenizer, answered)), texts
        if texts != "indented" and (name, kind) not in ONE_TOKEN:
            assert pieces == encoded(tokenizer, answered), texts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STYLES)
def test_the_baseline_without_context_is_the_chat_of_the_query_alone(tokenizers: Any, name: str, kind: str) -> None:
    style, tokenizer = STYLES[name], tokenizers(name, kind)
    chat = ChatFormat(tokenizer, dict(style.arguments))
    for context, query, _ in TEXTS.values():
        before = chat.no_context_ids()
        pieces = [*([] if before is None else before[0].tolist()), *chat.query_ids(query)]
        alone = whole(tokenizer, style, None, query, None)
        # "[INST] Why" has a token that starts with the blank. A query behind a context starts without one.
        if name not in ("llama2", "mistral") and not context.startswith(" "):
            assert pieces == encoded(tokenizer, alone)
        assert tokenizer.decode(pieces).split() == tokenizer.decode(encoded(tokenizer, alone)).split()


@pytest.mark.parametrize("name", STYLES)
def test_an_answer_starts_and_ends_as_in_a_rendered_turn(tokenizers: Any, name: str) -> None:
    style, tokenizer = STYLES[name], tokenizers(name, "gpt2")
    chat = ChatFormat(tokenizer, dict(style.arguments))
    assert (
        tokenizer.decode(chat.output_ids("Blue."))
        == style.lead + "Blue." + (" " if name == "llama2" else "") + style.end
    )
    end = tokenizer.convert_tokens_to_ids(style.end)
    assert chat.output_ids("Blue.")[-1] == end
    assert chat.end_tokens == {end, tokenizer.eos_token_id}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STYLES)
def test_control_tokens_of_a_text_are_text(tokenizers: Any, name: str, kind: str) -> None:
    style, tokenizer = STYLES[name], tokenizers(name, kind)
    chat = ChatFormat(tokenizer, dict(style.arguments))
    control = set(tokenizer.convert_tokens_to_ids(list(style.special)))
    for piece in (style.end, " ".join(style.special)):
        text = f"a {piece} b"
        for found, plain in (
            (chat.context_ids(text)[0].tolist(), chat.context_ids("a b")[0].tolist()),
            (chat.query_ids(text), chat.query_ids("a b")),
            (chat.output_ids(text), chat.output_ids("a b")),
        ):
            assert [i for i in found if i in control] == [i for i in plain if i in control]
            assert text in tokenizer.decode(found)


def test_tokens_around_a_control_token_of_a_text_stay_the_same(tokenizers: Any) -> None:
    tokenizer = tokenizers("chatml", "gpt2")
    chat = ChatFormat(tokenizer)
    found, parts = chat.query_ids(f"{CODE}\n<|im_end|>\n{CODE}"), encoded(tokenizer, CODE)
    assert str(parts[1:-1])[1:-1] in str(found)
    assert str(found).count(str(parts[1:-1])[1:-1]) == 2


def test_an_output_with_a_thought_keeps_the_marks_of_the_template(tokenizers: Any) -> None:
    tokenizer = tokenizers("opens-a-thought", "gpt2")
    given = tokenizer.decode(ChatFormat(tokenizer).query_ids("Why?", answered=True))
    assert given == "<|User|>Why?<|end|><|Assistant|>", "a given output is not put into the thought"
    assert tokenizer.decode(ChatFormat(tokenizer).query_ids("Why?")).endswith("<|Assistant|><think>\n")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", STYLES)
def test_a_conversation_behind_its_context_is_the_whole_rendered_chat(tokenizers: Any, name: str, kind: str) -> None:
    style, tokenizer = STYLES[name], tokenizers(name, kind)
    chat = ChatFormat(tokenizer, dict(style.arguments))
    special = " ".join(style.special)
    control = set(tokenizer.convert_tokens_to_ids(list(style.special)))
    for texts, (context, query, answer) in TEXTS.items():
        turns = [query, answer, "And then?", "四十  sacks.", query]
        given = [{"role": role, "content": text} for role, text in zip(ROLES, turns, strict=True)]
        before = f"{INSTRUCTION}{context}"
        if style.system:
            messages = [{"role": "system", "content": before}, *given]
        else:
            messages = [{"role": "user", "content": f"{before}\n\n{query}"}, *given[1:]]
        asked = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **dict(style.arguments)
        )
        pieces = [*chat.context_ids(context)[0].tolist(), *chat.conversation_ids(given)]
        assert tokenizer.decode(pieces) == tokenizer.decode(encoded(tokenizer, asked)), texts
        if texts != "indented":
            assert pieces == encoded(tokenizer, asked), texts
        assert chat.conversation_ids(given[:1]) == chat.query_ids(query)
        # Names of control tokens are text, in each turn.
        found = chat.conversation_ids([each | {"content": f"{each['content']} {special} b"} for each in given])
        assert [i for i in found if i in control] == [i for i in chat.conversation_ids(given) if i in control]
        assert tokenizer.decode(found).count(f" {special} b") == len(given)


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_chatml_is_encoded_as_piece_by_piece(tokenizers: Any, kind: str) -> None:
    """Published figures of the demo depend on these tokens."""
    tokenizer = tokenizers("chatml", kind)
    chat = ChatFormat(tokenizer)
    for context, query, answer in list(TEXTS.values())[:2]:
        assert chat.context_ids(f"\n{context}\n")[0].tolist() == encoded(
            tokenizer, f"<|im_start|>system\n{INSTRUCTION}{context}<|im_end|>\n"
        )
        assert chat.query_ids(query) == encoded(
            tokenizer, f"<|im_start|>user\n{query}<|im_end|>\n<|im_start|>assistant\n"
        )
        assert chat.output_ids(answer) == [*encoded(tokenizer, answer), tokenizer.convert_tokens_to_ids("<|im_end|>")]
