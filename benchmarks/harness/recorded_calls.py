"""Sees what the ops ask of the kernels: which backend serves a call, and with which arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from softprompt_kernels.ops import dispatch

Seen = Callable[[str, str, str, tuple[Any, ...]], None]


@contextmanager
def watched(seen: Seen) -> Iterator[None]:
    """Calls `seen(op, backend, function, arguments)` before each call of a kernel's function."""
    select = dispatch.select

    def watched_select(op: str, *arguments: Any) -> Any:
        return _Watched(select(op, *arguments), op, seen)

    with patch.object(dispatch, "select", watched_select):
        yield


@contextmanager
def served_by() -> Iterator[set[str]]:
    """Collects the names of the backends that serve."""
    names: set[str] = set()
    with watched(lambda op, backend, function, arguments: names.add(backend)):
        yield names


class _Watched:
    """A kernel module, as the ops see it."""

    def __init__(self, kernel: Any, op: str, seen: Seen) -> None:
        self._kernel, self._op, self._seen = kernel, op, seen

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._kernel, name)
        module = getattr(self._kernel, "__name__", type(self._kernel).__module__)
        backend = module.split(".")[2]  # softprompt_kernels.kernels.NAME.…

        def called(*arguments: Any) -> Any:
            self._seen(self._op, backend, name, arguments)
            return function(*arguments)

        return called if callable(function) else function
