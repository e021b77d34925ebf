"""Records the calls that the ops make to the kernels: op, backend, function and arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from softprompt_kernels.ops import dispatch

OnCall = Callable[[str, str, str, tuple[Any, ...]], None]  # op, backend, function, arguments


@contextmanager
def record_calls(on_call: OnCall) -> Iterator[None]:
    """Call `on_call(op, backend, function, arguments)` before each call of a kernel's function."""
    select = dispatch.select

    def recording_select(op: str, *arguments: Any) -> Any:
        return _RecordedKernel(select(op, *arguments), op, on_call)

    with patch.object(dispatch, "select", recording_select):
        yield


@contextmanager
def record_backends() -> Iterator[set[str]]:
    """Collect the names of the backends that serve calls."""
    names: set[str] = set()
    with record_calls(lambda op, backend, function, arguments: names.add(backend)):
        yield names


class _RecordedKernel:
    """Stands in for a kernel module: reports each call of its functions, then makes the call."""

    def __init__(self, kernel: Any, op: str, on_call: OnCall) -> None:
        self._kernel, self._op, self._on_call = kernel, op, on_call

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._kernel, name)
        module = getattr(self._kernel, "__name__", type(self._kernel).__module__)
        backend = module.split(".")[2]  # softprompt_kernels.kernels.NAME.…

        def called(*arguments: Any) -> Any:
            self._on_call(self._op, backend, name, arguments)
            return function(*arguments)

        return called if callable(function) else function
