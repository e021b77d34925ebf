"""The configuration: a field means the same in YAML and as an override, and every error has a message."""

from pathlib import Path

import pytest

from softprompt_kernels.compress.config import CompressConfig, accepted
from softprompt_kernels.compress.config_file import load_config
from softprompt_kernels.errors import SoftPromptError

REQUIRED = {"model": "m", "context": "c.txt", "output": "run", "tokens": 8}


def message_of(path: Path | None = None, **overrides: object) -> str:
    with pytest.raises(SoftPromptError) as caught:
        load_config(path, {**REQUIRED, **overrides})
    assert "\n" not in str(caught.value) and "pydantic" not in str(caught.value).lower()
    return str(caught.value)


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "config.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_overrides_win_over_the_file(yaml_file):
    path = yaml_file("model: a\ncontext: c.txt\noutput: run\ntokens: 8\nsteps: 50\nlearning_rate: 0.01\n")
    config = load_config(path, {"steps": 70})
    assert (config.model, config.steps, config.learning_rate) == ("a", 70, 0.01)
    assert config.context == Path("c.txt")


def test_a_number_that_yaml_reads_as_a_string_is_still_a_number(yaml_file):
    assert load_config(yaml_file("learning_rate: 2e-2"), REQUIRED).learning_rate == 0.02


def test_an_empty_file_changes_nothing(yaml_file):
    assert load_config(yaml_file("# nothing yet\n"), REQUIRED) == load_config(None, REQUIRED)


def test_a_written_configuration_is_read_back_as_equal(yaml_file):
    config = load_config(None, {**REQUIRED, "init": "text", "init_text": "ä.txt", "max_grad_norm": 1.5, "steps": 3})
    assert load_config(yaml_file(config.to_yaml()), {}) == config


def test_a_tilde_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(None, {**REQUIRED, "context": "~/c.txt"}).context == tmp_path / "c.txt"


@pytest.mark.parametrize(
    ("kind", "tokens", "given", "frozen"),
    [("kv", 8, None, 1), ("kv", 1, None, 0), ("embedding", 8, None, 0), ("kv", 8, 0, 0), ("embedding", 8, 3, 3)],
)
def test_the_sink_is_frozen_by_default_in_kv_prompts_only(kind, tokens, given, frozen):
    config = load_config(None, {**REQUIRED, "kind": kind, "tokens": tokens, "frozen_tokens": given})
    assert config.frozen == frozen


@pytest.mark.parametrize(("kind", "init"), [("kv", "matched"), ("embedding", "strided")])
def test_only_a_kv_prompt_is_matched_by_default(kind, init):
    assert load_config(None, {**REQUIRED, "kind": kind}).init == init
    assert load_config(None, REQUIRED).init == "matched"
    assert load_config(None, {**REQUIRED, "kind": kind, "init": "random"}).init == "random"


@pytest.mark.parametrize(("steps", "warmup"), [(0, 0), (1, 1), (4, 4), (5, 5), (200, 5)])
def test_the_default_warmup_fits_into_a_short_training(steps, warmup):
    assert load_config(None, {**REQUIRED, "steps": steps}).warmup_steps == warmup


def test_a_warmup_does_not_matter_without_training():
    assert load_config(None, {**REQUIRED, "steps": 0, "warmup_steps": 5}).steps == 0


@pytest.mark.parametrize(("init", "rate"), [("matched", 5e-3), ("strided", 2e-2)])
def test_the_default_learning_rate_is_that_of_the_initialisation(init, rate):
    assert load_config(None, {**REQUIRED, "init": init}).learning_rate == rate


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", 0),
        ("tokens", 2.5),
        ("tokens", True),
        ("frozen_tokens", -1),
        ("selfstudy", -1),
        ("new_tokens", 0),
        ("sample_temperature", -0.1),
        ("sample_batch", 0),
        ("heldout_share", 0),
        ("heldout_share", 1),
        ("nll_weight", 1.1),
        ("beta", 0),
        ("beta", 1),
        ("loss_temperature", 0),
        ("matching_rows", 0),
        ("matching_steps", -1),
        ("steps", -1),
        ("steps", "many"),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("warmup_steps", -1),
        ("weight_decay", -1),
        ("max_grad_norm", 0),
        ("gradient_checkpointing", "maybe"),
        ("checkpoint_every", 0),
        ("evaluate_every", -1),
        ("evaluation_sequences", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("threads", 0),
        ("kind", "lora"),
        ("init", "last"),
        ("objective", "mse"),
        ("dtype", "fp8"),
        ("device", "the fast one"),
        ("model", ""),
        ("model", 7),
        ("context", ""),
        ("context", 7),
        ("test", ""),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_accepted(field, value):
    message = message_of(**{field: value})
    assert message == f"{field}: got {value!r}, accepted is {accepted(field)}"


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"frozen_tokens": 8}, "frozen_tokens"),
        ({"init": "text"}, "init_text"),
        ({"init_text": "t.txt"}, "init_text"),
        ({"objective": "nll", "nll_weight": 0.5}, "nll_weight"),
        ({"beta": 0.3}, "beta"),
        ({"selfstudy": 0}, "queries"),
        ({"batch_size": 4, "micro_batch_size": 5}, "micro_batch_size"),
        ({"steps": 4, "warmup_steps": 5}, "warmup_steps"),
        ({"kind": "embedding", "init": "matched"}, "init"),
        ({"segment_tokens": 64, "server": "http://there/v1"}, "server"),
        ({"segment_tokens": 64, "context_memory": 0}, "context_memory"),
        ({"segment_tokens": 64, "context_dtype": "float16"}, "context_dtype"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(overrides, field):
    assert message_of(**overrides).startswith(f"{field}: ")


def test_accepted_says_the_range_in_words():
    assert accepted("tokens") == "an integer ≥ 1"
    assert accepted("heldout_share") == "a number > 0 and < 1"
    assert accepted("kind") == "one of kv, embedding"
    assert accepted("max_grad_norm") == "a number > 0"
    assert accepted("threads") == "an integer ≥ 1"
    assert accepted("init_text") == "a path"
    assert accepted("server") == "an address that begins with http:// or https://"


def test_all_wrong_fields_are_named_at_once():
    message = message_of(steps=-1, tokens=0)
    assert "steps: got -1" in message and "tokens: got 0" in message


def test_missing_fields_are_named():
    with pytest.raises(
        SoftPromptError, match=r"^model: missing.*; context: missing.*; output: missing.*; tokens: missing"
    ):
        load_config(None, {})


def test_an_unknown_key_comes_with_a_suggestion(yaml_file):
    path = yaml_file("learning_rat: 0.1\nzzz: 1\n")
    message = message_of(path)
    assert message.startswith(f"{path}: ")
    assert "learning_rat: unknown, did you mean learning_rate?" in message and "zzz: unknown" in message


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("- model\n- context\n", "holds a list, accepted is a mapping"),
        ("model", "holds only 'model', accepted is a mapping"),
        ("steps: 3\ntokens: [\n", "is not YAML in line 3"),
        ("steps: 3\nsteps: 4\n", "is not YAML in line 2: steps is given twice"),
        ("steps: !!python/object/apply:os.getcwd []\n", "is not YAML in line 1"),
        ("steps: \x07", "is not YAML"),
        (b"model: \xff\xfe", "is not UTF-8 text (byte 7)"),
    ],
)
def test_an_invalid_configuration_file_is_named(yaml_file, text, fragment):
    path = yaml_file(text)
    message = message_of(path)
    assert message.startswith(str(path)) and fragment in message


def test_a_missing_file_is_named(tmp_path):
    assert message_of(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'} cannot be read (No such file or directory)"
    assert message_of(tmp_path) == f"{tmp_path} cannot be read (Is a directory)"


def test_every_field_has_a_description():
    for name, field in CompressConfig.model_fields.items():
        assert field.description and field.description.endswith((".", "...")), name


def test_a_configuration_is_immutable():
    with pytest.raises(ValueError, match="frozen"):
        load_config(None, REQUIRED).steps = 3
