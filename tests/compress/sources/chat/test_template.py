"""What a chat is rendered from: dates are those of the first day, arguments are the template's, jinja2 is named."""

import copy
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from softprompt_kernels.compress import ChatFormat, CompressConfig, Interrupted, compress, load_config
from softprompt_kernels.compress.sources import template as module
from softprompt_kernels.compress.sources.template import ChatTemplate
from softprompt_kernels.compress.teacher.answers import end_tokens
from softprompt_kernels.errors import SoftPromptError

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
TEMPLATE = (
    "{% for m in messages %}" + TURN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = (
    "{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% else %}{% set today = 'never' %}"
    '{% endif %}<|im_start|>tool\n{{ today }}, {{ strftime_now( "%H" ) }} h<|im_end|>\n' + TEMPLATE
)
REQUIRED = {"model": "m", "context": "c", "output": "o", "tokens": 4}


def with_template(tokenizer: PreTrainedTokenizerBase, template: Any) -> PreTrainedTokenizerBase:
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`on(3)`: it is the third of May."""

    def set_day(day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime(2026, 5, day, 17, 30)

        monkeypatch.setattr(module, "datetime", Clock)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)

    return set_day


def test_a_template_prints_the_date_of_its_first_use(
    tokenizer: PreTrainedTokenizerBase, on: Callable[[int], None], tmp_path: Path
) -> None:
    dated, path = with_template(tokenizer, DATED), tmp_path / "chat.json"
    on(3)
    first = ChatFormat.pinned(dated, path, None)
    assert dated.decode(first.context_ids("The mill.")[0]).startswith("<|im_start|>tool\n03 May 2026, 17 h<|im_end|>")
    path.write_text(first.rendered_from, encoding="utf-8")
    on(4)
    assert "04 May" in dated.decode(ChatFormat(dated).context_ids("The mill.")[0])
    again = ChatFormat.pinned(dated, path, None)
    assert again.context_ids("The mill.").tolist() == first.context_ids("The mill.").tolist()
    assert again.no_context_ids().tolist() == first.no_context_ids().tolist()
    assert again.rendered_from == first.rendered_from


@pytest.mark.parametrize(
    "call",
    [
        "strftime_now('%d %b')",
        "strftime_now('%d ' ~ '%b')",
        "strftime_now('%d ' + ['%b'][0])",
        "strftime_now(format='%d %b')",
        "strftime_now(pattern)",
        "shown('%d %b')",
    ],
)
def test_a_time_is_kept_however_the_template_asks_for_it(
    tokenizer: PreTrainedTokenizerBase, on: Callable[[int], None], tmp_path: Path, call: str
) -> None:
    start = "{% set pattern = '%d %b' %}{% macro shown(how) %}{{ strftime_now(how) }}{% endmacro %}"
    dated, path = with_template(tokenizer, f"{start}{{{{ {call} }}}} {TEMPLATE}"), tmp_path / "chat.json"
    on(3)
    first = ChatFormat.pinned(dated, path, None)
    assert dated.decode(first.no_context_ids()[0]).strip() == "03 May"
    path.write_text(first.rendered_from, encoding="utf-8")
    on(4)
    assert dated.decode(ChatFormat.pinned(dated, path, None).no_context_ids()[0]).strip() == "03 May"


@pytest.mark.parametrize("how", ["%d %b %Y", "%-d/%-m/%y", "%%d %%%d%", "%A%B%j%H:%M:%S", "", "no code", "%e %Q %"])
def test_a_time_is_written_as_by_transformers(
    tokenizer: PreTrainedTokenizerBase, on: Callable[[int], None], how: str
) -> None:
    source = f"\n  {{% if strftime_now is defined %}}\n [{{{{ strftime_now({how!r}) }}}}]\n{{% endif %}}\n" + TEMPLATE
    messages = [{"role": "user", "content": "Why?"}]
    dated = with_template(tokenizer, source)
    on(3)
    given = dated.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate.of(dated).render(None, "Why?") == given and "Why?" in given


DAMAGED = (None, "", "{", "[]", '{"template": 3}', "\ufeff", '{"template": "", "arguments": {}, "time": "noon"}')


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("needed", [False, True])
def test_a_damaged_record_is_as_none_where_no_time_is_printed(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: str | None, needed: bool
) -> None:
    path = tmp_path / "chat.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    quiet = "{% if strftime_now is defined and false %}{{ strftime_now('%d') }}{% endif %}" + TEMPLATE
    for chosen in (tokenizer, with_template(tokenizer, None), with_template(tokenizer, quiet)):
        found = ChatFormat.pinned(chosen, path, None, needed=needed)
        assert found.query_ids("Why?") == ChatFormat(chosen).query_ids("Why?")


def test_each_part_of_a_time_counts(tokenizer: PreTrainedTokenizerBase) -> None:
    for code in "aAbBdfHIjmMpSUwWxXyYc":
        assert ChatTemplate.of(with_template(tokenizer, f"{{{{ strftime_now('%{code}') }}}}{TEMPLATE}")).prints_time


ALONE = "{% if messages[0]['role'] != 'system' %}{{ strftime_now('%d') }}{% endif %}" + TEMPLATE
ANSWERED = "{% if messages[-1]['role'] == 'assistant' %}{{ strftime_now('%d') }}{% endif %}" + TEMPLATE


@pytest.mark.parametrize("content", DAMAGED)
@pytest.mark.parametrize("template", [DATED, ALONE, ANSWERED])
def test_a_damaged_record_of_the_time_is_refused_beside_stored_tokens(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, content: str | None, template: str
) -> None:
    path, dated = tmp_path / "chat.json", with_template(tokenizer, template)
    if content is not None:
        path.write_text(content, encoding="utf-8")
    assert ChatFormat.pinned(dated, path, None).query_ids("Why?") == ChatFormat(dated).query_ids("Why?")
    with pytest.raises(SoftPromptError, match=r"^output: .*chat\.json cannot be read"):
        ChatFormat.pinned(dated, path, None, needed=True)


def test_a_record_of_other_arguments_is_not_taken(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    path, argued = tmp_path / "chat.json", with_template(tokenizer, "{{ style }}" + TEMPLATE)
    path.write_text(ChatFormat(argued, {"style": "short"}).rendered_from, encoding="utf-8")
    for arguments in ({"style": "long"}, {}, None, {"style": "short"}):
        found = ChatFormat.pinned(argued, path, arguments, needed=True).no_context_ids()
        assert argued.decode([] if found is None else found[0]) == (arguments or {}).get("style", "")


def test_a_run_resumed_on_another_day_reads_the_same(
    make_config: Callable[..., CompressConfig],
    tiny_model_folder: Path,
    tmp_path: Path,
    recording_reporter: Any,
    on: Callable[[int], None],
    no_plot: None,
) -> None:
    dated = tmp_path / "dated"
    dated.mkdir()
    for file in tiny_model_folder.iterdir():
        (dated / file.name).symlink_to(file)
    (dated / "chat_template.jinja").unlink()
    (dated / "chat_template.jinja").write_text(DATED)
    on(3)
    whole = make_config(model=str(dated), output=tmp_path / "whole")
    figures = compress(whole)
    config = make_config(model=str(dated))
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Training", 3))
    on(4)
    record = config.output / "chat.json"
    kept = record.read_bytes()
    for damage in (lambda: record.write_text("{"), record.unlink):
        damage()
        with pytest.raises(SoftPromptError, match=r"^output: .*chat\.json cannot be read"):
            compress(config)
    record.write_bytes(kept)
    resumed = compress(config)
    for changing in ("seconds", "stages"):
        figures.pop(changing), resumed.pop(changing)
    assert resumed == figures
    examples = [json.loads((run.output / "cache" / "examples.json").read_text()) for run in (whole, config)]
    assert examples[0] == examples[1]


def test_a_run_without_a_record_resumes_where_no_time_is_printed(
    make_config: Callable[..., CompressConfig], recording_reporter: Any, no_plot: None
) -> None:
    config = make_config()
    with pytest.raises(Interrupted):
        compress(config, recording_reporter("Training", 3))
    record, examples = config.output / "chat.json", config.output / "cache" / "examples.json"
    kept = examples.read_bytes()
    record.unlink()  # as of a version that wrote none
    compress(config)
    assert json.loads(record.read_text())["template"] and examples.read_bytes() == kept


ARGUED = TEMPLATE.replace(
    "{% for", "{% if style is defined %}{{ style }}{% if deep %}!{% endif %}\n{% endif %}{% for", 1
)


def test_arguments_reach_the_template(tokenizer: PreTrainedTokenizerBase) -> None:
    argued = with_template(tokenizer, ARGUED)
    chat = ChatFormat(argued, {"style": "short", "deep": True})
    assert argued.decode(chat.context_ids("The mill.")[0]).startswith("short!<|im_start|>system\n")
    assert argued.decode(chat.no_context_ids()[0]) == "short!"
    assert ChatFormat(argued).no_context_ids() is None


@pytest.mark.parametrize("name", ["styl", "(", "", "m", "n", "loop", "quoted", "said", "else", "content", "range"])
def test_an_argument_that_the_template_does_not_use_is_refused(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    said = "{# quoted #}{% set n = 1 %}{{ n }}{% generation %}said{% endgeneration %}"
    with pytest.raises(SoftPromptError, match=r"template_arguments: got .*, accepted are variables"):
        ChatFormat(with_template(tokenizer, said + ARGUED), {name: 1})


@pytest.mark.parametrize("name", ["messages", "tokenize", "add_generation_prompt", "raise_exception", "strftime_now"])
def test_an_argument_that_is_taken_is_refused(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    with pytest.raises(SoftPromptError, match=f"template_arguments: got '{name}', which every chat template is given"):
        ChatFormat(with_template(tokenizer, ARGUED), {name: 1})


def test_an_argument_with_a_default_of_the_template_is_used(tokenizer: PreTrainedTokenizerBase) -> None:
    for start in (
        "{% if tone is not defined %}{% set tone = 'dry' %}{% endif %}{{ tone }} ",
        "{% set tone = tone | default('dry') %}{{ tone }} ",
        "{% generation %}{{ tone or 'dry' }} {% endgeneration %}",
    ):
        chosen = with_template(tokenizer, start + TEMPLATE)
        for arguments, tone in ((None, "dry"), ({"tone": "kind"}, "kind")):
            before = ChatFormat(chosen, arguments).no_context_ids()
            assert chosen.decode(before[0]).strip() == tone


def test_arguments_without_a_template_are_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(
        SoftPromptError, match="template_arguments: got 'style' for a tokenizer without a chat template"
    ):
        ChatFormat(with_template(tokenizer, None), {"style": "short"})


@pytest.mark.parametrize("given", [{"a": False, "b": [1, "x"]}, '{"a": false, "b": [1, "x"]}', "{a: no, b: [1, x]}"])
def test_arguments_are_a_mapping_or_its_text(given: Any) -> None:
    config = load_config(None, REQUIRED | {"template_arguments": given})
    assert config.template_arguments == {"a": False, "b": [1, "x"]}
    assert load_config(None, config.model_dump()) == config


@pytest.mark.parametrize("text", ["2024-07-26", "2024-07-26 10:00:00", "2020-13-01"])
def test_a_date_is_text(text: str, tmp_path: Path) -> None:
    given, file = f"{{date_string: {text}, more: [{text}]}}", tmp_path / "run.yaml"
    expected = {"date_string": text, "more": [text]}
    file.write_text(f"template_arguments: {given}\n")
    for config in (load_config(None, REQUIRED | {"template_arguments": given}), load_config(file, REQUIRED)):
        assert config.template_arguments == expected
        file.write_text(config.to_yaml())
        assert load_config(file, {}) == config


@pytest.mark.parametrize("given", ["enable_thinking", "[1]", "{a: ", 3, "a: !!timestamp 2020-01-01", {"a": {1, 2}}])
def test_arguments_of_another_form_are_refused(given: Any) -> None:
    with pytest.raises(
        SoftPromptError, match=r"template_arguments: got .*, accepted is a mapping of names to JSON values"
    ):
        load_config(None, REQUIRED | {"template_arguments": given})


def test_several_templates_need_a_default(tokenizer: PreTrainedTokenizerBase) -> None:
    named = with_template(tokenizer, {"default": TEMPLATE, "rag": "nothing"})
    assert ChatFormat(named).query_ids("Why?") == ChatFormat(tokenizer).query_ids("Why?")
    with pytest.raises(SoftPromptError, match="tokenizer: it has several chat templates"):
        ChatFormat(with_template(tokenizer, {"rag": TEMPLATE, "tools": TEMPLATE}))


def test_a_missing_jinja2_is_named(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.chat_template_utils.is_jinja_available", lambda: False)
    with pytest.raises(SoftPromptError, match=r"^jinja2: chat templates need it \(.*pip install jinja2"):
        ChatFormat(with_template(tokenizer, TEMPLATE + "{# never compiled before #}"))


@pytest.mark.parametrize("version", ["3.0.3", "3.1.5"])
def test_an_old_jinja2_is_named(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr("jinja2.__version__", version)
    with pytest.raises(SoftPromptError, match=rf"^jinja2: .*Your version is {version}"):
        ChatTemplate.of(with_template(tokenizer, TEMPLATE + f"{{# {version} #}}")).render("a", "b")


def test_without_a_template_no_jinja2_is_needed(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.chat_template_utils.is_jinja_available", lambda: False)
    assert ChatFormat(with_template(tokenizer, None)).query_ids("Why?")


def test_the_teacher_stops_at_every_end(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    other = with_template(tokenizer, TEMPLATE.replace("<|im_end|>", "<|pad|>"))
    other.eos_token = "a"
    chat, before = ChatFormat(other), model.generation_config.eos_token_id
    rendered, eos = other.convert_tokens_to_ids(["<|pad|>", "a"])
    assert chat.output_ids("Blue.")[-1] == rendered
    for ends in (None, 7, [7, 8]):
        model.generation_config.eos_token_id = ends
        try:
            assert end_tokens(model, chat) == {rendered, eos} | ({7, 8} if isinstance(ends, list) else {ends} - {None})
        finally:
            model.generation_config.eos_token_id = before
