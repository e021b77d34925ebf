"""Files of torch.save: read without running code from them.

A `.pt` file is a pickle in an archive. `torch.load(weights_only=True)` builds tensors, containers and plain values, and
refuses everything else by name. Cartridges saves its keys and values as `nn.ParameterList`, so that class is allowed
too: building one sets its attributes and calls nothing.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from softprompt_kernels.errors import SoftPromptError, is_out_of_memory


def load_tensors(path: Path) -> Any:
    """What torch.save wrote to a file, with its tensors on the CPU.

    Raises:
        SoftPromptError: the file is truncated or was not written by torch.save, or it holds objects that only running
            code could build.
    """
    try:
        with torch.serialization.safe_globals([nn.ParameterList]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of the zip reader, of the unpickler and of what it calls: many types
        if is_out_of_memory(error):
            raise
        text = str(error)
        if found := re.search(r"(?:Unsupported global: GLOBAL|Trying to load unsupported GLOBAL) (\S+)", text):
            raise SoftPromptError(
                f"{path} asks for {found[1]}, which is no tensor: building it could run code, so the file is refused; "
                "accepted are files of torch.save with tensors alone"
            ) from error
        reason = (text.strip() or type(error).__name__).splitlines()[0][:200]
        raise SoftPromptError(
            f"{path} is truncated or not a file of torch.save with tensors alone ({reason})"
        ) from error


def dense(place: str, value: Any) -> Tensor:
    """A tensor that such a file holds, detached.

    Args:
        place: of the tensor, for the message.
        value: what was found there.

    Raises:
        SoftPromptError: it is no tensor, or a sparse or nested one, or one without numbers (on the meta device).
    """
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta or value.is_nested:
        found = f"a {type(value).__name__}" if not isinstance(value, Tensor) else "sparse, nested or without numbers"
        raise SoftPromptError(f"{place} is {found}, accepted is a dense tensor")
    return value.detach()


def saved_bytes(value: Any) -> bytes:
    """The content of a file of torch.save. `value` has tensors, containers and plain values alone."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
