"""Which modules a build makes, from the environment variables and what is there."""

import dataclasses
import os

import pytest

from build_helper import modules
from build_helper.modules import MODULES

CPU, CUDA, SIMT = MODULES
VARIABLES = {module.variable: module for module in MODULES}


@pytest.fixture
def module(monkeypatch):
    """A module that can be built, with parts replaced."""
    monkeypatch.setattr(modules, "PACKAGES", ())

    def make(**changes):
        return dataclasses.replace(CPU, compiler_problem=lambda: None, **changes)

    return make


def test_defaults():
    assert {module.variable: module.default for module in MODULES} == {
        "SOFTPROMPT_CPU": "auto",
        "SOFTPROMPT_CUDA": "auto",
        "SOFTPROMPT_SIMT": "0",
    }


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("value", ["yes", "", "2", "Auto", " 1"])
def test_another_value_is_refused(monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    with pytest.raises(SystemExit, match=f"{variable} must be auto, 0 or 1; got {value!r}"):
        VARIABLES[variable].wanted()


@pytest.mark.parametrize(("choice", "wanted"), [("auto", True), ("1", True), ("0", False)])
def test_a_module_that_can_be_built(module, monkeypatch, choice, wanted):
    monkeypatch.setenv("SOFTPROMPT_CPU", choice)
    assert module().wanted() is wanted


@pytest.mark.parametrize(("choice", "wanted"), [("auto", False), ("1", True), ("0", False)])
def test_a_module_that_is_of_no_use_here_is_built_only_if_asked_for(module, monkeypatch, capsys, choice, wanted):
    """CUDA kernels on a machine with nvcc and no driver."""
    monkeypatch.setenv("SOFTPROMPT_CPU", choice)
    assert module(useful=lambda: False).wanted() is wanted
    assert capsys.readouterr().err == ""


def test_a_module_that_cannot_be_built(module, monkeypatch, capsys):
    broken = dataclasses.replace(module(), compiler_problem=lambda: "there is no compiler")
    assert not broken.wanted()
    assert capsys.readouterr().err == "softprompt-kernels: there is no compiler, so the CPU kernels are left out.\n"
    monkeypatch.setenv("SOFTPROMPT_CPU", "1")
    with pytest.raises(SystemExit, match="SOFTPROMPT_CPU=1 asks for the CPU kernels, but there is no compiler"):
        broken.wanted()
    monkeypatch.setenv("SOFTPROMPT_CPU", "0")
    assert not broken.wanted()


def test_a_package_that_is_not_there_is_named():
    assert modules.package_problem("ninja") is None
    assert modules.package_problem("no_such_package") == (
        "there is no no_such_package for this Python (pip install no_such_package)"
    )


@pytest.mark.skipif(os.name != "posix", reason="the kernels are built on Linux and macOS")
def test_only_what_is_wanted_becomes_an_extension(monkeypatch):
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("SOFTPROMPT_CUDA", "0")
    assert [extension.name for extension in modules.extensions()] == ["softprompt_kernels.kernels.cpu._native"]
    monkeypatch.setenv("SOFTPROMPT_CPU", "0")
    assert modules.extensions() == []


@pytest.mark.parametrize(("system", "message"), [("darwin", "on Linux alone"), ("linux", "there is no g++ here")])
def test_simt_needs_gcc_on_linux(monkeypatch, system, message):
    monkeypatch.setattr(modules.sys, "platform", system)
    monkeypatch.setenv("CXX", "/no/such/clang++")
    assert message in (modules.simt_problem() or "")


def test_cuda_is_useful_with_nvcc_and_a_driver(monkeypatch):
    for nvcc, driver in ((None, True), ("nvcc", False), ("nvcc", True)):
        monkeypatch.setattr(modules.compilers, "nvcc", lambda nvcc=nvcc: nvcc)
        monkeypatch.setattr(modules.compilers, "has_driver", lambda driver=driver: driver)
        assert CUDA.useful() is (nvcc is not None and driver)


def test_simt_is_for_tests_and_not_in_a_wheel_by_default():
    assert not SIMT.wanted()
