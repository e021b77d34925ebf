"""Every block of code in the pages runs, top to bottom, in a folder that has the files that the page speaks of.

| block | here |
|---|---|
| `python` | runs, in one namespace a page |
| `console`, `softprompt ...` | runs, with small numbers (`FAST`) on a tiny random model |
| `console`, `python ... examples.NAME` | a test in `tests/examples` imports that file and runs it |
| `console`, `python -m pytest_benchmark` | runs, in a process of its own |
| `console`, `pip install .` | names extras that there are; `tests/build_helper` installs it |
| `console`, `make TARGET` | CI runs the target, or `NOT_IN_CI` says why not |
| `console`, the rest | `ELSEWHERE` says where it runs |
| `json`, `yaml`, `toml` | can be read |
| `text`, or no language | formulas, trees and the like: nothing to run |
| any other | starts programs of `PROGRAMS`, or has `<!-- not run: REASON -->` on the line before it |
"""

import ast
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.test_workflows import CI_TARGETS, TARGETS

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("csrc/**/*.md")),
    *sorted(ROOT.glob("benchmarks/**/*.md")),
]
FAST = {  # options that make a command small, if the page has not set them
    "compress": {"--steps": "2", "--selfstudy": "6", "--new-tokens": "4", "--tokens": "16", "--matching-steps": "10"},
    "evaluate": {"--new-tokens": "4"},
    "generate": {"--max-new-tokens": "8"},
    "chat": {"--max-new-tokens": "8"},
    "train-compressor": {"--steps": "2", "--selfstudy": "2", "--new-tokens": "2", "--batch-queries": "2"},
}
SMALL = {  # a shape of each op in place of a suite of `softprompt bench`
    "kl_div": "N8 V64",
    "linear_kl_div": "N8 d16 V64",
    "linear_kl_div_from_moments": "N8 d16 V64",
    "teacher_moments": "N8 d16 V64",
    "prompt_attention": "B2 H4/2 M8 P8 D16",
}
PLACES = ("mill", "lighthouse", "library", "ferry")
ELSEWHERE = {
    "python demo/fetch_model.py --out my-model": "it fetches 98 MB; a tiny model stands in its place",
    "softprompt push my-run/prompt --repo ada/my-text --base-model HuggingFaceTB/SmolLM2-135M-Instruct": "it uploads; "
    "tests/formats/test_hub.py does so to a server on this machine",
    "pip install pre-commit": "it installs another program; tests/test_workflows.py reads the configuration",
    "pre-commit install": "it changes the checkout's hooks",
    "python -m tests.compress.sequential.planted_facts my-facts window": "it takes minutes; tests/compress/sequential "
    "compresses a short text",
    "python -m tests.compress.sequential.planted_facts my-facts long": "the same, for longer",
    "python -m benchmarks.costs": "tests/benchmarks/test_costs.py compares its tables with the page",
    "pip install openai": "the tests' extra brings it",
    "softprompt compress --model my-model --context handbook.txt --tokens 256 --output runs/handbook "
    "--server http://localhost:8000/v1": "it needs a server; tests/compress/teacher/server",
    "softprompt compress --model my-model --context my-text.txt --output my-run-4bit --tokens 16 --dtype 4bit": "it "
    "needs bitsandbytes; tests/compress/sources/test_quantize.py, by `make quantized`",
    'softprompt generate "What is it about?" --model my-model --prompt my-run-4bit/prompt --dtype 4bit': "as compress",
    "softprompt compress --model my-model --context my-text.txt --output my-run-split --tokens 16 --device split": "it "
    "takes seconds; tests/compress/sources/test_split.py",
    "softprompt serve --model my-model --prompts my-bank/runs": "it does not end; tests/serve/test_command.py",
    "softprompt serve --model my-model --prompt handbook=my-run/prompt": "it does not end; tests/serve/test_command.py",
    **dict.fromkeys(
        (
            *(f"softprompt compress --config demo/places/{name}.yaml" for name in PLACES),
            "softprompt compose runs/mill runs/lighthouse --output runs/both --dry-run",
            "softprompt compose runs/mill runs/lighthouse --output runs/both",
            "softprompt compose runs/mill runs/lighthouse runs/library runs/ferry --output runs/all",
            'softprompt generate --model .cache/SmolLM2-135M-Instruct --prompt runs/both/prompt "How high is it?"',
        ),
        "minutes; tests/compress/composition composes two runs of a tiny model, and runs the command",
    ),
    **dict.fromkeys(
        (f"python -m tests.compress.composition.recall_compositions {texts} 6" for texts in (2, 4)),
        "a minute; tests/compress/composition/test_recall.py makes one of its compositions",
    ),
}
PROGRAMS = {  # that blocks of `bash` start, and why no test does
    "nsys": "it needs a GPU",
    "ncu": "it needs a GPU",
    "proton": "it needs a GPU",
    "proton-viewer": "it needs a run of Proton",
    "torchrun": "it takes many processes; tests/compress/parallel runs the same on two",
    "perf": "it needs Linux's perf, and the right to use it",
    "py-spy": "it needs the right to trace a process",
    "softprompt": "the program of the line before starts it",
}
NOT_IN_CI = {
    "help": "tests/test_workflows.py runs it",
    "demo": "it fetches a model of 98 MB and takes minutes; tests/compress runs the same stages on a tiny model",
    "lint": "`make test` runs it first",
    "changed": "it picks from the tests that `make test` runs; tests/test_affected.py",
    "docs": "tests/test_site.py builds the site the same way",
    "bench": "15 minutes; tests/benchmarks runs every case at tiny sizes",
    "study": "hours; tests/benchmarks runs its methods on a tiny model",
    "compile": "15 minutes; tests/kernels/triton compiles a part of them",
    "counters": "minutes; tests/benchmarks counts small cases",
    "gpu": "it needs a GPU",
    "kills": "a minute; `make test` kills the run a few times",
    "quantized": "it installs two packages that slow each process down; `make test` runs what needs neither",
    "load": "minutes; tests/serve runs the same clients for two seconds",
    "clean": "it deletes what the other targets need",
}
TEXT = "the cat sat on the mat and the dog ran to the red house " * 3
QUESTIONS = '{"input": "where is the dog?"}\n{"input": "what is red?"}\n'
# Files beside `my-model`, `my-text.txt` and `my-questions.jsonl`, by page. A path of the repository (None) is copied.
FILES: dict[str, dict[str, str | None]] = {
    "docs/quickstart.md": {
        "demo/demo.yaml": None,
        "demo/handbook.txt": TEXT,
        "demo/queries.jsonl": QUESTIONS,
        "demo/heldout.jsonl": '{"input": "where is the cat?"}\n',
        "demo/test.jsonl": '{"input": "who ran to the house?"}\n',
    },
    "docs/scale/many-contexts.md": {
        "my-texts/mill.txt": TEXT,
        "my-texts/boat.txt": TEXT.replace("cat", "boat"),
        "my-contexts.jsonl": json.dumps({"name": "mill", "text": TEXT}),
    },
    "docs/scale/compressor.md": {f"my-texts/{name}.txt": TEXT for name in ("one", "two", "three")},
    "docs/benchmarks.md": {
        "benchmarks/study/texts/garden.yaml": None,
        "benchmarks/study/texts/garden.txt": TEXT,
        "benchmarks/study/texts/garden.heldout.jsonl": QUESTIONS,
    },
}
MODELS = (".cache/SmolLM2-135M-Instruct", "my-model")  # paths that lead to the tiny model
INSTALL = re.compile(r"""pip install (?:--editable )?['"]?\.(?:\[([\w,]+)\])?['"]?""")
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
STARTED = ("softprompt ", "python -m pytest_benchmark")
DATA: dict[str, Callable[[str], Any]] = {"json": json.loads, "yaml": yaml.safe_load, "toml": tomllib.loads}
PLAIN = ("", "text")
BLOCK = re.compile(r"^( *)(```+)(\w*)[^\n]*\n(.*?)^\1\2 *$", re.DOTALL | re.MULTILINE)
REASON = re.compile(r"<!-- not run: \S.*-->\n*\Z")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> Iterator[tuple[str, str, str]]:
    """Language and content of each fenced block, and the text before it."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield found[3], re.sub(f"^{found[1]}", "", found[4], flags=re.MULTILINE), text[: found.start()]


def commands(page: Path) -> Iterator[str]:
    for language, block, _ in blocks(page):
        if language == "console":
            yield from filter(None, block.splitlines())


def runs_here(language: str, block: str) -> bool:
    return language == "python" or (
        language == "console" and any(line.startswith(STARTED) for line in block.splitlines())
    )


@pytest.fixture
def folder_of_a_reader(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a tiny model, a text and questions. Families that a page declares are forgotten after it."""
    from softprompt_kernels.models import registry

    for path in MODELS:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).symlink_to(tiny_model_folder)
    (tmp_path / "my-text.txt").write_text(TEXT)
    (tmp_path / "my-questions.jsonl").write_text(QUESTIONS)
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(runs_here(*block[:2]) for block in blocks(page))], ids=name_of
)
def test_a_page_runs_from_top_to_bottom(page: Path, folder_of_a_reader: Path) -> None:
    for path, content in FILES.get(name_of(page), {}).items():
        (folder_of_a_reader / path).parent.mkdir(parents=True, exist_ok=True)
        (folder_of_a_reader / path).write_text((ROOT / path).read_text() if content is None else content)
    run(page, {"__name__": "__main__"})
    if page.name == "README.md":
        assert (folder_of_a_reader / "my-run" / "evaluation.json").exists()


def run(page: Path, namespace: dict[str, object]) -> None:
    """Its Python blocks and its commands `softprompt`, in their order."""
    from softprompt_kernels.cli.app import app

    for language, block, _ in blocks(page):
        if language == "python":
            exec(compile(block, page.name, "exec"), namespace)
        elif language == "console":
            for line in (line for line in block.splitlines() if line not in ELSEWHERE):
                program, *arguments = shlex.split(line, comments=True) or [""]
                if line in ELSEWHERE:
                    continue
                if program == "softprompt":
                    result = CliRunner().invoke(app, fast(arguments))
                    slower = result.exit_code == 1 and "--compare" in arguments and "generate" not in arguments
                    assert result.exit_code == 0 or slower, f"{line}\n{result.output}\n{result.exception!r}"
                elif line.startswith(STARTED):
                    subprocess.run([sys.executable, *arguments], check=True, timeout=100)


def fast(arguments: list[str]) -> list[str]:
    """The arguments of a command, with the options that make it small."""
    options = dict(FAST.get(arguments[0], {}))
    if arguments[0] == "bench" and not {"--run", "--list"} & set(arguments):
        arguments = [*without(arguments, "--peer", "compile"), "--no-memory"]
        options |= {"--rounds": "2", "--peer": "none"}
        if "--shape" not in arguments:
            arguments = without(arguments, "--suite")
            options["--op"] = arguments[arguments.index("--op") + 1] if "--op" in arguments else "kl_div"
            options["--shape"] = SMALL[options["--op"]]
    return arguments + [part for name, value in options.items() if name not in arguments for part in (name, value)]


def without(arguments: list[str], option: str, value: str | None = None) -> list[str]:
    """The arguments without an option that has this value, or any."""
    for at, argument in enumerate(arguments[:-1]):
        if argument == option and value in (None, arguments[at + 1]):
            return arguments[:at] + arguments[at + 2 :]
    return arguments


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_other_blocks_are_data_text_or_have_a_reason(page: Path) -> None:
    for language, block, before in blocks(page):
        if language in DATA:
            for part in block.splitlines() if language == "json" and "\n{" in block.strip() else [block]:
                DATA[language](part)
        elif language not in (*PLAIN, "python", "console") and not REASON.search(before):
            programs = {line.split()[0] for line in block.splitlines() if line.strip()}
            assert language == "bash" and programs <= PROGRAMS.keys(), (
                f"{name_of(page)}: a block of {language} has no `<!-- not run: REASON -->`, and starts {programs}"
            )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_other_command_is_run_somewhere(page: Path) -> None:
    for line in commands(page):
        if line.startswith("make "):
            assert line.split()[1] in CI_TARGETS | NOT_IN_CI.keys(), line
        elif found := re.match(r"python .*\bexamples[./](\w+)", line):
            assert f"examples.{found[1]}" in imported_examples(), line
        elif found := INSTALL.fullmatch(line):
            assert set(filter(None, (found[1] or "").split(","))) <= EXTRAS, line
        elif not line.startswith(STARTED):
            assert line in ELSEWHERE, f"{name_of(page)}: where is this run? {line}"


def test_every_target_of_make_is_run_by_ci_or_has_a_reason() -> None:
    assert set(TARGETS) == CI_TARGETS | NOT_IN_CI.keys()
    assert not CI_TARGETS & NOT_IN_CI.keys()


def test_every_example_has_a_test_that_imports_it() -> None:
    examples = {f"examples.{path.stem}" for path in (ROOT / "examples").glob("*.py") if path.stem != "__init__"}
    assert examples <= imported_examples(), examples - imported_examples()


def imported_examples() -> set[str]:
    """The modules of examples/ that the tests in tests/examples import, and what is taken from them."""
    found = set()
    for path in (ROOT / "tests" / "examples").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_a_block_that_fails_is_noticed(tmp_path: Path, folder_of_a_reader: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nfirst = 1\n```\n\n- a list\n\n  ```python\n  assert first == 2\n  ```\n")
    with pytest.raises(AssertionError):
        run(page, {})
    page.write_text("```console\nsoftprompt compress --tokens none\n```\n")
    with pytest.raises(AssertionError, match="none"):
        run(page, {})
