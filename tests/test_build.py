"""What `pip wheel .` makes, with and without a C++ compiler, used from a folder of its own."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INSTRUCTION_SETS = ("amx", "avx512", "avx2", "baseline")
USE = """
import warnings, torch
from softprompt_kernels import prompt_attention
from softprompt_kernels.kernels.cpu import native
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = prompt_attention(*[torch.ones(1, 1, 2, 4)] * 5)
print(native.__file__, native.instruction_set(), out.sum().item(), *[w.message for w in caught], sep="\\n")
"""


def run(command, cwd, **environment):
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )


def install(tmp_path, **environment):
    """The sources, copied so that nothing built in place is found, as a wheel, installed into a folder."""
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir(parents=True)
    for name in ("csrc", "softprompt_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    made = run([*pip, "wheel", ".", *options], source, **environment)
    assert made.returncode == 0, made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], tmp_path).returncode == 0
    used = run([sys.executable, "-c", USE], tmp_path, PYTHONPATH=str(site))
    assert used.returncode == 0, used.stderr
    file, *said = used.stdout.splitlines()
    assert Path(file).is_relative_to(site)
    return wheel, said


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="there is no C++ compiler")
def test_a_wheel_carries_the_kernels_for_every_machine_of_its_kind(tmp_path):
    """From a folder with a space in its name."""
    wheel, (isa, total) = install(tmp_path / "a folder", SOFTPROMPT_CPU="1")
    assert "none-any" not in wheel.name
    assert isa in INSTRUCTION_SETS and float(total) == 8
    if shutil.which("nm"):
        check_that_no_instruction_set_shares_code(tmp_path / "a folder" / "source" / "build")


def instruction_set_of(path):
    """The folder of an object that is compiled once for each instruction set; None of one that is compiled once."""
    return next((part for part in path.parts if part in INSTRUCTION_SETS), None)


def check_that_no_instruction_set_shares_code(build):
    """A function with one name in the objects of several sets is linked once, and may be that of the wrong set."""
    kernels = [path for path in build.rglob("*.o") if instruction_set_of(path)]
    assert len(kernels) >= 4
    for path in kernels:
        listing = run(["nm", "-C", "--defined-only", "--extern-only", path], build).stdout
        names = [line.split(maxsplit=2)[2] for line in listing.splitlines()]
        own = f"softprompt::{instruction_set_of(path)}::"
        assert names and all(own in name for name in names), (path, names)
    modules = [path for path in build.rglob("_native*.so") if path.parent.name == "cpu"]
    assert modules
    for path in modules:
        assert "softprompt::" not in run(["nm", "-C", "-D", "--undefined-only", path], build).stdout


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the matrix unit is asked of Linux on x86"
)
@pytest.mark.parametrize("knows", [True, False])
def test_a_compiler_that_does_not_know_the_matrix_unit_builds_the_rest(tmp_path, knows):
    """Seen in what it is told to compile; it compiles nothing but the question."""
    compiler = tmp_path / "c++"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *-mamx-tile*" -") exit {0 if knows else 1};; esac\nexit 1\n')
    compiler.chmod(0o755)
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    run(command, ROOT, CXX=str(compiler), SOFTPROMPT_CPU="auto")
    rules = (tmp_path / "cpu" / "_native" / "build.ninja").read_text()
    assert ("amx/cpu/gemm/gemm_amx.o" in rules) == (
        "-DSPK_HAS_AMX" in rules
    ) == knows and "avx512/cpu/kernel_table.o" in rules


@pytest.mark.skipif(os.name != "posix", reason="the stand-in is a shell script")
def test_a_compiler_that_cannot_build_them_is_as_good_as_none(tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    _, (isa, total, warning) = install(tmp_path, SOFTPROMPT_CPU="auto", CXX=str(broken))
    assert isa == "none" and float(total) == 8 and "install a C++ compiler" in warning


def test_without_a_compiler_the_package_works_and_says_once_what_is_missing(tmp_path):
    wheel, (isa, total, warning) = install(tmp_path, SOFTPROMPT_CPU="0")
    assert wheel.name.endswith("none-any.whl")
    assert isa == "none" and float(total) == 8
    assert "install a C++ compiler" in warning and "Another one does, more slowly" in warning


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SOFTPROMPT_CPU": "yes"}, "SOFTPROMPT_CPU must be auto, 0 or 1; got 'yes'"),
        ({"SOFTPROMPT_CPU": "1", "PATH": ""}, "there is no C++ compiler here"),
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
def test_a_build_that_cannot_work_says_why(environment, message, tmp_path):
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    cleared = {name: os.environ[name] for name in os.environ if name != "CXX" and not name.startswith("SOFTPROMPT")}
    environment = {"SOFTPROMPT_CPU": "0", "SOFTPROMPT_CUDA": "0", **environment}
    done = subprocess.run(
        command, cwd=ROOT, env={**cleared, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0 and message in done.stdout + done.stderr
