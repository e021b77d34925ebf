"""Builds the compiled kernels. The metadata is in pyproject.toml, the work is done in build_helper/.

Why setuptools and ninja, and not scikit-build-core: these parts would be CMake code of about the same length, and the
build would need CMake as well:
  - the CPU kernels, compiled once for each instruction set, where a probe decides about AMX
  - the CUDA kernels, for a machine that may have nvcc but no driver, or an nvcc that is too old
  - the CUDA kernels compiled for the host by g++, with the instrumentation of ThreadSanitizer
And a CMake build that fails ends the installation. Here a module that does not compile is left out, and the package
installs and works without it.

The environment variables are described in docs/building.md.
"""

import sys
from pathlib import Path

from setuptools import setup

# pip runs this file without its folder on sys.path.
sys.path.insert(0, str(Path(__file__).parent))

from build_helper.commands import BuildModules, InstallBuiltFiles, check_setuptools
from build_helper.modules import extensions

check_setuptools()
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildModules, "install_lib": InstallBuiltFiles},
)
