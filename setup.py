"""Build script: metadata lives in pyproject.toml; native extensions are added here as they land.

The extensions are pybind11 modules on raw pointers, so building needs no torch.
"""

from setuptools import setup

setup()
