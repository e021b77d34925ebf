"""Fixtures of the kernel tests: the compiled CPU module, the number of threads, and a guard against synchronisation."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from softprompt_kernels.kernels.cpu import native


@pytest.fixture(scope="session")
def module() -> ModuleType:
    """The compiled CPU kernels; without them the test is skipped."""
    if native.missing():
        pytest.skip(f"the cpu backend: {native.missing()}")
    return native.module()


@pytest.fixture
def threads(module: ModuleType) -> Callable[[int], None]:
    """`threads(n)` sets the number of threads of the CPU kernels. After the test the old number is set again."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def forbid_waiting(monkeypatch):
    """Everything that copies a number from the device to the host raises, except inside a launch in the interpreter."""
    from softprompt_kernels.kernels.triton.launch import Launch

    launching = []
    names = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__")

    def forbidden(owner, name):
        original = getattr(owner, name)

        def guarded(*arguments, **options):
            assert launching, f"{name} waits for the device"
            return original(*arguments, **options)

        return guarded

    for owner, forbidden_names in ((torch.Tensor, names), (torch, ("equal", "nonzero", "allclose", "is_nonzero"))):
        for name in forbidden_names:
            monkeypatch.setattr(owner, name, forbidden(owner, name))
    launch = Launch.run

    def run(self):
        launching.append(self)
        launch(self)
        launching.pop()

    monkeypatch.setattr(Launch, "run", run)
