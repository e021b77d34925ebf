"""Everything that decides a compression, in one flat list: the keys of the YAML file and the options of the command.

A key means the same in both places, and an option wins over the file. Relative paths, in the file too, are relative to
the folder that the command is started in. What is asked of files and models themselves (that a text is not empty, that
k is below the context) is checked by what reads them; here is what can be said without reading.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from softprompt_kernels.errors import SoftPromptError


def _no_truth_value(value: Any) -> Any:
    """YAML's `on` and `yes` are no numbers, although Python's True is 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("truth_value", "a truth value is no number")
    return value


def _no_empty_path(value: Any) -> Any:
    """An empty path would mean the current folder."""
    if isinstance(value, str) and not value.strip():
        raise PydanticCustomError("empty_path", "an empty path")
    return value


Whole = Annotated[int, BeforeValidator(_no_truth_value)]
Number = Annotated[float, BeforeValidator(_no_truth_value)]
FilePath = Annotated[Path, BeforeValidator(_no_empty_path), AfterValidator(Path.expanduser)]
Kind = Literal["kv", "embedding"]
Init = Literal["strided", "first", "text", "vocabulary", "random"]
Objective = Literal["kl", "reverse_kl", "jsd", "nll"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class CompressConfig(BaseModel):
    """A compression: what is compressed, into what, how it is learnt, and where it goes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )

    model: str = Field(min_length=1, description="Folder of the model with its tokenizer, or its name on the hub.")
    context: FilePath = Field(description="The text to compress, a UTF-8 file.")
    output: FilePath = Field(description="Folder of the run: prompt, figures, cache, checkpoint.")

    kind: Kind = Field("kv", description="Kind of prompt: keys and values of all layers, or input embeddings.")
    tokens: Whole = Field(ge=1, description="Length k of the soft prompt, below that of the context.")
    init: Init = Field("strided", description="What the prompt starts from; strided and first are of the context.")
    init_text: FilePath | None = Field(None, description="The text that init=text starts from, a UTF-8 file.")
    frozen_tokens: Whole | None = Field(
        None, ge=0, description="First tokens that are never trained (the attention sink): 1 for kv, 0 for embedding."
    )

    queries: FilePath | None = Field(
        None, description='Training queries: JSON Lines of {"input": ..., "output": ...}, the output optional.'
    )
    heldout: FilePath | None = Field(
        None, description="Held-out queries of the same form; without it a share of the training queries."
    )
    heldout_share: Number = Field(0.1, gt=0, lt=1, description="Share of the queries held out if no file is given.")
    selfstudy: Whole = Field(256, ge=0, description="Queries that the model makes from the context by itself.")
    samples: Whole = Field(1, ge=1, description="Answers sampled for each training query that has no output.")
    new_tokens: Whole = Field(48, ge=1, description="Tokens sampled from the teacher for a query without an output.")
    sample_temperature: Number = Field(1.0, ge=0, description="Temperature of that sampling; 0 takes the likeliest.")
    sample_batch: Whole = Field(64, ge=1, description="Sequences sampled at a time.")

    objective: Objective = Field("kl", description="What training minimises against the teacher.")
    nll_weight: Number = Field(0.0, ge=0, le=1, description="Share of the log-likelihood mixed into objective kl.")
    beta: Number = Field(
        0.5, ge=1e-4, le=1 - 1e-4, description="Weight of the teacher in the mixture of objective jsd."
    )
    loss_temperature: Number = Field(1.0, gt=0, description="Divides both sides' logits in the loss.")

    steps: Whole = Field(200, ge=1, description="Steps of the optimiser.")
    batch_size: Whole = Field(8, ge=1, description="Sequences a step.")
    micro_batch_size: Whole | None = Field(
        None, ge=1, description="Sequences run at a time, to save memory; the same gradient. Default: batch_size."
    )
    learning_rate: Number = Field(2e-2, gt=0, description="Peak learning rate; soft prompts want large ones.")
    warmup_steps: Whole = Field(
        default_factory=lambda before: min(5, before.get("steps", 5)),
        ge=0,
        description="Steps until the peak rate is reached, at most all; a cosine follows. Default: 5, or all if fewer.",
    )
    weight_decay: Number = Field(0.0, ge=0, description="Decay of AdamW.")
    max_grad_norm: Number | None = Field(None, gt=0, description="Longer gradients are cut to this norm.")
    gradient_checkpointing: bool = Field(False, description="Compute activations twice to save memory.")

    checkpoint_every: Whole = Field(25, ge=1, description="Steps between checkpoints.")
    evaluate_every: Whole = Field(0, ge=0, description="Steps between held-out evaluations; 0: before and after only.")
    evaluation_sequences: Whole = Field(
        24, ge=1, description="Training sequences in the evaluation; held-out ones are all in it."
    )

    seed: Whole = Field(0, ge=0, lt=2**32, description="Seed of sampling, split, initialisation and order.")
    dtype: Dtype = Field("auto", description="Type of the frozen model; auto: float32 on a CPU, as stored elsewhere.")
    device: str = Field("auto", pattern=r"^[a-z]+(:\d+)?$", description="auto, cpu, cuda, cuda:1, ...")
    threads: Whole | None = Field(None, ge=1, description="CPU threads. Default: what PyTorch takes.")

    @property
    def frozen(self) -> int:
        """`frozen_tokens` with its default filled in; at least one token is left to train."""
        if self.frozen_tokens is not None:
            return self.frozen_tokens
        return min(1, self.tokens - 1) if self.kind == "kv" else 0

    @model_validator(mode="after")
    def _agree(self) -> CompressConfig:
        for holds, sentence in (
            (
                self.frozen < self.tokens,
                f"frozen_tokens: got {self.frozen}, accepted is less than tokens={self.tokens}",
            ),
            (self.init != "text" or self.init_text, "init_text: missing, but init=text starts from it"),
            (self.init == "text" or not self.init_text, f"init_text: given, but init={self.init} does not read it"),
            (
                self.nll_weight == 0 or self.objective == "kl",
                f"nll_weight: got {self.nll_weight:g}, accepted with objective={self.objective} is 0",
            ),
            (
                self.beta == 0.5 or self.objective == "jsd",
                f"beta: got {self.beta:g}, accepted with objective={self.objective} is 0.5, for only jsd has it",
            ),
            (self.queries or self.selfstudy, "queries: missing, and selfstudy=0 makes none"),
            (
                (self.micro_batch_size or 1) <= self.batch_size,
                f"micro_batch_size: got {self.micro_batch_size}, accepted is at most batch_size={self.batch_size}",
            ),
            (
                self.warmup_steps <= self.steps,
                f"warmup_steps: got {self.warmup_steps}, accepted is at most steps={self.steps}",
            ),
        ):
            if not holds:
                raise PydanticCustomError("disagreement", "{sentence}", {"sentence": sentence})
        return self

    def to_yaml(self) -> str:
        """The YAML that `load_config` reads back as an equal configuration."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path | None, overrides: Mapping[str, Any]) -> CompressConfig:
    """A configuration from a YAML file, with `overrides` on top.

    Args:
        path: a YAML mapping of field names, None for no file.
        overrides: only fields that were given.

    Raises:
        SoftPromptError: the file cannot be read, is no YAML mapping, or a field is missing, unknown, of another type
            or out of range; the sentence names all fields that are wrong, what was got and what is accepted.
    """
    values = {} if path is None else _read_yaml(Path(path))
    try:
        return CompressConfig.model_validate({**values, **overrides})
    except ValidationError as error:
        # A default that depends on a wrong field is itself no error.
        details = [d for d in error.errors(include_url=False) if d["type"] != "default_factory_not_called"]
        sentences = dict.fromkeys(_sentence(detail) for detail in details)  # a union names a field once for each type
        in_file = path is not None and any(detail["loc"] and detail["loc"][0] in values for detail in details)
        raise SoftPromptError((f"{path}: " if in_file else "") + "; ".join(sentences)) from error


def accepted(name: str) -> str:
    """What a field takes, in words."""
    field: FieldInfo = CompressConfig.model_fields[name]
    words, bounds = _words(field.annotation), []
    if name == "device":
        return "auto, cpu, cuda, cuda:1 or the like"
    for bound in field.metadata + [item for part in get_args(field.annotation) for item in _metadata(part)]:
        for kind, attribute, text in ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<")):
            if isinstance(bound, kind):
                bounds.append(f"{text} {getattr(bound, attribute)}")
    return " ".join((words, " and ".join(bounds))).rstrip()


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation)[1:] if get_origin(annotation) is Annotated else ()


def _words(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "one of " + ", ".join(get_args(annotation))
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", Path: "a path"}
    if annotation in plain:
        return plain[annotation]
    return next((_words(part) for part in get_args(annotation) if part is not type(None)), "a value")


def _sentence(detail: ErrorDetails) -> str:
    """One error of pydantic as a clause."""
    if detail["type"] == "disagreement":
        return detail["msg"]
    name = str(detail["loc"][0])
    if detail["type"] == "missing":
        return f"{name}: missing, needed is {accepted(name)}"
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, CompressConfig.model_fields, 1)
        return f"{name}: unknown" + (f", did you mean {close[0]}?" if close else "")
    return f"{name}: got {detail['input']!r}, accepted is {accepted(name)}"


# YAML


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would keep the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if keys[index] in keys[:index]:
                raise yaml.constructor.ConstructorError(None, None, f"{keys[index]} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except UnicodeDecodeError as error:
        raise SoftPromptError(f"{path} is not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise SoftPromptError(f"{path} cannot be read: {error.strerror or error}") from error
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SoftPromptError(f"{path} is not YAML{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SoftPromptError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        kind = "a list" if isinstance(values, list) else f"only {values!r}"
        raise SoftPromptError(f"{path} holds {kind}, accepted is a mapping of field names to values")
    return {str(key): value for key, value in values.items()}
