"""The sdist, and a wheel built from it."""

import tarfile
import zipfile

import pytest

BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"


@pytest.fixture
def unpacked(sources, python, tmp_path):
    """What the sdist holds, unpacked into a folder. -P: as in pip, the folder of setup.py is not on sys.path."""
    (sources / "tests").mkdir()
    (sources / "tests" / "test_layout.py").write_text("setuptools adds such files by itself")
    done = python(sources, "-P", "-c", BUILD_SDIST, str(tmp_path), SOFTPROMPT_CPU="0")
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (folder,) = (tmp_path / "unpacked").iterdir()
    return folder


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_wheel_can_be_built_from_the_sdist(sources, unpacked, make_wheel):
    for name in ("build_helper", "csrc", "softprompt_kernels"):
        assert files(unpacked / name) == {file for file in files(sources / name) if "__pycache__" not in file}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "PKG-INFO"} <= files(unpacked)
    assert not (unpacked / "tests").exists()
    wheel = make_wheel(unpacked, SOFTPROMPT_CPU="0")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {name.removeprefix("softprompt_kernels/") for name in names if ".dist-info/" not in name} == files(
        sources / "softprompt_kernels"
    )
