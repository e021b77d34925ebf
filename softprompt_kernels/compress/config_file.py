"""The configuration from a YAML file and the options of the command line, with errors that name every wrong field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from softprompt_kernels.compress.config import CompressConfig, ConfigLoader, accepted
from softprompt_kernels.compress.text_file import read_utf8
from softprompt_kernels.errors import SoftPromptError

Config = TypeVar("Config", bound=BaseModel)


def load_config(path: str | Path | None, overrides: Mapping[str, Any]) -> CompressConfig:
    """The configuration of a compression from a YAML file and overrides. Arguments and errors as in `load_as`."""
    return load_as(CompressConfig, path, overrides)


def load_as(of: type[Config], path: str | Path | None, overrides: Mapping[str, Any]) -> Config:
    """A configuration from a YAML file and overrides.

    Args:
        of: its class.
        path: a YAML mapping of field names to values; None for no file.
        overrides: fields that override the file.

    Raises:
        SoftPromptError: the file cannot be read or is not a YAML mapping, or a field is missing, unknown, of another
            type or out of range. The message names every wrong field with what was got and what is accepted.
    """
    values = {} if path is None else _read_yaml(Path(path))
    try:
        return of.model_validate({**values, **overrides})
    except ValidationError as error:
        # A default that could not be computed because of another wrong field is not an error of its own.
        details = [d for d in error.errors(include_url=False) if d["type"] != "default_factory_not_called"]
        # For a union, pydantic reports a field once for each type: a dict drops the repeated messages.
        messages = dict.fromkeys(_message(detail, of) for detail in details)
        in_file = path is not None and any(detail["loc"] and detail["loc"][0] in values for detail in details)
        raise SoftPromptError((f"{path}: " if in_file else "") + "; ".join(messages)) from error


def _message(detail: ErrorDetails, of: type[BaseModel]) -> str:
    """One error of pydantic as a clause of our message."""
    if detail["type"] == "combination":
        return detail["msg"]
    name = str(detail["loc"][0])
    if detail["type"] == "missing":
        return f"{name}: missing, accepted is {accepted(name, of)}"
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, of.model_fields, 1)
        return f"{name}: unknown" + (f", did you mean {close[0]}?" if close else "")
    return f"{name}: got {detail['input']!r}, accepted is {accepted(name, of)}"


def _read_yaml(path: Path) -> dict[str, Any]:
    text = read_utf8(path, str(path))
    try:
        values = yaml.load(text, Loader=ConfigLoader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SoftPromptError(f"{path} is not YAML{line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise SoftPromptError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise SoftPromptError(f"{path} is nested too deeply, accepted is a mapping of field names to values") from error
    except Exception as error:  # PyYAML lets Python's own through: a 13th month, a number of thousands of digits
        raise SoftPromptError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        got = "a list" if isinstance(values, list) else f"only {values!r}"
        raise SoftPromptError(f"{path} holds {got}, accepted is a mapping of field names to values")
    return {str(key): value for key, value in values.items()}
