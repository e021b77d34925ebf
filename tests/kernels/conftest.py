"""The compiled CPU kernels, or a reason to skip their tests."""

from collections.abc import Callable
from types import ModuleType

import pytest
import torch

from softprompt_kernels.kernels.cpu import native


@pytest.fixture(scope="session")
def module() -> ModuleType:
    if native.missing():
        pytest.skip(f"the cpu backend: {native.missing()}")
    return native.module()


@pytest.fixture
def threads(module: ModuleType) -> Callable[[int], None]:
    """`threads(n)` sets how many threads work; put back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
