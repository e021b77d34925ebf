"""A build without a C++ compiler, without pybind11 or without ninja."""

import pytest

MESSAGES = {
    "compiler": "there is no C++ compiler here (install g++ or clang++)",
    "pybind11": "there is no pybind11 for this Python (pip install pybind11)",
    "ninja": "there is no ninja for this Python (pip install ninja)",
}


@pytest.fixture
def without(without_packages):
    """The environment of a build that lacks some tools."""

    def environment(*tools):
        packages = without_packages(*(tool for tool in tools if tool != "compiler"))
        return {"PYTHONPATH": packages} | ({"PATH": ""} if "compiler" in tools else {"CXX": "c++"})

    return environment


def build(python, root, folder, **environment):
    return python(
        root, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder), **environment
    )


@pytest.mark.parametrize("tool", MESSAGES)
def test_one_sentence_says_what_is_missing_and_the_kernels_are_left_out(root, python, without, tool, tmp_path):
    done = build(python, root, tmp_path / "built", SOFTPROMPT_CPU="auto", **without(tool))
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"softprompt-kernels: {MESSAGES[tool]}, so the CPU kernels are left out.\n"
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize("tool", MESSAGES)
def test_a_missing_tool_is_an_error_when_the_kernels_are_asked_for(root, python, without, tool, tmp_path):
    done = build(python, root, tmp_path / "built", SOFTPROMPT_CPU="1", **without(tool))
    assert done.returncode != 0
    assert done.stderr == f"SOFTPROMPT_CPU=1 asks for the CPU kernels, but {MESSAGES[tool]}\n"


def test_an_error_names_all_that_is_missing(root, python, without, tmp_path):
    done = build(python, root, tmp_path / "built", SOFTPROMPT_CPU="1", **without(*MESSAGES))
    assert done.returncode != 0
    assert done.stderr.strip().endswith(", but " + " and ".join(MESSAGES.values()))


@pytest.mark.parametrize(("version", "refused"), [("65.5.0", True), ("76.1.0", True), ("77.0.1", False)])
def test_a_setuptools_that_cannot_read_the_metadata_is_refused_in_one_sentence(root, python, version, refused):
    program = f"""
import runpy, sys, setuptools
setuptools.__version__ = "{version}"
sys.argv = ["setup.py", "-q", "--name"]
runpy.run_path("setup.py", run_name="__main__")
"""
    done = python(root, "-c", program, SOFTPROMPT_CPU="0")
    if refused:
        assert done.stderr == (
            f"softprompt-kernels: setuptools is {version}, accepted is 77 or newer (pip install 'setuptools>=77')\n"
        )
    assert (done.returncode != 0) == refused, done.stderr


def test_a_build_that_leaves_the_kernels_out_needs_no_tool(root, python, without, tmp_path):
    done = build(python, root, tmp_path / "built", SOFTPROMPT_CPU="0", **without(*MESSAGES))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("tool", MESSAGES)
def test_pip_makes_a_wheel_without_the_tool(sources, make_wheel, without, tool):
    """With --no-build-isolation, where pip does not install pybind11 and ninja."""
    assert make_wheel(sources, SOFTPROMPT_CPU="auto", **without(tool)).name.endswith("none-any.whl")


@pytest.mark.parametrize("tool", MESSAGES)
def test_pip_fails_with_the_message_when_the_kernels_are_asked_for(sources, python, without, tool, tmp_path):
    options = ["--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    done = python(sources, "-m", "pip", "wheel", ".", *options, SOFTPROMPT_CPU="1", **without(tool))
    assert done.returncode != 0
    assert f"SOFTPROMPT_CPU=1 asks for the CPU kernels, but {MESSAGES[tool]}" in done.stdout + done.stderr
