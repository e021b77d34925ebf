"""`python -m tests.affected [--base REV] [--slow] [--list] [pytest's arguments]`: runs the tests that a change needs.

The changed files are those that differ from the commit where this branch left REV (default: origin/main), committed or
not, and new files that git does not ignore. What each needs:

    a test, a conftest.py         the test itself, the folder of the conftest.py
    a file of the package         the tests that mirror its folder, and those of the layers right above it
    anything that RULES names     as it says there
    anything else                 all tests

tests/test_layout.py and tests/test_docstrings.py always run. Tests marked `slow` run with --slow alone. If Triton
kernels or what they use have changed, a second run tests them in Triton's interpreter. `make test` before a merge runs
everything.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
ALL = ("tests",)
PEERS = ("tests/peers",)
ALWAYS = ("tests/test_layout.py", "tests/test_docstrings.py")
PAGES = ("tests/test_docs.py", "tests/test_pages.py", "tests/test_site.py")
OPS = ("tests/ops", "tests/traps/attention", "tests/traps/losses", "tests/traps/ops")

# Beginning of a path -> its tests. The longest beginning that fits counts.
RULES: dict[str, tuple[str, ...]] = {
    "softprompt_kernels/": ALL,
    "softprompt_kernels/cli/": ("tests/cli",),
    "softprompt_kernels/testing/": ("tests/testing", "tests/bench", "tests/benchmarks"),
    "softprompt_kernels/bench/": ("tests/bench", "tests/benchmarks", "tests/cli"),
    "softprompt_kernels/compress/": ("tests/compress", "tests/traps/compress", "tests/cli"),
    "softprompt_kernels/formats/": ("tests/formats", "tests/cli"),
    "softprompt_kernels/serve/": ("tests/serve", "tests/cli"),
    "softprompt_kernels/profiling/": ("tests/profiling", "tests/cli"),
    "softprompt_kernels/integrations/": ("tests/integrations", "tests/examples"),
    "softprompt_kernels/models/": ("tests/models", "tests/integrations", "tests/traps/models", "tests/compress"),
    "softprompt_kernels/models/decode/": ("tests/models", "tests/serve", "tests/compress"),
    "softprompt_kernels/prompts/": ("tests/prompts", "tests/models", "tests/traps/models", "tests/compress", *PEERS),
    "softprompt_kernels/losses/": ("tests/losses", "tests/examples"),
    "softprompt_kernels/ops/": (*OPS, "tests/kernels", "tests/losses", "tests/models", *PEERS),
    "softprompt_kernels/kernels/": ("tests/kernels", *OPS),
    "softprompt_kernels/kernels/ranges.py": ("tests/profiling", "tests/kernels", *OPS),
    "softprompt_kernels/kernels/cpu/": ("tests/kernels/cpu", *OPS),
    "softprompt_kernels/kernels/cuda/": ("tests/kernels/cuda", "tests/simt", "tests/mutants", *OPS),
    "softprompt_kernels/kernels/triton/": ("tests/kernels/triton", "tests/benchmarks", *OPS),
    "softprompt_kernels/kernels/triton/compile/": ("tests/kernels/triton", "tests/cli"),
    "csrc/": ("tests/kernels", "tests/simt", "tests/mutants", *OPS),
    "csrc/cpu/": ("tests/kernels/cpu", *OPS),
    "csrc/bindings/cpu": ("tests/kernels/cpu", *OPS),
    "csrc/cuda/": ("tests/kernels/cuda", "tests/simt", "tests/mutants", *OPS),
    "csrc/simt/": ("tests/kernels/cuda", "tests/simt", "tests/mutants", *OPS),
    "csrc/bindings/cuda": ("tests/kernels/cuda", "tests/simt", "tests/mutants", *OPS),
    "benchmarks/": ("tests/benchmarks",),
    "benchmarks/serve/": ("tests/serve",),
    "examples/": ("tests/examples",),
    "build_helper/": ("tests/build_helper",),
    "setup.py": ("tests/build_helper",),
    "MANIFEST.in": ("tests/build_helper",),
    "pyproject.toml": ("tests/build_helper", "tests/test_workflows.py"),
    "Makefile": ("tests/test_workflows.py", *PAGES),
    ".ci/": ("tests/test_workflows.py",),
    ".github/": ("tests/test_workflows.py",),
    ".pre-commit-config.yaml": ("tests/test_workflows.py",),
    "README.md": PAGES,
    "docs/": PAGES,
    "docs/notebook.ipynb": (*PAGES, "tests/test_notebook.py"),
    "mkdocs.yml": ("tests/test_site.py",),
    "docs/study.md": (*PAGES, "tests/benchmarks"),
    "demo/": PAGES,
    "CONTRIBUTING.md": PAGES,
    "CHANGELOG.md": PAGES,
    "LICENSE": (*PAGES, "tests/build_helper"),
    ".gitignore": (),
    "tests/affected.py": ("tests/test_affected.py",),
    "tests/ranks.py": ("tests/ops/test_sharded.py", "tests/compress/parallel"),
}
# What Triton's kernels are built on, and tests that run them: a change here needs the run in the interpreter too.
INTERPRETED = (
    *(f"softprompt_kernels/kernels/{name}" for name in ("triton/", "device/", "problems/", "reference/", "moments.py")),
    "softprompt_kernels/ops/",
    "benchmarks/counted/",
    *(f"tests/{name}" for name in ("kernels/triton/", "kernels/conftest.py", "ops/", "traps/", "benchmarks/")),
)
INTERPRETER_TESTS = ("tests/kernels", "tests/ops", "tests/traps", "tests/benchmarks")  # the folders of `make test`
CUDA = ("softprompt_kernels/kernels/cuda/", "csrc/cuda/", "csrc/simt/", "csrc/bindings/cuda", "tests/mutants/")


def tests_of(path: str) -> tuple[str, ...]:
    """The tests that a changed file needs: files and folders, relative to the root."""
    rule = max((beginning for beginning in RULES if path.startswith(beginning)), key=len, default=None)
    if rule is not None:
        return RULES[rule]
    folder, _, name = path.rpartition("/")
    if not path.startswith("tests/"):
        return ALL
    return (path,) if name.startswith("test_") and (ROOT / path).is_file() else (existing(folder),)


def existing(folder: str) -> str:
    """The folder, or the next one above it that is still there."""
    while not (ROOT / folder).is_dir():
        folder = folder.rpartition("/")[0]
    return folder


def needed(changed: Iterable[str]) -> list[str]:
    """The tests that changed files need, none twice, none below another."""
    tests = {test for path in changed for test in tests_of(path)}
    if tests:
        tests.update(ALWAYS)
    return sorted(test for test in tests if not any(test.startswith(f"{other}/") for other in tests))


def interpreted(changed: Iterable[str], tests: Iterable[str]) -> list[str]:
    """The tests that run once more in Triton's interpreter."""
    if "tests" in tests:
        return list(INTERPRETER_TESTS)
    if not any(path.startswith(INTERPRETED) for path in changed):
        return []
    return [test for test in tests if f"{test}/".startswith(tuple(f"{folder}/" for folder in INTERPRETER_TESTS))]


def changed_files(base: str, root: Path = ROOT) -> list[str]:
    """Files that differ from where this branch left `base`, and new ones."""

    def git(*arguments: str) -> list[str]:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"git: {done.stderr.strip()}\nName the commit to compare with, as in `make changed BASE=HEAD~1`.")
        return [path for path in done.stdout.split("\0") if path]

    changed = git("diff", "--name-only", "--no-renames", "--merge-base", "-z", base, "--")
    return sorted({*changed, *git("ls-files", "--others", "--exclude-standard", "-z")})


def run(tests: list[str], arguments: list[str], **environment: str) -> int:
    """pytest's exit status; 0 if it finds no tests that fit."""
    command = [sys.executable, "-m", "pytest", *arguments, *tests]
    print(*(f"{name}={value}" for name, value in environment.items()), *command[1:], flush=True)
    status = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
    return 0 if status == 5 else status


def main(arguments: list[str] | None = None) -> int:
    """Runs the tests, or lists them."""
    parser = argparse.ArgumentParser(prog="python -m tests.affected", description=(__doc__ or "").partition(": ")[2])
    parser.add_argument("--base", default="origin/main", help="the commit to compare with")
    parser.add_argument("--slow", action="store_true", help="run the tests marked slow, too")
    parser.add_argument("--list", action="store_true", help="list the tests and run none")
    options, pytest_arguments = parser.parse_known_args(arguments)
    changed = changed_files(options.base)
    tests = needed(changed)
    if not tests:
        print(f"nothing that a test reads has changed since {options.base}")
        return 0
    if options.list:
        print(*tests, sep="\n")
        return 0
    slow = [] if options.slow else ["-m", "not slow"]
    status = run(tests, [*pytest_arguments, *slow])
    again = interpreted(changed, tests)
    if again:
        only = ["-k", "triton or counted"]
        status = run(again, [*pytest_arguments, *slow, *only], TRITON_INTERPRET="1") or status
    if any(path.startswith(CUDA) for path in changed):
        print("CUDA kernels have changed: run `make simt`, which compiles them for the host, and `make mutants`.")
    return status


if __name__ == "__main__":
    sys.exit(main())
