"""Random templates, tokenizers and texts: the pieces joined are the whole chat, or one sentence says why not."""

import json
from contextlib import suppress
from itertools import accumulate
from typing import Any

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from softprompt_kernels.compress import ChatFormat
from softprompt_kernels.compress.sources.chat import INSTRUCTION
from softprompt_kernels.compress.text_file import trim
from softprompt_kernels.errors import SoftPromptError

CONTROL = ("<a>", "</a>", "<b>", "<|end|>", "[X]")
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PLACES = {character: byte for byte, character in bytes_to_unicode().items()}

marks = st.lists(st.sampled_from((*CONTROL, "\n", "\n\n", " ", "u", "go:", "###")), max_size=3).map("".join)
text = (
    st.lists(st.one_of(st.sampled_from((" ", "\n", "    ", "ab", "a.", "é", "磨")), st.text(max_size=4)), max_size=6)
    .map("".join)
    .filter(str.strip)
)
merges = st.lists(st.tuples(*[st.sampled_from("aubg#:<>ĠĊ.")] * 2), max_size=12, unique=True)


@st.composite
def templates(draw: Any) -> str:
    """A template with turns of random marks. The context is a turn, part of the user turn, refused or left out."""
    system = draw(st.sampled_from(("turn", "merged", "refused", "dropped")))
    opening = {role: draw(marks) for role in ("system", "user", "assistant")}
    closing = {role: draw(marks) for role in ("system", "user", "assistant")}
    head, asked = draw(marks), draw(st.one_of(st.just(opening["assistant"]), marks))
    trims = draw(st.sampled_from(("", " | trim")))
    default = draw(st.one_of(st.just(""), marks))

    def turn(role: str, content: str) -> str:
        return f"{{{{ {json.dumps(opening[role])} + {content} + {json.dumps(closing[role])} }}}}"

    content = f"(m['content']{trims})"
    of_system = {
        "turn": turn("system", content),
        "merged": f"{{% set ns.head = {content} + '\\n\\n' %}}",
        "refused": "{{ raise_exception('no system turn') }}",
        "dropped": "",
    }[system]
    return (
        f"{{% set ns = namespace(head='') %}}{{{{ {json.dumps(head)} }}}}"
        f"{{% if messages[0]['role'] != 'system' %}}{{{{ {json.dumps(default)} }}}}{{% endif %}}"
        f"{{% for m in messages %}}{{% if m['role'] == 'system' %}}{of_system}{{% elif m['role'] == 'user' %}}"
        f"{turn('user', f'ns.head + {content}')}{{% else %}}{turn('assistant', content)}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {json.dumps(asked)} }}}}{{% endif %}}"
    )


def tokenizer_of(pairs: list[tuple[str, str]], regex: bool, template: str | None) -> PreTrainedTokenizerBase:
    vocabulary = {byte: index for index, byte in enumerate(ALPHABET)}
    for pair in pairs:
        vocabulary.setdefault("".join(pair), len(vocabulary))
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    words.decoder = decoders.ByteLevel()
    words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, eos_token="<|end|>")


def encoded(tokenizer: PreTrainedTokenizerBase, chat: str) -> list[int]:
    return tokenizer(chat, add_special_tokens=False)["input_ids"]


def parts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[bytes]:
    """The bytes of each token, which may end within a character."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [token.encode() if token in CONTROL else bytes(PLACES[one] for one in token) for token in tokens]


def written(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> bytes:
    return b"".join(parts(tokenizer, ids))


def boundaries(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> set[int]:
    return set(accumulate(map(len, parts(tokenizer, ids)), initial=0))


def rendered(tokenizer: PreTrainedTokenizerBase, *turns: tuple[str, str], asked: bool) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)


@given(st.one_of(st.none(), templates()), merges, st.booleans(), text, text, text)
@example("{{ messages[0]['content'] }}", [], True, "a", "b", "c")
@settings(deadline=None, max_examples=150)
def test_pieces_joined_are_the_whole(
    template: str | None, pairs: list[tuple[str, str]], regex: bool, context: str, query: str, answer: str
) -> None:
    tokenizer = tokenizer_of(pairs, regex, template)
    try:
        chat = ChatFormat(tokenizer)
        pieces = [chat.context_ids(context)[0].tolist(), chat.query_ids(query), chat.query_ids(query, answered=True)]
        output = chat.output_ids(answer)
        nothing = chat.no_context_ids()
    except SoftPromptError as error:
        assert str(error) and template is not None
        return
    context, query, answer = INSTRUCTION + trim(context), trim(query), trim(answer)
    if template is None:
        whole, alone = f"{context}\n\nQuestion: {query}\nAnswer:", f"Question: {query}\nAnswer:"
        full = f"{whole} {answer}"
    else:
        users = [[("system", context), ("user", query)], [("user", f"{context}\n\n{query}")]]
        chats = []
        for turns in users:
            try:
                chats.append((rendered(tokenizer, *turns, asked=True), turns))
            except Exception:
                continue
        joined = written(tokenizer, pieces[0] + pieces[1])
        found = [(one, turns) for one, turns in chats if one.encode() == joined]
        assert found, "the pieces are the text of a rendered chat"
        whole, turns = found[0]
        full = rendered(tokenizer, *turns, ("assistant", answer), asked=False)
        alone = rendered(tokenizer, ("user", query), asked=True)
    before = [] if nothing is None else nothing[0].tolist()
    start, end = len(written(tokenizer, pieces[0])), len(written(tokenizer, pieces[0] + pieces[2]))
    assert written(tokenizer, pieces[0] + pieces[1]) == whole.encode()
    # A template that trims takes the indentation of a question alone, and keeps it behind a context in one turn.
    if not (query[0].isspace() and template is not None and "trim" in template):
        assert written(tokenizer, before + pieces[1]) == alone.encode()
    joined = written(tokenizer, pieces[0] + pieces[2] + output)
    assert joined.startswith(full.encode()[: len(joined) - len("<|end|>")])
    # Blanks at the start of a text, and names of control tokens in it, are the exceptions: the text is the same.
    texts = (context, query, answer)
    assume(not any(one[0].isspace() for one in texts) and not any(name in one for one in texts for name in CONTROL))
    ids = encoded(tokenizer, whole)
    if start in boundaries(tokenizer, ids):
        assert pieces[0] + pieces[1] == ids
    ids = encoded(tokenizer, full)
    shown = full.encode().find(answer.encode(), end)  # -1: the template shows no answers
    stop = shown + len(answer.encode())
    if shown >= 0 and {start, end, stop} <= boundaries(tokenizer, ids):
        length = min(len(ids), len(pieces[0] + pieces[2] + output))
        assert (pieces[0] + pieces[2] + output)[: length - 1] == ids[: length - 1]
    ids = encoded(tokenizer, alone)
    if len(written(tokenizer, before)) in boundaries(tokenizer, ids):
        assert before + pieces[1] == ids


@given(templates(), st.sampled_from(CONTROL), text, text)
@settings(deadline=None, max_examples=80)
def test_names_of_control_tokens_stay_text(template: str, name: str, left: str, right: str) -> None:
    tokenizer = tokenizer_of([], True, template)
    assume(not any(other in left + right for other in CONTROL))
    try:
        chat = ChatFormat(tokenizer)
        named, plain = chat.query_ids(f"a{left}{name}{right}a"), chat.query_ids("a")
    except SoftPromptError:
        return
    control = set(tokenizer.convert_tokens_to_ids(list(CONTROL)))
    assert [i for i in named if i in control] == [i for i in plain if i in control]
    assert f"{left}{name}{right}".encode() in written(tokenizer, named)


@given(st.one_of(st.none(), templates()), merges, st.booleans(), text, st.lists(text, min_size=3, max_size=3))
@settings(deadline=None, max_examples=100)
def test_a_conversation_is_the_whole(
    template: str | None, pairs: list[tuple[str, str]], regex: bool, context: str, texts: list[str]
) -> None:
    tokenizer = tokenizer_of(pairs, regex, template)
    turns = list(zip(("user", "assistant", "user"), texts, strict=True))
    try:
        chat = ChatFormat(tokenizer)
        before = chat.context_ids(context)[0].tolist()
        ids = chat.conversation_ids([{"role": role, "content": content} for role, content in turns])
        assert chat.conversation_ids([{"role": "user", "content": texts[0]}]) == chat.query_ids(texts[0])
    except SoftPromptError as error:
        assert str(error) and template is not None
        return
    context, (first, answer, last) = INSTRUCTION + trim(context), map(trim, texts)
    turns = [("user", first), ("assistant", answer), ("user", last)]
    if template is None:
        wholes = [f"{context}\n\nQuestion: {first}\nAnswer: {answer}\n\nQuestion: {last}\nAnswer:"]
    else:
        wholes = []
        for messages in ([("system", context), *turns], [("user", f"{context}\n\n{first}"), *turns[1:]]):
            with suppress(Exception):  # the template refuses it
                wholes.append(rendered(tokenizer, *messages, asked=True))
    joined = written(tokenizer, before + ids)
    assert joined in [whole.encode() for whole in wholes]
    assume(not any(one[0].isspace() for one in (context, first, last)))
    assume(not any(name in one for one in (context, first, answer, last) for name in CONTROL))
    whole = encoded(tokenizer, joined.decode())
    if len(written(tokenizer, before)) in boundaries(tokenizer, whole):
        assert before + ids == whole
