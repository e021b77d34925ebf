"""What a run was made with: versions of the packages that decide its figures, and the machine."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from softprompt_kernels.bench.machine import processor

PACKAGES = ("softprompt-kernels", "torch", "transformers", "tokenizers", "safetensors", "numpy")


def made_with() -> dict[str, str]:
    """Versions by name, and "processor" and "system". A package that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"processor": processor(), "system": f"{platform.system()} {platform.machine()}"}
