"""`python -m tests.mutants [words of names]`: whether each mutant of the CUDA kernels is caught by its tests.

Only mutants whose names contain all the words are run. Each worker has its own copy of the sources and recompiles only
what a mutant changes. The exit status is 1 if a mutant survives, or if its text is not in the source exactly once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parent.parent.parent
COPIED = (
    "build_helper",
    "csrc",
    "softprompt_kernels",
    "tests",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
)
BUILD = {"SOFTPROMPT_SIMT": "1", "SOFTPROMPT_CPU": "0", "SOFTPROMPT_CUDA": "0"}
WORKERS = 2


def main() -> int:
    """Runs the chosen mutants and prints for each whether it is caught."""
    words = [word.lower() for word in sys.argv[1:]]
    chosen = [mutant for mutant in MUTANTS if all(word in mutant.name.lower() for word in words)]
    if not chosen:
        print(f"no mutant has {' and '.join(words)} in its name", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        copies: SimpleQueue[Path] = SimpleQueue()
        for copy in pool.map(prepare, [Path(folder) / str(i) for i in range(min(WORKERS, len(chosen)))]):
            copies.put(copy)
        for tests in sorted({mutant.tests for mutant in chosen}):
            done = test(copy, tests)
            if done.returncode != 0:
                print(f"without a mutant, {' '.join(tests)} fails:\n{done.stdout[-2000:]}", file=sys.stderr)
                return 1

        def try_mutant(mutant: Mutant) -> tuple[bool, str]:
            copy = copies.get()
            try:
                return try_out(mutant, copy)
            finally:
                copies.put(copy)

        caught = 0
        for mutant, (is_caught, why) in zip(chosen, pool.map(try_mutant, chosen), strict=True):
            caught += is_caught
            print(f"{'caught  ' if is_caught else 'SURVIVES'}  {mutant.name}\n          {why}", flush=True)
    print(f"{caught} of {len(chosen)} mutants caught")
    return 0 if caught == len(chosen) else 1


def prepare(copy: Path) -> Path:
    """Makes a copy of the sources and builds the unchanged kernels in it."""
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(source, copy / name)
    built = build(copy)
    if built.returncode != 0:
        raise RuntimeError(f"the kernels do not compile:\n{built.stdout[-2000:]}{built.stderr[-2000:]}")
    return copy


def try_out(mutant: Mutant, copy: Path) -> tuple[bool, str]:
    """Whether a mutant is caught, and the message of the test that failed."""
    path = copy / "csrc" / "cuda" / mutant.source
    original = path.read_text()
    if original.count(mutant.old) != 1:
        return False, f"its text occurs {original.count(mutant.old)} times in {mutant.source}"
    try:
        path.write_text(original.replace(mutant.old, mutant.new))
        built = build(copy)
        if built.returncode != 0:
            return False, f"it does not compile: {built.stderr[-500:]}"
        done = test(copy, mutant.tests)
    except subprocess.TimeoutExpired:
        return True, "its tests time out"
    finally:
        path.write_text(original)
    said = [line.removeprefix("E").strip() for line in done.stdout.splitlines() if line.startswith("E  ")]
    if done.returncode == 1 and said:
        message = next((line for line in said if "SimtError" in line), said[0])
        return True, message.partition("SimtError: ")[2] or message
    return False, f"pytest ends with {done.returncode}: {done.stdout.strip()[-200:]}"


def test(copy: Path, tests: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """Runs tests until the first failure."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    return run(command, copy, {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"})


def build(copy: Path) -> subprocess.CompletedProcess[str]:
    """Compiles what has changed."""
    return run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], copy, BUILD)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Runs a command and captures its output."""
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=900
    )


if __name__ == "__main__":
    sys.exit(main())
