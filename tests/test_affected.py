"""Which tests `make changed` runs."""

import subprocess
from pathlib import Path

import pytest

from tests import affected

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("changed", "tests"),
    [
        ("softprompt_kernels/cli/doctor/report.py", {"tests/cli"}),
        ("softprompt_kernels/compress/teacher/answers.py", {"tests/compress", "tests/traps/compress", "tests/cli"}),
        ("softprompt_kernels/kernels/cpu/rows.py", {"tests/kernels/cpu", *affected.OPS}),
        ("csrc/cpu/gemm/gemm.cpp", {"tests/kernels/cpu", *affected.OPS}),
        ("csrc/bindings/cpu_gemm.cpp", {"tests/kernels/cpu", *affected.OPS}),
        ("csrc/bindings/views.h", {"tests/kernels", "tests/simt", "tests/mutants", *affected.OPS}),
        ("csrc/cuda/arch.cuh", {"tests/kernels/cuda", "tests/simt", "tests/mutants", *affected.OPS}),
        ("softprompt_kernels/kernels/problems/loss.py", {"tests/kernels", *affected.OPS}),
        ("tests/ops/test_kl_div.py", {"tests/ops/test_kl_div.py"}),
        ("tests/ops/conftest.py", {"tests/ops"}),
        ("tests/ops/test_that_was_deleted.py", {"tests/ops"}),
        ("tests/a_folder/that_was/test_deleted.py", {"tests"}),
        ("tests/conftest.py", {"tests"}),
        ("softprompt_kernels/errors.py", {"tests"}),
        ("constraints.txt", {"tests"}),
        ("a_new_folder/a_file.py", {"tests"}),
    ],
)
def test_tests_of_a_changed_file(changed, tests):
    assert set(affected.tests_of(changed)) == tests


def test_no_test_is_named_twice_and_the_layout_is_always_checked():
    changed = ["tests/ops/test_kl_div.py", "tests/ops/conftest.py", "softprompt_kernels/cli/app.py"]
    assert affected.needed(changed) == ["tests/cli", "tests/ops", *sorted(affected.ALWAYS)]
    assert affected.needed(["softprompt_kernels/cli/app.py", "constraints.txt"]) == ["tests"]


def test_text_needs_the_tests_of_the_docs():
    assert affected.needed([]) == []
    assert affected.needed(["CHANGELOG.md"]) == sorted([*affected.PAGES, *affected.ALWAYS])


def test_every_rule_names_paths_that_exist():
    for beginning, tests in affected.RULES.items():
        missing = [test for test in tests if not (ROOT / test).exists()]
        assert not missing, f"{beginning}: {missing}"


def test_every_folder_of_tests_is_run_for_some_change():
    """A folder that no rule reaches would run for changes of its own files alone."""
    reached = {test for tests in affected.RULES.values() if tests != affected.ALL for test in tests}
    with_tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")}
    own = {*affected.ALWAYS, "tests/test_affected.py"}
    lost = [test for test in with_tests - own if not any(f"{test}/".startswith(f"{path}/") for path in reached)]
    assert not lost


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("softprompt_kernels/kernels/triton/launch.py", ["tests/benchmarks", "tests/kernels/triton", *affected.OPS]),
        ("softprompt_kernels/kernels/cpu/rows.py", []),
        ("tests/ops/test_kl_div.py", ["tests/ops/test_kl_div.py"]),
        ("tests/models/test_rope.py", []),
        ("tests/conftest.py", list(affected.INTERPRETER_TESTS)),
    ],
)
def test_what_runs_once_more_in_the_interpreter(changed, again):
    assert affected.interpreted([changed], affected.needed([changed])) == again


@pytest.fixture
def repository(tmp_path):
    """A repository with one commit and a tag `base`."""

    def git(*arguments):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    for name in ("kept.py", "edited.py", "deleted.py", "moved.py"):
        (tmp_path / name).write_text(f"# {name}\n" * 20)
    (tmp_path / ".gitignore").write_text("ignored.py\n")
    git("add", "-A")
    git("commit", "-qm", "base")
    git("tag", "base")
    return tmp_path, git


def test_changed_files_are_found_whether_committed_or_not(repository):
    folder, git = repository
    assert affected.changed_files("base", folder) == []
    (folder / "committed ä.py").write_text("")
    (folder / "deleted.py").unlink()
    git("add", "-A")
    git("commit", "-qm", "change")
    (folder / "moved.py").rename(folder / "moved_to.py")
    (folder / "edited.py").write_text("")
    (folder / "new.py").write_text("")
    (folder / "ignored.py").write_text("")
    assert affected.changed_files("base", folder) == [
        "committed ä.py",
        "deleted.py",
        "edited.py",
        "moved.py",
        "moved_to.py",
        "new.py",
    ]


def test_what_others_did_on_the_base_since_is_no_change(repository):
    folder, git = repository
    git("checkout", "-qb", "other")
    (folder / "of_others.py").write_text("")
    git("add", "-A")
    git("commit", "-qm", "theirs")
    git("checkout", "-qb", "ours", "base")
    (folder / "of_us.py").write_text("")
    assert affected.changed_files("other", folder) == ["of_us.py"]


def test_an_unknown_base_is_refused(repository):
    with pytest.raises(SystemExit, match=r"Name the commit to compare with, as in `make changed BASE=HEAD~1`"):
        affected.changed_files("no/such/branch", repository[0])
