"""The text of a build.ninja, and what ninja makes of it."""

import os
import sys
from pathlib import Path

import pytest

from build_helper.ninja import IN, OPTIONS, OUT, Plan, Unit, literal, ninja_file, path

PLAN = Plan(
    {"compile": f"cc {OPTIONS} -c {IN} -o {OUT}", "link": f"cc {IN} -o {OUT}"},
    [Unit("cpu/gemm/gemm.cpp", "neutral", "compile"), Unit("cpu/gemm/gemm.cpp", "avx2", "compile", "-mavx2")],
)


def test_the_whole_text():
    assert ninja_file(PLAN, Path("/csrc"), Path("/lib/_native.so")).splitlines() == [
        "rule compile",
        "  command = cc $options -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = cc $in -o $out",
        "build neutral/cpu/gemm/gemm.o: compile /csrc/cpu/gemm/gemm.cpp",
        "  options = ",
        "build avx2/cpu/gemm/gemm.o: compile /csrc/cpu/gemm/gemm.cpp",
        "  options = -mavx2",
        "build /lib/_native.so: link neutral/cpu/gemm/gemm.o avx2/cpu/gemm/gemm.o",
    ]


@pytest.mark.parametrize(
    ("name", "escaped"),
    [("/a b/c", "/a$ b/c"), ("C:/a", "C$:/a"), ("/$in/a", "/$$in/a"), ("/a$ b:c", "/a$$$ b$:c"), ("/a", "/a")],
)
def test_spaces_colons_and_dollars_of_a_path_are_escaped(name, escaped):
    assert path(Path(name)) == escaped


def test_every_dollar_of_a_literal_is_escaped():
    assert literal("-I$HOME '$in' $out $") == "-I$$HOME '$$in' $$out $$"


@pytest.mark.skipif(os.name != "posix", reason="the commands are those of a Unix shell")
@pytest.mark.parametrize("folder", ["a b", "a:b", "a$b", "$in", "a $out: b"])
def test_ninja_builds_in_a_folder_with_any_name(python, tmp_path, folder):
    """Each object is a copy of its source with the options before it; the module has all of them in a row."""
    csrc, out = tmp_path / folder / "csrc", tmp_path / folder / "lib"
    csrc.mkdir(parents=True)
    out.mkdir()
    (csrc / "a.cpp").write_text("source\n")
    note = literal(f"'{tmp_path / folder}'")
    compile_ = f"(echo {OPTIONS} {note}; cat {IN}) > {OUT} && touch {OUT}.d"
    plan = Plan({"compile": compile_, "link": f"cat {IN} > {OUT}"}, [Unit("a.cpp", "x", "compile", "'$in' one")])
    (tmp_path / "build.ninja").write_text(ninja_file(plan, csrc, out / "module"))
    done = python(tmp_path, "-m", "ninja", "-C", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert (out / "module").read_text() == f"$in one {tmp_path / folder}\nsource\n"


def test_the_copy_of_ninja_is_the_packages(python, tmp_path):
    """The build runs `python -m ninja`, whatever is on PATH."""
    assert python(tmp_path, "-m", "ninja", "--version", PATH="").returncode == 0, sys.executable
