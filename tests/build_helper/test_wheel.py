"""The wheel that `pip wheel .` makes, with and without a C++ compiler, used from a folder of its own."""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from build_helper.compilers import INSTRUCTION_SETS

NAMES = INSTRUCTION_SETS["x86_64"].keys()
TRY_WHEEL = Path(__file__).parent / "try_wheel.py"
needs_posix = pytest.mark.skipif(os.name != "posix", reason="the compiler of the test is a shell script")


@pytest.fixture
def use(python, tmp_path):
    """Installs a wheel, calls an op, and gives the instruction set, the sum of the result, and the warnings."""

    def install_and_use(wheel):
        site = tmp_path / "site"
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--target", str(site)]
        installed = python(tmp_path, "-m", "pip", "install", *options, str(wheel))
        assert installed.returncode == 0, installed.stderr
        used = python(tmp_path, str(TRY_WHEEL), PYTHONPATH=str(site))
        assert used.returncode == 0, used.stderr
        file, *rest = used.stdout.splitlines()
        assert Path(file).is_relative_to(site)
        return rest

    return install_and_use


def compiler_that_fails(folder, knows_amx=False):
    """A C++ compiler that compiles nothing, and says whether it knows AMX."""
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-mamx-tile*" -") exit {0 if knows_amx else 1};; esac\nexit 1\n')
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="there is no C++ compiler")
def test_a_wheel_carries_the_kernels_of_every_instruction_set(sources, make_wheel, use):
    wheel = make_wheel(sources, SOFTPROMPT_CPU="1")
    assert "none-any" not in wheel.name
    isa, total, *_ = use(wheel)
    assert isa in NAMES and float(total) == 8
    if sys.platform == "linux" and shutil.which("nm"):
        check_that_no_instruction_set_shares_code(sources / "build")


def instruction_set_of(path):
    """The folder of an object that is compiled once for each instruction set; None for one that is compiled once."""
    return next((part for part in path.parts if part in NAMES), None)


def check_that_no_instruction_set_shares_code(build):
    """The linker keeps one of two functions with the same name, and it may be that of the wrong instruction set."""

    def symbols(*options):
        return subprocess.run(["nm", "-C", *options], capture_output=True, text=True, check=True).stdout

    kernels = [path for path in build.rglob("*.o") if instruction_set_of(path)]
    assert len(kernels) >= 4
    for path in kernels:
        names = [line.split(maxsplit=2)[2] for line in symbols("--defined-only", "--extern-only", path).splitlines()]
        own = f"softprompt::{instruction_set_of(path)}::"
        assert names and all(own in name for name in names), (path, names)
    modules = [path for path in build.rglob("_native*.so") if path.parent.name == "cpu"]
    assert modules
    for path in modules:
        assert "softprompt::" not in symbols("-D", "--undefined-only", path)


@needs_posix
def test_a_compiler_that_cannot_build_the_kernels_is_treated_as_none(sources, make_wheel, use, tmp_path):
    wheel = make_wheel(sources, SOFTPROMPT_CPU="auto", CXX=compiler_that_fails(tmp_path))
    isa, total, warning = use(wheel)
    assert isa == "none" and float(total) == 8 and "install a C++ compiler" in warning


def test_without_a_compiler_the_package_works_and_says_once_what_is_missing(sources, make_wheel, use):
    wheel = make_wheel(sources, SOFTPROMPT_CPU="0")
    assert wheel.name.endswith("none-any.whl")
    isa, total, warning = use(wheel)
    assert isa == "none" and float(total) == 8
    assert "install a C++ compiler" in warning


def contents(wheel):
    return set(zipfile.ZipFile(wheel).namelist())


def plant(sources, *names):
    """Files of earlier builds, in both folders that setuptools uses."""
    platlib = f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for lib in ("lib", platlib):
        for name in names:
            path = sources / "build" / lib / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"of an earlier build")


SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
STALE = (
    f"softprompt_kernels/kernels/cuda/_simt{SUFFIX}",
    f"softprompt_kernels/kernels/cuda/_native{SUFFIX}",
    f"softprompt_kernels/kernels/cpu/_native{SUFFIX}",
    "softprompt_kernels/kernels/renamed.py",
)


def test_a_wheel_holds_no_file_of_an_earlier_build(sources, make_wheel):
    plant(sources, *STALE)
    names = contents(make_wheel(sources, SOFTPROMPT_CPU="0"))
    assert not names & set(STALE)
    assert {name for name in names if name.endswith(".py")} == {
        path.relative_to(sources).as_posix() for path in (sources / "softprompt_kernels").rglob("*.py")
    }
    assert "softprompt_kernels/py.typed" in names


@needs_posix
def test_a_module_that_does_not_compile_is_not_taken_from_an_earlier_build(sources, make_wheel, tmp_path):
    plant(sources, *STALE)
    wheel = make_wheel(sources, SOFTPROMPT_CPU="auto", CXX=compiler_that_fails(tmp_path))
    assert "none-any" not in wheel.name
    assert not contents(wheel) & set(STALE)


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="only Linux on x86-64 is asked for AMX"
)
@pytest.mark.parametrize("knows_amx", [True, False])
def test_a_compiler_that_does_not_know_amx_builds_the_rest(root, python, tmp_path, knows_amx):
    """Seen in the build.ninja: the compiler of the test compiles nothing."""
    command = ["setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    python(root, *command, CXX=compiler_that_fails(tmp_path, knows_amx), SOFTPROMPT_CPU="auto")
    text = (tmp_path / "cpu" / "_native" / "build.ninja").read_text()
    assert ("amx/cpu/gemm/gemm_amx.o" in text) == ("-DSPK_HAS_AMX" in text) == knows_amx
    assert "avx512/cpu/kernel_table.o" in text


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SOFTPROMPT_CPU": "yes"}, "SOFTPROMPT_CPU must be auto, 0 or 1; got 'yes'"),
        ({"SOFTPROMPT_CPU": "1", "CXX": "/no/such/compiler"}, "SOFTPROMPT_CPU=0 installs without them"),
        ({"SOFTPROMPT_CUDA": "1", "NVCC": "/no/such/nvcc"}, "nvcc does not run"),
        ({"SOFTPROMPT_CUDA": "1", "NVCC": "echo release 12.4"}, "nvcc must be 12.8 or newer"),
        (
            {"SOFTPROMPT_CUDA": "1", "NVCC": "echo release 13.0", "SOFTPROMPT_CUDA_ARCHS": "75"},
            "SOFTPROMPT_CUDA_ARCHS must be numbers from 80 up, as in '80;86;89;90;100;120'; got '75'",
        ),
        ({"SOFTPROMPT_SIMT": "1", "CXX": "clang++"}, "there is no g++ here"),
    ],
)
def test_a_build_that_cannot_work_says_why(root, python, environment, message, tmp_path):
    command = ["setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    done = python(root, *command, **{"SOFTPROMPT_CPU": "0", **environment})
    assert done.returncode != 0 and message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
