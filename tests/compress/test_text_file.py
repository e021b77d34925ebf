"""Files of the user: a BOM is no part of the text, UTF-16 is named, and whatever the bytes are, no traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from softprompt_kernels.compress.config import CompressConfig
from softprompt_kernels.compress.config_file import load_config
from softprompt_kernels.compress.inputs import load_inputs, read_text
from softprompt_kernels.compress.sources.model import load_model
from softprompt_kernels.compress.sources.queries import load_queries
from softprompt_kernels.compress.text_file import BOM, read_utf8
from softprompt_kernels.errors import SoftPromptError

REQUIRED = {"model": "m", "context": "c", "output": "o", "tokens": 4, "queries": "q"}
YAML = "model: m\ncontext: c\noutput: o\ntokens: 4\n"
LINE = json.dumps({"input": "Why?"}) + "\n"
READERS = {
    "context": (lambda path: read_text(path, "context"), "The mill.\n"),
    "queries": (load_queries, LINE),
    "yaml": (lambda path: load_config(path, {}), YAML),
}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest, tmp_path: Path):
    """Reads a file of these bytes; and a valid content."""
    read, valid = READERS[request.param]

    def read_bytes(content: bytes):
        path = tmp_path / "file"
        path.write_bytes(content)
        return read(path)

    return read_bytes, valid


@pytest.mark.parametrize("mark", [BOM, BOM + BOM])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_a_mark_is_no_part_of_the_text(reader, mark: str, ends: str) -> None:
    read, valid = reader
    assert read((mark + valid).replace("\n", ends).encode()) == read(valid.encode())


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_named(reader, encoding: str) -> None:
    read, valid = reader
    with pytest.raises(SoftPromptError, match="file is UTF-16 text, accepted is UTF-8"):
        read(valid.encode(encoding))


def test_utf_32_is_named(reader) -> None:
    with pytest.raises(SoftPromptError, match="file is UTF-32 text"):
        reader[0](reader[1].encode("utf-32"))


def test_a_file_of_a_mark_alone_is_empty(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(BOM.encode() + b"\n")
    with pytest.raises(SoftPromptError, match="is empty"):
        read_text(path, "context")
    with pytest.raises(SoftPromptError, match="holds no query"):
        load_queries(path)
    assert load_config(path, REQUIRED) == load_config(None, REQUIRED)


def test_a_mark_inside_the_text_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text(f"a{BOM}b", encoding="utf-8")
    assert read_utf8(path, "file") == f"a{BOM}b"


@pytest.mark.parametrize("path", ["a\0b", "\ud800"])
def test_a_path_that_no_file_can_have(path: str) -> None:
    with pytest.raises(SoftPromptError, match=r"context: .* cannot be read"):
        read_text(Path(path), "context")


def test_the_home_of_nobody() -> None:
    with pytest.raises(SoftPromptError, match="context: got '~no-such-user-here/a', accepted is a path"):
        load_config(None, REQUIRED | {"context": "~no-such-user-here/a"})


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass"))))
@example(b"a: 2020-13-40")
@example(b"a: 0b_")
@example(b"[" * 5000)
@example(b"? [a]\n: b")
@example(b"seed: " + b"9" * 5000)
@example(b'context: "a\\ud800"')
@example(b"model: &a [*a]")
@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_give_a_result_or_one_sentence(reader, content: bytes) -> None:
    try:
        reader[0](content)
    except SoftPromptError as error:
        assert str(error)


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path) -> Any:
    return load_model(str(tiny_model_folder), "auto", "cpu")


ODD = st.one_of(
    st.text(max_size=40), st.sampled_from(["\0", "\u200b", "\ufffe", "<|im_end|>", "a\u0301", "\U0010ffff"])
)


@given(ODD, ODD, st.one_of(st.none(), ODD))
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_is_encoded_or_refused_in_one_sentence(
    make_config: Callable[..., CompressConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loaded: Any,
    text: str,
    asked: str,
    given_output: str | None,
) -> None:
    """All the way to the tokens of a run, with queries that are made from the text."""
    monkeypatch.setattr("softprompt_kernels.compress.inputs.load_model", lambda *_: loaded)
    context, queries = tmp_path / "context.txt", tmp_path / "queries.jsonl"
    context.write_bytes(f"Ada has {text} and nine geese.".encode("utf-8", "surrogatepass"))
    lines = [{"input": asked, "output": given_output}, {"input": "Who?"}, {"input": "Where?"}]
    queries.write_text("".join(json.dumps({k: v for k, v in line.items() if v is not None}) + "\n" for line in lines))
    try:
        inputs = load_inputs(make_config(context=context, queries=queries, selfstudy=6))
    except SoftPromptError as error:
        assert str(error)
        return
    decoded = inputs.tokenizer.decode(inputs.context_ids[0])
    assert "Ada has" in decoded and "nine geese." in decoded
    assert all(inputs.chat.query_ids(query.input) for query in (*inputs.train, *inputs.heldout))
