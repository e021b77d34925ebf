"""The reader of details.json and diagnosis.json: a file of JSON with a "format" and the fields of a pydantic model."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from softprompt_kernels.compress.text_file import read_utf8
from softprompt_kernels.errors import SoftPromptError

Record = TypeVar("Record", bound=BaseModel)


class _Head(BaseModel):
    model_config = ConfigDict(extra="ignore")

    format: int


def read_record(path: Path, kind: type[Record], accepted: int) -> Record:
    """The content of a file.

    Args:
        path: the file.
        kind: its model, which has a field "format".
        accepted: the format that can be read.

    Raises:
        SoftPromptError: there is no such file, or it is broken or of another format.
    """
    text = read_utf8(path, str(path))
    try:
        found = _Head.model_validate_json(text).format
        if found != accepted:  # before its fields, which another format has others of
            raise SoftPromptError(f"{path} has format {found}, accepted is {accepted}")
        return kind.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise SoftPromptError(f"{path} cannot be read: {place}: {first['msg']}") from error
