"""A copy of the sources to build from, an environment without the variables of the build, and pip."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("build_helper", "csrc", "softprompt_kernels")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
VARIABLES = ("CXX", "NVCC", "CXXFLAGS", "LDFLAGS", "CUDA_HOME", "CUDA_PATH", "PYTHONPATH")

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of the build is set, and the CUDA kernels are not built."""
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith("SOFTPROMPT"))]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SOFTPROMPT_CUDA", "0")


@pytest.fixture
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of the sources without compiled modules, in a folder with a space in its name."""
    copy = tmp_path / "the sources"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def python() -> Run:
    """Runs Python in a folder, with more environment variables, and gives what it printed."""

    def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


@pytest.fixture
def make_wheel(python: Run, tmp_path: Path) -> Callable[..., Path]:
    """Makes a wheel of a folder of sources with `pip wheel`, which must succeed."""

    def make(folder: Path, **environment: str) -> Path:
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]
        wheels = tmp_path / "wheels"
        made = python(folder, "-m", "pip", "wheel", ".", *options, "--wheel-dir", str(wheels), **environment)
        assert made.returncode == 0, made.stdout + made.stderr
        (wheel,) = wheels.glob("*.whl")
        return wheel

    return make


@pytest.fixture
def without_packages(tmp_path: Path) -> Callable[..., str]:
    """A PYTHONPATH that hides installed packages: each is replaced by a module that cannot be imported."""

    def hide(*names: str) -> str:
        folder = tmp_path / "hidden packages"
        folder.mkdir()
        for name in names:
            (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})\n")
        return str(folder)

    return hide
