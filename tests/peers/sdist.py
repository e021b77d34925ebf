"""The source distributions of other packages, which hold their tests.

`source("liger-kernel")` downloads the version that constraints.txt names with pip, unpacks it into .cache/peers (which
git ignores) and gives the folder. What is there is used again. Nothing is built or installed.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "peers"


class UnavailableError(Exception):
    """The package cannot be downloaded here."""


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.split("==")[1].strip() for line in lines if line.startswith(f"{package}=="))


def source(package: str) -> Path:
    """The unpacked source distribution.

    Raises:
        UnavailableError: pip cannot get it, in pip's words.
    """
    version = pinned(package)
    folder = CACHE / f"{package}-{version}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        options = "--quiet --disable-pip-version-check --retries 1 --no-deps --no-binary :all: --no-build-isolation"
        command = [sys.executable, "-m", "pip", "download", *options.split(), "--dest", temporary]
        done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"pip cannot download {package}=={version}: {done.stderr.strip()[-300:]}")
        (archive,) = Path(temporary).glob("*.tar.gz")
        with tarfile.open(archive) as content:
            content.extractall(Path(temporary) / "content", filter="data")
        (unpacked,) = (Path(temporary) / "content").iterdir()
        shutil.move(unpacked, folder)  # one rename: the cache is on the same disk
    return folder
