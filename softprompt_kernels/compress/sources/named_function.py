"""A function of the user by its name, "package.module:function": a loss, or a dissimilarity of answers.

Its module is imported, which runs it with the rights of the process. So a name in a configuration of somebody else's is
as good as a program of theirs. The current folder is searched first, as `python -m` does it.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, cast

from softprompt_kernels.errors import SoftPromptError


def load_function(option: str, name: str, signature: str) -> Callable[..., Any]:
    """The function that `name` ("package.module:function") names.

    Args:
        option: for messages.
        name: of the function; a method or a nested class has more dots behind the colon.
        signature: what is accepted, for messages.

    Raises:
        SoftPromptError: the name has another form, the module cannot be imported, or has no such function.
    """
    module_name, _, path = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise SoftPromptError(f"{option}: got {name!r}, accepted is package.module:function, {signature}")
    try:
        with _current_folder():
            module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # the module is the user's: it may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise SoftPromptError(
            f"{option}: cannot import {module_name!r} ({reason}), accepted is package.module:function, where the "
            "module is installed or in the current folder"
        ) from error
    try:
        function = reduce(getattr, path.split("."), cast(Any, module))
    except AttributeError as error:
        place = getattr(module, "__file__", None) or module_name
        raise SoftPromptError(
            f"{option}: {module_name!r} has no {path!r}, accepted is the name of a function in {place}"
        ) from error
    if not callable(function):
        raise SoftPromptError(f"{option}: {name} is of type {type(function).__name__}, accepted is {signature}")
    return cast(Callable[..., Any], function)


@contextmanager
def _current_folder() -> Iterator[None]:
    """Within the context, modules are searched in the current folder first."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
