"""Options that several commands share, and the fields of the configuration as options."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined

from softprompt_kernels.compress.config import DEVICE_HELP, DTYPE_HELP, ChatArguments, CompressConfig, Dtype, accepted
from softprompt_kernels.errors import SoftPromptError

ModelName = Annotated[str, typer.Option("--model", help="Folder of the model and its tokenizer, or its hub name.")]
DtypeName = Annotated[Dtype, typer.Option(help=DTYPE_HELP)]
DeviceName = Annotated[str, typer.Option(help=DEVICE_HELP)]
Force = Annotated[
    bool, typer.Option("--force", help="Use the prompt even if it was made for another model or tokenizer.")
]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of sampling.")]
TemplateArguments = Annotated[
    str | None,
    typer.Option(
        help="Arguments of the chat template, such as '{\"enable_thinking\": false}'. Default: those that the prompt "
        "was made with."
    ),
]

PANELS = {
    "model": "Model, context and output",
    "kind": "Soft prompt",
    "queries": "Queries and the teacher's answers",
    "objective": "Training objective",
    "steps": "Training",
    "checkpoint_every": "Checkpoints and evaluation",
    "seed": "Seed and device",
}
"""The headings of the help page, by the first field under each."""


def parse_template_arguments(text: str | None) -> dict[str, Any] | None:
    """The arguments of a chat template, from JSON or YAML.

    Raises:
        SoftPromptError: it is not a mapping of names to JSON values.
    """
    try:
        return None if text is None else TypeAdapter(ChatArguments).validate_python(text)
    except ValidationError as error:
        raise SoftPromptError(
            f"--template-arguments: got {text!r}, accepted is {accepted('template_arguments')}"
        ) from error


def as_loaded(model: str, dtype: str, template_arguments: Mapping[str, Any] | None = None) -> str:
    """The options with which a later command loads the same model and writes the same chats."""
    given = f"--model {model}"
    if dtype in ("8bit", "4bit"):  # in full precision it is another model
        given += f" --dtype {dtype}"
    if template_arguments:
        given += f" --template-arguments {shlex.quote(json.dumps(dict(template_arguments)))}"
    return given


def with_config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces `**options` of a command by one option for each field of `CompressConfig`; None if not given."""
    return with_some_config_options(CompressConfig.model_fields, {})(command)


def with_some_config_options(
    names: Iterable[str], defaults: Mapping[str, Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As `with_config_options`, for some of the fields.

    Args:
        names: of the fields.
        defaults: which the command has in place of those of the fields, for the help.
    """
    return lambda command: _with_options(command, set(names), defaults)


def _with_options(
    command: Callable[..., None], names: Collection[str], defaults: Mapping[str, Any]
) -> Callable[..., None]:
    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    fields, panel = [], ""
    for name, field in CompressConfig.model_fields.items():
        panel = PANELS.get(name, panel)
        if name not in names:
            continue
        info = typer.Option(_flag(name), help=_help(name, defaults), rich_help_panel=panel, show_default=False)
        option_type: Any = _plain_type(field.annotation) | None
        annotation: Any = Annotated[option_type, info]
        fields.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
    return command


def _flag(name: str) -> str:
    flag = "--" + name.replace("_", "-")
    return f"{flag}/--no-{name.replace('_', '-')}" if CompressConfig.model_fields[name].annotation is bool else flag


def _help(name: str, defaults: Mapping[str, Any]) -> str:
    field = CompressConfig.model_fields[name]
    text = field.description or ""
    if name in defaults:
        return f"{text} Default: {defaults[name]}."
    if field.is_required():
        return f"{text} Required."
    return text if field.default in (None, PydanticUndefined) else f"{text} Default: {field.default}."


def _plain_type(annotation: Any) -> Any:
    """The type without pydantic's annotations and None: int, float, bool, str, Path or a Literal. A mapping is text."""
    if ChatArguments in get_args(annotation):
        return str
    for part in get_args(annotation):
        if part is not type(None) and (hasattr(part, "__metadata__") or part is Path):
            return _plain_type(part)
    return getattr(annotation, "__origin__", annotation) if hasattr(annotation, "__metadata__") else annotation


def with_options_of(
    of: type[BaseModel], panels: Mapping[str, str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """As `with_config_options`, for the fields of another configuration.

    Args:
        of: its class.
        panels: the headings of the help page, by the first field under each.
    """

    def replaced(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields, panel = [], ""
        for name, field in of.model_fields.items():
            panel = panels.get(name, panel)
            needed, default = field.is_required(), field.default
            end = " Required." if needed else "" if default in (None, PydanticUndefined) else f" Default: {default}."
            flag = "--" + name.replace("_", "-")
            info = typer.Option(flag, help=f"{field.description}{end}", rich_help_panel=panel, show_default=False)
            option_type: Any = _plain_type(field.annotation) | None
            annotation: Any = Annotated[option_type, info]
            fields.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
        command.__signature__ = signature.replace(parameters=[*own, *fields])  # type: ignore[attr-defined]
        return command

    return replaced
