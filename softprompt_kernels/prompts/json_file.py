"""JSON that people edit and programs must survive: strict when written, checked when read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from softprompt_kernels.errors import SoftPromptError


def dump(value: dict[str, Any]) -> bytes:
    """JSON for people: indented, keys in order, strict."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def plain(name: str, value: Any) -> Any:
    """`value` as strict JSON: scalars of numpy and torch become numbers, numbers that are not finite null.

    A figure that came out as NaN must not be what a finished training is lost to.

    Args:
        name: what it is called in the error.
        value: mappings, sequences, scalars, paths, in any nesting.

    Raises:
        TypeError: something that JSON cannot hold, by its path from `name`.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(f"{name}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(f"{name}[{index}]", item) for index, item in enumerate(value)]
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
    """The object that a JSON file holds.

    Raises:
        SoftPromptError: it cannot be read, is no JSON, or holds no object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SoftPromptError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise SoftPromptError(f"{file} holds {type(value).__name__}, accepted is a JSON object")
    return value


def integer(file: Path, fields: dict[str, Any], field: str, least: int) -> int:
    """The whole number `field` of an object read from `file`.

    Raises:
        SoftPromptError: it is missing, no whole number, or below `least`.
    """
    value = fields.get(field)
    if type(value) is not int or value < least:
        raise SoftPromptError(f"{file}: {field} is {value!r}, accepted is a whole number from {least}")
    return value
