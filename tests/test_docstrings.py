"""Every public name says what it takes, what it gives, what it raises and where it comes from.

Public is what `__all__` of these packages and modules has, and the methods and properties of such classes without an
underscore. A method that overrides another one may leave the docstring to it. The rules, each of which `faults` checks:

1. There is a docstring, and the file that defines the name opens with what it is for.
2. Each argument (field, for a dataclass) has an entry in `Args:` or stands in backticks in the text, and no entry is of
   an argument that does not exist. "Arguments as in `name`", "As `name`"
   and ": see `name`" take them from there.
3. A tensor has a shape in brackets, or that of another argument, or is a scalar, in its entry or as `name [..]` in the
   text. So has a tensor that is returned.
4. What takes tensors names a dtype. A tensor of integers (ids, indices, lengths, labels, masks) does so in its entry.
5. A quantity has its unit in its name or in its entry: seconds, bytes, tokens, nats.
6. Where the code raises, or calls a function of the package that raises, the docstring says what ("Raises:", or "Raise"
   at its start, or "errors as in `name`").
7. A name that computes a formula (`ops`, `losses`) or stands for a method of a paper names its source: a page of docs/,
   a paper, or a file with the derivation.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PACKAGES = (
    "ops",
    "losses",
    "losses.functional",
    "prompts",
    "models",
    "formats",
    "compress",
    "integrations",
    "serve",
    "testing.cases",
)
COMPUTE = ("ops", "losses", "losses.functional")  # packages of formulas
DTYPE = re.compile(r"dtype|fp32|fp16|bf16|float(16|32|64)|int(32|64)|bool|integer|non-zero|floating")
INTEGERS = re.compile(r"(^|_)(ids|index|indices|lengths|labels|mask|seqlens)$")
SHAPE = re.compile(r"\[[^\]]*\]|\bscalar\b|'s shape\b")
SOURCE = re.compile(r"docs/[\w/-]+\.md|arXiv[: ]?\d{4}\.\d{4,5}|\b[\w/]+\.py\b")
UNITS = {
    re.compile(r"(^|_)(seconds?|time|duration|elapsed)(_|$)"): re.compile(r"second|\bms\b|µs"),
    re.compile(r"(^|_)(n?bytes|memory)(_|$)"): re.compile(r"byte|MiB|GiB|\bGB\b"),
    re.compile(r"(^|_)(tokens?|length|window|delta|chunk)(_|$)"): re.compile(r"token|position"),
    re.compile(r"(^|_)(kl|entropy|nats)(_|$)"): re.compile(r"nat\b|nats"),
}
NUMBER = re.compile(r"^(int|float)( \| None)?$")


def public_names(package: str) -> dict[str, Any]:
    module = importlib.import_module(f"softprompt_kernels.{package}")
    return {name: getattr(module, name) for name in module.__all__}


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_documented(package: str) -> None:
    found = [
        f"{package}.{name}: {fault}"
        for name, thing in public_names(package).items()
        for fault in faults(thing, computes=package in COMPUTE)
    ]
    assert not found, "\n".join(found)


def faults(thing: Any, computes: bool = False) -> Iterator[str]:
    """What is wrong with the docstring of a class, function or constant of the package."""
    if not inspect.isclass(thing) and not inspect.isroutine(thing):
        return  # a constant or an alias of a type
    thing = inspect.unwrap(thing)
    if not (inspect.getmodule(thing).__doc__ or "").strip():
        yield "its file does not open with what it is for"
    if computes and not SOURCE.search(inspect.getdoc(thing) or ""):
        yield "no source: a page of docs/, a paper, or the file with the derivation"
    yield from of_one(thing)
    if inspect.isclass(thing):
        for name, member in vars(thing).items():
            function = function_of(member)
            if not name.startswith("_") and function is not None and not left_to_base(thing, name, function):
                yield from (f"{name}: {fault}" for fault in of_one(function))


def left_to_base(owner: type, name: str, function: Callable[..., Any]) -> bool:
    """Whether a method has no docstring because it overrides one that a base explains."""
    bases = (vars(base).get(name) for base in owner.__mro__[1:])
    return not function.__doc__ and any((getattr(base, "__doc__", None) or "").strip() for base in bases)


def function_of(member: Any) -> Callable[..., Any] | None:
    """The function of a method or property; None for other members."""
    if isinstance(member, property):
        return member.fget
    if isinstance(member, classmethod | staticmethod):
        return member.__func__
    return inspect.unwrap(member) if inspect.isfunction(member) else None


def of_one(thing: Any) -> Iterator[str]:
    """Rules 1 to 6 for one class or function."""
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    if not (own or "").strip():
        yield "no docstring"
        return
    doc = inspect.cleandoc(own)
    text, entries, sections = parts(doc)
    taken = arguments(thing)
    known = dict(entries)
    for name in re.findall(r"(?:^As|[Aa]rguments(?: and errors)? as in|: see) `([\w.]+)`", doc):
        there, entries_there, sections_there = parts(inspect.getdoc(named(thing, name)) or "")
        text, known, sections = f"{text} {there}", entries_there | known, sections_there | sections
        doc = f"{doc} {inspect.getdoc(named(thing, name))}"
    accepted = taken.keys() | inherited(thing)
    yield from (f"entry of {name}, which is no argument" for name in entries if name not in accepted)
    known |= {name: entry + referred(thing, name, entry) for name, entry in known.items()}
    described = {name: known.get(name) or around(name, text) for name in taken}
    for name, annotation in taken.items():
        entry = described[name]
        if entry is None:
            yield f"{name} is not explained"
            continue
        if re.search(r"\bTensor\b", annotation) and "Callable" not in annotation and "dict" not in annotation:
            if not SHAPE.search(entry):
                yield f"{name} has no shape in brackets"
            if INTEGERS.search(name) and not DTYPE.search(entry):
                yield f"{name} has no dtype"
        yield from without_unit(name, annotation, entry)
    if any(re.search(r"\bTensor\b", annotation) for annotation in taken.values()) and not DTYPE.search(doc):
        yield "no dtype"
    if not inspect.isclass(thing):
        given = annotation_of(inspect.signature(thing).return_annotation)
        if re.match(r"(tuple\[)?(torch\.)?Tensor\b", given) and not SHAPE.search(sections.get("Returns", "") or text):
            yield "what it returns has no shape in brackets"
        yield from without_unit(thing.__name__, given, doc)
    said = "Raises" in sections or re.match(r"Raise ", doc) or re.search(r"errors as in `", doc)
    if not said and (source := raising(thing)):
        yield f"says not what it raises ({source})"


def referred(thing: Any, name: str, entry: str) -> str:
    """The entry of an argument that another one refers to: "as in `kl_div`"; "" where it refers to none."""
    other = re.match(r"\s*as in `([\w.]+)`", entry)
    return parts(inspect.getdoc(named(thing, other[1])) or "")[1].get(name, "") if other else ""


def parts(doc: str) -> tuple[str, dict[str, str], dict[str, str]]:
    """The text of a docstring, its entries by argument (one may explain several), and its sections by name."""
    pieces = re.split(r"^(Args|Returns|Raises|Yields|Attributes):$\n((?:^(?:[ \t].*)?$\n?)*)", doc, flags=re.MULTILINE)
    text = " ".join(pieces[::3])
    sections = {name: textwrap.dedent(body) for name, body in zip(pieces[1::3], pieces[2::3], strict=True)}
    entries = {}
    for name in ("Args", "Attributes"):
        found = re.split(r"^(\*{0,2}\w+(?:, \*{0,2}\w+)*):(?=\s)", sections.get(name, ""), flags=re.MULTILINE)
        for names, entry in zip(found[1::2], found[2::2], strict=True):
            entries |= {one.strip(" *"): entry for one in names.split(",")}
    return text, entries, sections


def around(name: str, text: str) -> str | None:
    """The text, where it explains an argument: `name`, or `name [shape]`."""
    return text if re.search(rf"`[^`]*\b{name}\b[^`]*`", text) else None


def arguments(thing: Any) -> dict[str, str]:
    """Names and annotations of what it takes. Of a pydantic model, the fields without a description."""
    if inspect.isclass(thing) and hasattr(thing, "model_fields"):
        return {name: "" for name, field in thing.model_fields.items() if not field.description}
    if inspect.isclass(thing) and dataclasses.is_dataclass(thing):
        return {field.name: annotation_of(field.type) for field in dataclasses.fields(thing) if field.init}
    if inspect.isclass(thing):
        made = vars(thing).get("__init__")
        if made is None or not inspect.isfunction(made) or getattr(thing, "_is_protocol", False):
            return {}
        thing = made
    parameters = list(inspect.signature(thing).parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        del parameters[0]
    return {one.name: annotation_of(one.annotation) for one in parameters}


def inherited(thing: Any) -> set[str]:
    """Arguments of a class whose `__init__` is that of another package."""
    return (
        set(inspect.signature(thing).parameters) if inspect.isclass(thing) and "__init__" not in vars(thing) else set()
    )


def annotation_of(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def without_unit(name: str, annotation: str, entry: str) -> Iterator[str]:
    """Rule 5, for a number."""
    for quantity, unit in UNITS.items():
        if NUMBER.match(annotation) and quantity.search(name) and not unit.search(f"{name} {entry}"):
            yield f"{name} has no unit"


def raising(thing: Any) -> str:
    """The first statement that raises, or the first function of the package that it calls and that raises; or ""."""
    if getattr(thing, "_is_protocol", False):
        return ""
    function = vars(thing).get("__post_init__", vars(thing).get("__init__")) if inspect.isclass(thing) else thing
    if not inspect.isfunction(function) or (dataclasses.is_dataclass(thing) and function.__name__ == "__init__"):
        return ""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    if found := own_raise(tree):
        return found
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = inspect.unwrap(value) if callable(value := resolved(node.func, function.__globals__)) else None
            ours = isinstance(called, types.FunctionType) and called.__module__.startswith("softprompt_kernels")
            if ours and own_raise(ast.parse(textwrap.dedent(inspect.getsource(called)))):
                return f"{called.__name__} raises"
    return ""


def own_raise(tree: ast.AST) -> str:
    """The first `raise` of an exception that is made there."""
    raised = (node for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call))
    return next((f"{ast.unparse(node.exc.func)}" for node in raised), "")  # type: ignore[union-attr]


def resolved(node: ast.expr, names: dict[str, Any]) -> Any:
    """What a name, or an attribute of a module, stands for."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(module := resolved(node.value, names), types.ModuleType):
        return getattr(module, node.attr, None)
    return None


def named(thing: Any, name: str) -> Any:
    """What a docstring refers to: a name of its class, of its module or of the public names, or a full path."""
    if name.startswith("softprompt_kernels."):
        path, _, name = name.rpartition(".")
        return getattr(importlib.import_module(path), name)
    module = inspect.getmodule(inspect.unwrap(thing))
    owner = getattr(module, thing.__qualname__.partition(".")[0], None)
    if inspect.isclass(owner) and hasattr(owner, name):
        return function_of(vars(owner)[name]) or getattr(owner, name)
    first, _, attribute = name.partition(".")
    everything = {key: value for package in reversed(PACKAGES) for key, value in public_names(package).items()}
    found = getattr(module, first, None) or everything[first]
    return getattr(found, attribute) if attribute else found


# --- each rule finds what breaks it -----------------------------------------------------------------------------------


def planted_shape(hidden: "Tensor") -> None:  # noqa: F821
    """Takes `hidden`, in fp32."""


def planted_argument(size: int) -> None:
    """Takes a number."""


def planted_entry() -> None:
    """Takes nothing.

    Args:
        size: something.
    """


def planted_dtype(input_ids: "Tensor") -> None:  # noqa: F821
    """Takes tokens.

    Args:
        input_ids: [N].
    """


def planted_unit(memory: int) -> None:
    """Takes `memory`."""


def planted_error(size: int) -> None:
    """Takes `size`."""
    if size < 0:
        raise ValueError("size must be at least 0")


def planted_return() -> "Tensor":  # noqa: F821
    """Gives numbers in fp32."""


def planted_nothing() -> None: ...


@pytest.mark.parametrize(
    ("function", "fault"),
    [
        (planted_shape, "hidden has no shape"),
        (planted_argument, "size is not explained"),
        (planted_entry, "entry of size"),
        (planted_dtype, "input_ids has no dtype"),
        (planted_unit, "memory has no unit"),
        (planted_error, "says not what it raises"),
        (planted_return, "what it returns has no shape"),
        (planted_nothing, "no docstring"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_found(function: Callable[..., Any], fault: str) -> None:
    found = list(faults(function))
    assert any(fault in one for one in found), found


def test_a_formula_without_a_source_is_found() -> None:
    assert any("no source" in fault for fault in faults(planted_argument, computes=True))
