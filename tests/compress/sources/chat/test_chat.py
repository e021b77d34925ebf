"""The tokens of context and query: together they are exactly the chat that the template renders."""

import copy

import pytest
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress.sources.chat import INSTRUCTION, ChatFormat
from softprompt_kernels.compress.text_file import trim
from softprompt_kernels.errors import SoftPromptError

CONTEXT, QUERY = "The mill is blue.", "Which colour?"
TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
REFUSES_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% endif %}" + TURN + "{% endfor %}" + OPENING
)
SYSTEM_INTO_USER = (
    "{{ bos_token }}{% set ns = namespace(first='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{% set ns.first = m['content'] + '\n\n' %}{% else %}<|im_start|>{{ m['role'] }}\n{{ ns.first + m['content'] }}"
    "<|im_end|>\n{% endif %}{% endfor %}" + OPENING
)
DROPS_SYSTEM = "{% for m in messages %}{% if m['role'] != 'system' %}" + TURN + "{% endif %}{% endfor %}" + OPENING


def with_template(tokenizer: PreTrainedTokenizerBase, template: str | None) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def rendered(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def joined(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    chat = ChatFormat(tokenizer)
    ids = chat.context_ids(CONTEXT)
    assert ids.shape[0] == 1
    return [*ids[0].tolist(), *chat.query_ids(QUERY)]


SYSTEM_AND_USER = [{"role": "system", "content": INSTRUCTION + CONTEXT}, {"role": "user", "content": QUERY}]
ONE_USER = [{"role": "user", "content": f"{INSTRUCTION}{CONTEXT}\n\n{QUERY}"}]


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        pytest.param("own", SYSTEM_AND_USER, id="system-turn"),
        pytest.param(
            "{{ bos_token }}{% for m in messages %}" + TURN + "{% endfor %}" + OPENING, SYSTEM_AND_USER, id="bos"
        ),
        pytest.param(SYSTEM_INTO_USER, SYSTEM_AND_USER, id="system-merged-into-the-user-turn"),
        pytest.param(REFUSES_SYSTEM, ONE_USER, id="raises-for-system"),
        pytest.param(DROPS_SYSTEM, ONE_USER, id="drops-system"),
    ],
)
def test_context_and_query_together_are_the_rendered_chat(
    tokenizer: PreTrainedTokenizerBase, template: str, messages: list[dict[str, str]]
) -> None:
    chosen = tokenizer if template == "own" else with_template(tokenizer, template)
    assert joined(chosen) == rendered(chosen, messages)


def test_a_query_is_a_whole_user_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = ChatFormat(tokenizer)
    assert chat.query_ids(QUERY) == rendered(tokenizer, [{"role": "user", "content": QUERY}])
    text = tokenizer.decode(chat.context_ids(CONTEXT)[0])
    assert text.endswith(f"{CONTEXT}<|im_end|>\n")


def test_bos_occurs_once_and_belongs_to_the_context(tokenizer: PreTrainedTokenizerBase) -> None:
    chosen = with_template(tokenizer, REFUSES_SYSTEM.replace("<|im_start|>", "").replace("<|im_end|>", ""))
    chat = ChatFormat(chosen)
    assert chat.context_ids(CONTEXT)[0].tolist().count(chosen.bos_token_id) == 1
    assert chat.context_ids(CONTEXT)[0, 0] == chosen.bos_token_id
    assert chosen.bos_token_id not in chat.query_ids(QUERY)


@pytest.mark.parametrize("bos", ["<|im_start|>", None])
def test_without_a_template_question_and_answer_follow_the_text(
    tokenizer: PreTrainedTokenizerBase, bos: str | None
) -> None:
    plain = with_template(tokenizer, None)
    plain.bos_token = bos
    whole = f"{bos or ''}{INSTRUCTION}{CONTEXT}\n\nQuestion: {QUERY}\nAnswer:"
    assert joined(plain) == plain(whole, add_special_tokens=False)["input_ids"]
    chat = ChatFormat(plain)
    assert plain.decode(chat.query_ids(QUERY)) == f"Question: {QUERY}\nAnswer:"
    assert plain.decode(chat.output_ids("Blue.")) == " Blue.<|im_end|>"


def test_an_answer_ends_with_the_end_token_and_has_no_blank_where_a_turn_opens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = ChatFormat(tokenizer).output_ids("  Blue. ")
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "Blue."
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert ChatFormat(endless).output_ids("Blue.") == ids, "the template still ends the turn"
    endless.chat_template = None
    assert ChatFormat(endless).output_ids("Blue.") == endless(" Blue.", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("\n \n    def f():\n        pass\n\n", "    def f():\n        pass"),
        ("\tx\n\ty ", "\tx\n\ty"),
        ("  Why? \n", "Why?"),
        ("\n" + 33 * " " + "Title\n\nText", "Title\n\nText"),
        (" \n ", ""),
    ],
)
def test_the_first_of_several_lines_keeps_its_indentation(text: str, kept: str) -> None:
    assert trim(text) == kept


@pytest.mark.parametrize("text", ["", " \n\t "])
def test_an_empty_context_is_refused(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    with pytest.raises(SoftPromptError, match="context: got an empty text"):
        ChatFormat(tokenizer).context_ids(text)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('never\nat all') }}", r" \(never at all\)$"),
        ("nothing of it", "intact$"),
        ("{% broken", r" \(.*'broken'.*\)$"),
        (
            "{% for m in messages %}{% if m['role'] == 'user' %}{{ 1 / 0 }}{% endif %}{% endfor %}",
            r" \(division by zero",
        ),
    ],
)
def test_a_template_that_drops_the_turns_is_refused(
    tokenizer: PreTrainedTokenizerBase, template: str, reason: str
) -> None:
    with pytest.raises(SoftPromptError, match=f"tokenizer: its chat template keeps neither .*{reason}"):
        ChatFormat(with_template(tokenizer, template))


IN_PARTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% else %}<image>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}" + OPENING
)


@pytest.mark.parametrize(
    "template",
    [
        IN_PARTS.replace("{% else %}<image>", ""),
        IN_PARTS,
        IN_PARTS.replace("m['content'] %}", "m['content'] if part.type != 'image' %}"),
        IN_PARTS.replace(
            "{% for m",
            "{% for m in messages if m['content'] is string %}{{ raise_exception() }}{% endfor %}{% for m",
            1,
        ),
    ],
)
def test_a_template_that_wants_parts_gets_them(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    given, plain = ChatFormat(with_template(tokenizer, template)), ChatFormat(tokenizer)
    assert given.context_ids(CONTEXT).tolist() == plain.context_ids(CONTEXT).tolist()
    assert given.query_ids(QUERY) == plain.query_ids(QUERY)
    assert given.output_ids("Blue.") == plain.output_ids("Blue.")


def test_a_template_that_refuses_system_turns_and_wants_parts_gets_both(tokenizer: PreTrainedTokenizerBase) -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + IN_PARTS
    found, expected = (
        ChatFormat(with_template(tokenizer, refuses)),
        ChatFormat(with_template(tokenizer, REFUSES_SYSTEM)),
    )
    # REFUSES_SYSTEM starts with the BOS token.
    assert found.context_ids(CONTEXT)[0].tolist() == expected.context_ids(CONTEXT)[0, 1:].tolist()
    assert found.query_ids(QUERY) == expected.query_ids(QUERY)


def test_a_query_without_context_is_the_chat_that_the_template_renders(tokenizer: PreTrainedTokenizerBase) -> None:
    for template in (tokenizer.chat_template, REFUSES_SYSTEM, SYSTEM_INTO_USER):
        chosen = with_template(tokenizer, template)
        chat = ChatFormat(chosen)
        before = chat.no_context_ids()
        found = ([] if before is None else before[0].tolist()) + chat.query_ids(QUERY)
        # Where the system turn is merged into the user turn, the blank line between them belongs to the query.
        expected = rendered(chosen, [{"role": "user", "content": QUERY}])
        assert [token for token in found if chosen.decode([token]) != "\n"] == [
            token for token in expected if chosen.decode([token]) != "\n"
        ]
    plain = ChatFormat(with_template(tokenizer, None))
    assert plain.no_context_ids().tolist() == [[tokenizer.bos_token_id]]


def test_a_tokenizer_that_does_not_say_where_its_tokens_are_is_refused() -> None:
    class Slow:
        chat_template = None
        bos_token = None

    with pytest.raises(SoftPromptError, match="tokenizer: got Slow, which does not say where its tokens are"):
        ChatFormat(Slow())


def test_a_text_that_the_template_treats_in_its_own_way_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    switched = "{% if 'quiet' in messages[0]['content'] %}quiet {% endif %}" + tokenizer.chat_template
    chat = ChatFormat(with_template(tokenizer, switched))
    with pytest.raises(SoftPromptError, match=r"context: got 'Answer from this text\. A quiet mill', which the chat"):
        chat.context_ids("A quiet mill")
