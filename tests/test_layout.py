"""The layout of the repository: which folder may import from which, no cycles, no private names, no crowded folders.

The order is the one that docs/architecture.md draws. A folder may import from those below it and from itself.
"""

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the top down; names in one row are on the same level and may not import from each other.
ORDER: dict[str, tuple[tuple[str, ...], ...]] = {
    "": (("tests",), ("benchmarks", "examples"), ("softprompt_kernels",), ("build_helper",)),
    "softprompt_kernels": (
        ("__main__",),
        ("cli",),
        ("serve",),
        ("compress",),
        ("bench", "profiling"),
        ("formats", "integrations"),
        ("models",),
        ("prompts",),
        ("losses", "testing"),
        ("ops",),
        ("kernels",),
        ("output_file", "sizes"),
        ("errors",),
    ),
    "softprompt_kernels/compress": (
        ("start",),
        ("sequential", "bank", "composition", "compressor_runs"),
        ("forecast", "diagnose", "suite_run"),
        ("run", "saved_prompt"),
        ("training",),
        ("initial_prompt", "compared_answers", "teaching", "tracking", "long_context"),
        ("inputs",),
        ("compressor",),
        ("report",),
        ("folder", "stage_times"),
        ("evaluate",),
        ("distill",),
        ("matching",),
        ("teacher",),
        ("sources",),
        ("config_file", "parallel"),
        ("config", "reporter", "process"),
        ("text_file",),
    ),
    "softprompt_kernels/kernels": (
        ("triton", "cuda", "cpu"),
        ("composed", "sharded"),
        ("reference",),
        ("device", "host"),
        ("moments",),
        ("problems", "ranges"),
    ),
    "softprompt_kernels/kernels/triton": (
        ("compile",),
        ("attention", "losses"),
        ("tuning",),
        ("profiled",),
        ("launch", "runtime", "targets", "elementwise"),
    ),
    "benchmarks": (
        ("device",),
        ("suites", "study", "serve", "long_context", "costs"),
        ("counted", "step"),
        ("harness",),
    ),
    "csrc": (("bindings",), ("cpu", "cuda"), ("simt",), ("tensor",)),
    "csrc/cpu": (("kernel_table",), ("attention", "losses"), ("gemm",), ("platform",)),
    "csrc/cuda": (("attention", "losses"), ("launch", "vector_io", "block_reduce", "elementwise"), ("arch",)),
}
RELATIVE = "?"  # what cannot be resolved from the root
HOST_HEADERS = "csrc/simt/include"  # CUDA's headers for the CPU
CROWDED = 16  # files of its own, beside `__init__.py`
LONG = 500  # lines of a file
WIDE = 120  # columns of a line

Imports = dict[str, list[tuple[str, str | None]]]  # file -> [(file, the name taken from it)], both relative to the root


def files(root: Path, *patterns: str) -> list[str]:
    return sorted(
        path.relative_to(root).as_posix()
        for pattern in patterns
        for path in root.glob(pattern)
        if not {".venv", "build", "runs"} & set(path.relative_to(root).parts)
    )


def python_imports(root: Path) -> Imports:
    """Every import of one Python file of the repository by another, wherever it stands in the file."""
    found: Imports = {}
    for file in files(
        root,
        "softprompt_kernels/**/*.py",
        "benchmarks/**/*.py",
        "examples/**/*.py",
        "tests/**/*.py",
        "build_helper/*.py",
    ):
        found[file] = []
        for node in ast.walk(ast.parse((root / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                found[file].append((RELATIVE, None))
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    nested = module_file(root, f"{node.module}.{alias.name}")
                    taken = (nested, None) if nested else (module_file(root, node.module), alias.name)
                    if taken[0]:
                        found[file].append((taken[0], taken[1]))
            elif isinstance(node, ast.Import):
                found[file] += [(path, None) for a in node.names if (path := module_file(root, a.name))]
            elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
                name = node.args[0]
                if isinstance(name, ast.Constant) and (path := module_file(root, str(name.value))):
                    found[file].append((path, None))
    return found


def module_file(root: Path, module: str) -> str | None:
    """The file of a module of the repository, None for others."""
    stem = module.replace(".", "/")
    return next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if (root / path).is_file()), None)


def native_includes(root: Path) -> Imports:
    """Every `#include "..."` of csrc, which names a file from csrc on."""
    found: Imports = {}
    for file in files(root, *(f"csrc/**/*.{ending}" for ending in ("h", "cpp", "cu", "cuh"))):
        names = re.findall(r'#\s*include\s*"([^"]+)"', (root / file).read_text(encoding="utf-8"))
        paths = [
            next((p for p in (f"csrc/{name}", f"{HOST_HEADERS}/{name}") if (root / p).is_file()), None)
            for name in names
        ]
        found[file] = [(path or RELATIVE, None) for path in paths]
    return found


def level(folder: str, path: str) -> tuple[int, str] | None:
    """Where the part of `path` right below `folder` stands in its order, and its name; None if it is not below it."""
    prefix = f"{folder}/" if folder else ""
    if not path.startswith(prefix):
        return None
    name = path.removeprefix(prefix).split("/")[0].split(".")[0]
    row = next((i for i, names in enumerate(ORDER[folder]) if name in names), None)
    return None if row is None else (row, name)


def header_file(root: Path, name: str) -> str | None:
    """The file of an include that names it from csrc on, or one of CUDA's headers for the CPU; None for others."""
    return next((path for path in (f"csrc/{name}", f"{HOST_HEADERS}/{name}") if (root / path).is_file()), None)


def unresolved(imports: Imports) -> Iterator[str]:
    """Relative imports, and includes that do not name a file from csrc on. The other checks cannot see them."""
    yield from (f"{file} imports by a relative name" for file, taken in imports.items() if (RELATIVE, None) in taken)


def upward(imports: Imports) -> Iterator[str]:
    """Imports that run against the order, or between two folders of one level."""
    for file, taken in imports.items():
        for other, _ in taken:
            for folder in ORDER:
                here, there = level(folder, file), level(folder, other)
                if here and there and here[1] != there[1] and here[0] >= there[0]:
                    yield f"{file} imports {other}: {here[1]} is not above {there[1]} in {folder or 'the repository'}"


def unplaced(root: Path) -> Iterator[str]:
    """Folders and files that the order does not name."""
    for folder in ORDER:
        for path in sorted((root / folder).iterdir()) if folder else ():
            source = path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh") or (path.is_dir() and any(path.iterdir()))
            known = {name for names in ORDER[folder] for name in names} | {
                "__init__",
                "__pycache__",
                "conftest",
                "_native",
            }
            if source and path.name.split(".")[0] not in known:
                yield f"{folder}/{path.name} has no place in the order"


def cycles(imports: Imports) -> Iterator[str]:
    """Each cycle once, from its first file on."""
    done: set[str] = set()

    def visit(file: str, path: list[str]) -> Iterator[str]:
        if file in path:
            yield " -> ".join([*path[path.index(file) :], file])
        elif file not in done:
            for other, _ in imports.get(file, ()):
                if other != file:
                    yield from visit(other, [*path, file])
            done.add(file)

    for file in imports:
        yield from visit(file, [])


def private_attributes(root: Path) -> Iterator[str]:
    """`module._name` of a module of the package that lies in another folder."""
    for file in files(root, "softprompt_kernels/**/*.py", "benchmarks/**/*.py", "build_helper/*.py"):
        tree = ast.parse((root / file).read_text(encoding="utf-8"))
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if path := module_file(root, f"{node.module}.{alias.name}"):
                        modules[alias.asname or alias.name] = path
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
                path = modules[node.value.id]
                if re.match(r"_[^_]", node.attr) and Path(path).parent != Path(file).parent:
                    yield f"{file} uses the private {node.attr} of {path}"


def private(imports: Imports) -> Iterator[str]:
    """Names with a leading underscore that another folder takes."""
    for file, taken in imports.items():
        for other, name in taken:
            if name and name.startswith("_") and not name.startswith("__") and Path(file).parent != Path(other).parent:
                yield f"{file} imports the private {name} of {other}"


def violations(root: Path) -> list[str]:
    python, native = python_imports(root), native_includes(root)
    return [
        *unresolved(python),
        *unresolved(native),
        *upward(python),
        *upward(native),
        *cycles(python),
        *cycles(native),
        *private(python),
        *private_attributes(root),
    ]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("this is no git checkout")
    return [path for name in listed.stdout.splitlines() if (path := Path(name)) and (ROOT / path).is_file()]


def report(found: Iterable[str]) -> str:
    return "\n".join(found)


def test_imports_and_includes_run_downwards_without_cycles_and_private_names() -> None:
    assert not (found := violations(ROOT)), report(found)


def test_the_page_on_the_architecture_shows_this_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    shown = re.sub(r"\s+", " ", page.partition("## The order of imports")[2].split("```")[1])
    for folder, levels in ORDER.items():
        chain = " → ".join(", ".join(names) for names in levels)
        name = folder.removeprefix("softprompt_kernels/")
        expected = chain if folder in ("", "softprompt_kernels") else f"{name}: {chain}"
        assert expected in shown, expected


def test_every_folder_has_a_place_in_the_order() -> None:
    assert not (found := list(unplaced(ROOT))), report(found)


PLANTED = {
    "an import that runs upwards": {"softprompt_kernels/ops/a.py": "from softprompt_kernels.models import b"},
    "one inside a function": {
        "softprompt_kernels/compress/teacher/a.py": "def f():\n    from softprompt_kernels.compress.distill import b"
    },
    "one between neighbours": {"softprompt_kernels/kernels/cpu/a.py": "import softprompt_kernels.kernels.cuda.b"},
    "one of a benchmark by the package": {"softprompt_kernels/models/a.py": "from benchmarks.harness import b"},
    "an include that runs upwards": {"csrc/cpu/gemm/a.h": '#include "cpu/attention/b.h"'},
    "a relative import": {"softprompt_kernels/ops/a.py": "from ..models import b"},
    "an import by a string": {"softprompt_kernels/ops/a.py": "m = import_module('softprompt_kernels.models.b')"},
    "a relative include": {"csrc/cpu/gemm/a.h": '#include "../attention/b.h"'},
    "an include with a space": {"csrc/cpu/gemm/a.h": '#  include "cpu/attention/b.h"'},
    "a private attribute": {"softprompt_kernels/models/a.py": "from softprompt_kernels.ops import b as m\nm._secret"},
    "a cycle": {
        "softprompt_kernels/ops/a.py": "from softprompt_kernels.ops.b import c",
        "softprompt_kernels/ops/b.py": "from softprompt_kernels.ops import a",
    },
    "a cycle of includes": {"csrc/cuda/a.h": '#include "cuda/b.h"', "csrc/cuda/b.h": '#include "cuda/a.h"'},
    "a private name": {"softprompt_kernels/models/a.py": "from softprompt_kernels.ops.b import _secret"},
}
BESIDE = (
    "softprompt_kernels/models/b.py",
    "softprompt_kernels/compress/distill/b.py",
    "softprompt_kernels/kernels/cuda/b.py",
    "softprompt_kernels/ops/b.py",
    "benchmarks/harness/b.py",
    "csrc/cpu/attention/b.h",
)


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_what_is_planted_is_found(planted: dict[str, str], tmp_path: Path) -> None:
    for name, text in (dict.fromkeys(BESIDE, "") | planted).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = violations(tmp_path)
    assert len(found) == 1, report(found)
    assert next(iter(planted)) in found[0]


def test_no_folder_is_crowded() -> None:
    counts: dict[Path, int] = {}
    for path in tracked():
        if path.name != "__init__.py" and path.parent != Path():
            counts[path.parent] = counts.get(path.parent, 0) + 1
    assert not {str(folder): count for folder, count in counts.items() if count > CROWDED}


def test_no_file_is_long_or_wide() -> None:
    endings = {".py", ".h", ".cpp", ".cu", ".cuh", ".toml", ".yaml", ".yml"}
    for path in tracked():
        if path.suffix in endings:
            lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
            assert len(lines) <= LONG, f"{path} has {len(lines)} lines"
            wide = [number for number, line in enumerate(lines, 1) if len(line) > WIDE]
            assert not wide, f"{path}: lines {wide} are wider than {WIDE}"
