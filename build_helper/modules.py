"""The compiled modules, and which of them a build makes.

    softprompt_kernels.kernels.cpu._native    csrc/cpu: C++ for CPUs
    softprompt_kernels.kernels.cuda._native   csrc/cuda: CUDA C++ for NVIDIA GPUs
    softprompt_kernels.kernels.cuda._simt     csrc/cuda and csrc/simt: the CUDA kernels on the CPU, for tests

    SOFTPROMPT_CPU    auto (default): build them if it is possible; 1: it is an error if not; 0: do not build them
    SOFTPROMPT_CUDA   auto (default): build them if there are nvcc (12.8 or newer) and an NVIDIA driver;
                      1: build them without a driver too, it is an error if that is not possible; 0: do not build them
    SOFTPROMPT_SIMT   1: build the module for tests; 0 (default): do not

Every module needs the Python packages pybind11 and ninja. pip installs them for its isolated builds.
Without the modules the package works, more slowly, on other kernels; `softprompt doctor` says so.
"""

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

from setuptools import Extension

from build_helper import compilers, plans
from build_helper.ninja import Plan

PACKAGES = ("pybind11", "ninja")


def cxx_problem() -> str | None:
    """Why C++ cannot be compiled here, None if it can."""
    if os.name == "posix" and compilers.cxx() is not None:
        return None
    return "there is no C++ compiler here (install g++ or clang++)"


def simt_problem() -> str | None:
    """Why the CUDA kernels cannot be compiled for the host, None if they can."""
    if sys.platform != "linux":
        return "they are built on Linux alone"
    if compilers.cxx() is None or compilers.is_clang():
        return "there is no g++ here (install it, or name it by CXX)"
    return None


def package_problem(package: str) -> str | None:
    """Why a Python package of the build cannot be used, None if it can."""
    try:
        importlib.import_module(package)
    except ModuleNotFoundError:
        return f"there is no {package} for this Python (pip install {package})"
    except Exception as error:
        return f"{package} cannot be imported: {error}"
    return None


@dataclass(frozen=True)
class Module:
    """A compiled module, the variable that asks for it, and what it needs."""

    name: str
    variable: str
    default: str
    content: str
    advice: str  # what to do if it does not compile
    compiler_problem: Callable[[], str | None]
    useful: Callable[[], bool]  # whether `auto` builds it if it can be built
    plan: Callable[[], Plan]

    @property
    def choice(self) -> str:
        """auto, 0 or 1."""
        return os.environ.get(self.variable, self.default)

    def problems(self) -> list[str]:
        """What is missing to build it, all at once."""
        found = (self.compiler_problem(), *(package_problem(package) for package in PACKAGES))
        return [problem for problem in found if problem is not None]

    def wanted(self) -> bool:
        """Whether to build it. Exits with a message if it must be built and cannot."""
        if self.choice not in ("auto", "0", "1"):
            sys.exit(f"{self.variable} must be auto, 0 or 1; got {self.choice!r}")
        if self.choice == "0" or (self.choice == "auto" and not self.useful()):
            return False
        problems = " and ".join(self.problems())
        if problems and self.choice == "1":
            sys.exit(f"{self.variable}=1 asks for the {self.content}, but {problems}")
        if problems:
            print(f"softprompt-kernels: {problems}, so the {self.content} are left out.", file=sys.stderr)
        return not problems


MODULES = (
    Module(
        "softprompt_kernels.kernels.cpu._native",
        "SOFTPROMPT_CPU",
        "auto",
        "CPU kernels",
        "CXX names another compiler, SOFTPROMPT_CPU=0 installs without them",
        cxx_problem,
        lambda: True,
        plans.cpu_plan,
    ),
    Module(
        "softprompt_kernels.kernels.cuda._native",
        "SOFTPROMPT_CUDA",
        "auto",
        "CUDA kernels",
        "NVCC names another compiler, SOFTPROMPT_CUDA=0 installs without them",
        compilers.nvcc_problem,
        lambda: compilers.nvcc() is not None and compilers.has_driver(),
        plans.cuda_plan,
    ),
    Module(
        "softprompt_kernels.kernels.cuda._simt",
        "SOFTPROMPT_SIMT",
        "0",
        "CUDA kernels for the host",
        "CXX names another g++, SOFTPROMPT_SIMT=0 installs without them",
        simt_problem,
        lambda: True,
        plans.simt_plan,
    ),
)


def extensions() -> list[Extension]:
    """The modules that this build makes, as setuptools wants them."""
    return [Extension(module.name, []) for module in MODULES if module.wanted()]
