"""Compiles the kernels of this folder and csrc/simt into a Python module."""

import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-DSPK_SIMT"]
INSTRUMENTATION = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-fno-tree-sra"]
CHECKED_FLAGS = ["-O1", "-g", "-Wno-unknown-pragmas", *INSTRUMENTATION, "-x", "c++"]


def missing_requirement() -> str | None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return "csrc/simt runs on Linux on x86-64 and 64-bit Arm"
    return None if shutil.which("g++") else "there is no g++ here"


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """The module with the test kernels."""
    if missing_requirement():
        pytest.skip(str(missing_requirement()))
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("simt")
    system = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = [*FLAGS, *system, f"-I{CSRC / 'simt' / 'include'}", f"-I{CSRC}", f"-I{HERE}"]
    checked_sources = [(path, CHECKED_FLAGS) for path in sorted(HERE.glob("*.cu"))]
    plain_sources = [(path, ["-O2"]) for path in (*sorted((CSRC / "simt").rglob("*.cpp")), HERE / "module.cpp")]
    objects = []
    for path, options in (*checked_sources, *plain_sources):
        objects.append(folder / f"{path.stem}.o")
        subprocess.run(["g++", *flags, *options, "-c", str(path), "-o", str(objects[-1])], check=True)
    target = folder / f"simt_test_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(["g++", "-shared", *map(str, objects), "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location("simt_test_kernels", target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def registered(kernels):
    """`with registered(reads, writes):` launches may access the memory of these tensors."""

    @contextmanager
    def make(reads, writes):
        tensors = [(tensor, False) for tensor in reads] + [(tensor, True) for tensor in writes]
        for tensor, writable in tensors:
            kernels.register(tensor.data_ptr(), tensor.numel() * tensor.element_size(), writable)
        try:
            yield
        finally:
            for tensor, _ in tensors:
                kernels.unregister(tensor.data_ptr())

    return make
