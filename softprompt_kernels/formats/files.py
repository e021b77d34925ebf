"""Read a prompt of any format. The format is found from the content, not from the name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats import cartridges, peft, plain, vllm
from softprompt_kernels.formats.content import DESCRIPTIONS, FORMATS, Content, FirstQuery, FormatName
from softprompt_kernels.formats.torch_file import load_tensors
from softprompt_kernels.prompts.adapter import CONFIG, RECORD
from softprompt_kernels.prompts.atomic_folder import recover

_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"


def read(path: str | Path, expected: FormatName | None = None, first_query: FirstQuery = "k") -> Content:
    """The prompt in a file or a folder.

    Args:
        path: what holds it.
        expected: the format that it must have; None: any. "peft" and "folder" are read alike.
        first_query: for caches of Cartridges, see `cartridges.read`.

    Raises:
        SoftPromptError: there is nothing, or it is of none of the formats or not of the expected one, or damaged.
    """
    where = Path(path)
    found, loaded = _opened(where)
    if expected is not None and found != expected and {found, expected} != {"peft", "folder"}:
        raise SoftPromptError(f"{path} is {DESCRIPTIONS[found]}, accepted is {DESCRIPTIONS[expected]} (--from {found})")
    if found in ("peft", "folder"):
        return peft.read(where)
    if found == "safetensors":
        return plain.read(where)
    return cartridges.read(where, loaded, first_query) if found == "cartridges" else vllm.read(where, loaded)


def _opened(path: Path) -> tuple[FormatName, Any]:
    """The format of a file or a folder, by its content, and what torch.load gave for it (None for other formats).

    Raises:
        SoftPromptError: as in `read`.
    """
    recover(path)
    if path.is_dir():
        if (path / CONFIG).is_file():
            return "folder" if (path / RECORD).is_file() else "peft", None
        inside = " (it holds one: prompt)" if (path / "prompt" / CONFIG).is_file() else ""
        raise SoftPromptError(f"{path} is a folder without {CONFIG}, so it is no prompt{inside}; {accepted()}")
    if not path.exists():
        raise SoftPromptError(f"{path} does not exist")
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise SoftPromptError(f"{path} cannot be read: {error.strerror or error}") from error
    if start.startswith((_ZIP, _PICKLE)):
        loaded = load_tensors(path)
        return _format_of_tensors(path, loaded), loaded
    if plain.is_plain(path):
        return "safetensors", None
    if path.name.endswith(".safetensors"):
        plain.read(path)  # says what is wrong with it
    raise SoftPromptError(f"{path} is no prompt; {accepted()}")


def known_format(path: Path) -> FormatName | None:
    """The format of a file or a folder; None for what is of no format, is damaged, or does not exist."""
    try:
        return _opened(path)[0]
    except SoftPromptError:
        return None


def accepted() -> str:
    """The formats, as the end of a message."""
    return f"accepted formats are {', '.join(FORMATS)}"


def _format_of_tensors(path: Path, loaded: Any) -> FormatName:
    if cartridges.is_cache(loaded):
        return "cartridges"
    if isinstance(loaded, Tensor):
        return "vllm-embeds"
    found = f"a {type(loaded).__name__}"
    if isinstance(loaded, dict):
        found += f" with {', '.join(map(str, list(loaded)[:3])) or 'nothing'}"
    raise SoftPromptError(f"{path} is a file of torch.save with {found}, so it is no prompt; {accepted()}")
