"""JSON files: written as strict JSON, and checked when read, because people may have edited them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt_kernels.errors import SoftPromptError


def dump(value: dict[str, Any]) -> bytes:
    """Strict JSON as UTF-8, indented, keys sorted."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def to_json(name: str, value: Any) -> Any:
    """`value` with the types of strict JSON. Scalars of numpy and torch become numbers; NaN and infinities become None.

    A NaN in the figures must not stop a finished training from being saved.

    Args:
        name: name of `value` in the error message.
        value: mappings, sequences, scalars and paths, nested in any way.

    Raises:
        TypeError: JSON cannot hold some part of it; the message gives its path from `name`.
    """
    if isinstance(value, Mapping):
        return {str(key): to_json(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(f"{name}[{index}]", item) for index, item in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: got {type(value).__name__}, accepted is what JSON can hold")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        SoftPromptError: the file cannot be read, is not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SoftPromptError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise SoftPromptError(f"{file} holds {type(value).__name__}, accepted is a JSON object")
    return value


def integer(file: Path, fields: dict[str, Any], field: str, least: int) -> int:
    """The whole number `fields[field]`, of an object read from `file`.

    Raises:
        SoftPromptError: it is missing, not a whole number, or smaller than `least`.
    """
    value = fields.get(field)
    if type(value) is not int or value < least:
        raise SoftPromptError(f"{file}: {field} is {value!r}, accepted is a whole number from {least}")
    return value
