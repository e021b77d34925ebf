"""Which compilers are found, and what they are asked."""

import os
import stat
import sys

import pytest

from build_helper import compilers

pytestmark = pytest.mark.skipif(os.name != "posix", reason="the compilers of the tests are shell scripts")


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a shell script on PATH, on which nothing else is, and gives its path."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def add(name, body=":", folder=folder):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{body}\n")
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        return str(file)

    return add


def test_gcc_is_preferred_to_clang_and_clang_to_any_other(program):
    assert compilers.cxx() is None
    for name in ("c++", "clang++", "g++"):
        program(name)
        assert compilers.cxx() == name


def test_cxx_names_the_compiler(program, monkeypatch):
    program("g++")
    monkeypatch.setenv("CXX", "ccache clang++")
    assert compilers.cxx() == "ccache clang++"
    monkeypatch.setenv("CXX", "")
    assert compilers.cxx() == "g++"


@pytest.mark.parametrize(
    ("version", "clang"),
    [
        ("g++ (Debian 12.2.0-14) 12.2.0", False),
        ("Apple clang version 16.0.0 (clang-1600.0.26.3)", True),
        ("Debian clang version 14.0.6", True),
    ],
)
def test_a_compiler_is_judged_by_what_it_says_and_not_by_its_name(program, version, clang):
    program("c++", f'echo "{version}"')
    assert compilers.is_clang() is clang
    assert compilers.openmp_flag() == ("" if clang else "-fopenmp")


@pytest.mark.parametrize(("name", "clang"), [("/no/such/clang++-18", True), ("/no/such/g++", False)])
def test_a_compiler_that_does_not_run_is_judged_by_its_name(monkeypatch, name, clang):
    monkeypatch.setenv("CXX", name)
    assert compilers.is_clang() is clang


@pytest.fixture
def machine(monkeypatch):
    def pretend(system, machine):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(compilers.platform, "machine", lambda: machine)

    return pretend


KNOWS_AMX = 'case "$*" in *-mamx-tile*-mamx-bf16*" -") exit 0;; esac; exit 1'


@pytest.mark.parametrize(
    ("system", "name", "names"),
    [
        ("linux", "x86_64", ["amx", "avx512", "avx2", "baseline"]),
        ("darwin", "x86_64", ["avx512", "avx2", "baseline"]),  # no system call that asks for AMX
        ("linux", "aarch64", ["baseline"]),
        ("darwin", "arm64", ["baseline"]),
        ("linux", "riscv64", ["baseline"]),
    ],
)
def test_instruction_sets_of_a_platform(program, machine, system, name, names):
    program("c++", KNOWS_AMX)
    machine(system, name)
    assert list(compilers.instruction_sets()) == names


def test_amx_is_left_out_if_the_compiler_does_not_know_it(program, machine):
    program("c++", "exit 1")
    machine("linux", "x86_64")
    assert list(compilers.instruction_sets()) == ["avx512", "avx2", "baseline"]


def test_flags_of_an_instruction_set_include_those_of_the_ones_below_it():
    sets = {name: set(flags.split()) for name, flags in compilers.INSTRUCTION_SETS["x86_64"].items()}
    assert sets["baseline"] <= sets["avx2"] <= sets["avx512"] <= sets["amx"]
    assert {"-mavx2", "-mfma"} == sets["avx2"]


def test_nvcc_is_looked_for_on_path_and_in_cuda_home(program, monkeypatch, tmp_path):
    monkeypatch.setattr(compilers, "DEFAULT_CUDA_HOME", str(tmp_path / "usr" / "local" / "cuda"))
    assert compilers.nvcc() is None
    assert compilers.nvcc_problem() == "there is no nvcc here (install the CUDA toolkit, or set CUDA_HOME)"
    places = [tmp_path / "usr" / "local" / "cuda", tmp_path / "cuda path", tmp_path / "cuda home"]
    for place, variable in zip(places, (None, "CUDA_PATH", "CUDA_HOME"), strict=True):
        found = program("nvcc", folder=place / "bin")
        if variable:
            monkeypatch.setenv(variable, str(place))
        assert compilers.nvcc() == found
    found = program("nvcc")
    assert compilers.nvcc() == found
    monkeypatch.setenv("NVCC", "ccache nvcc")
    assert compilers.nvcc() == "ccache nvcc"


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        ("Cuda compilation tools, release 12.8, V12.8.93", None),
        ("Cuda compilation tools, release 13.0, V13.0.1", None),
        ("Cuda compilation tools, release 12.6, V12.6.20", "nvcc must be 12.8 or newer"),
        ("Cuda compilation tools, release 9.10, V9.10.1", "nvcc must be 12.8 or newer"),
        ("no version at all", "it says 'no version at all'"),
        ("", "it says ''"),
    ],
)
def test_the_version_of_nvcc(program, output, problem):
    program("nvcc", f'echo "{output}"')
    found = compilers.nvcc_problem()
    assert found is None if problem is None else problem in found


def test_an_nvcc_that_does_not_run(monkeypatch):
    monkeypatch.setenv("NVCC", "/no/such/nvcc")
    assert compilers.nvcc_problem().startswith("nvcc does not run (")
