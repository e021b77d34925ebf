"""Compiles launches for any target on any machine, and reports what the code uses.

A launch is specialised by the code of Triton's own launcher (sizes that are 1 or multiples of 16, aligned pointers,
None), so what is compiled here is what would run there. Launches that look the same to the compiler are compiled once.
Triton's disk cache (TRITON_CACHE_DIR) makes the next run quick.

A kernel takes 0.5 to 7 seconds. The compiler and its assembler release Python's lock, so threads run them in parallel.
"""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from softprompt_kernels.kernels.triton import runtime
from softprompt_kernels.kernels.triton.compile import machine_code
from softprompt_kernels.kernels.triton.compile.machine_code import Code
from softprompt_kernels.kernels.triton.compile.occupancy import MULTIPROCESSORS, blocks_at_once
from softprompt_kernels.kernels.triton.launch import Launch
from softprompt_kernels.kernels.triton.targets import Target


@dataclass(frozen=True)
class Request:
    """A launch to compile."""

    example: str  # the name of the example problem that it is for
    launch: Launch
    target: Target


@dataclass(frozen=True)
class Report:
    """The result of one kernel: of all launches that look the same to the compiler."""

    kernel: str
    target: str
    examples: tuple[str, ...]  # all examples that it is for
    constants: dict[str, Any]  # the constexpr arguments, and those that the launcher specialised to constants
    signature: dict[str, str]  # types of the other arguments
    options: dict[str, Any]
    shared_memory: int = 0  # bytes of a block
    occupancy: int = 0  # blocks that a multiprocessor holds at once
    expected: str | None = None  # the matrix instruction that the code should have
    code: Code | None = None  # None: it did not compile
    violations: tuple[str, ...] = ()


def unavailable() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if runtime.interpreting():
        return "TRITON_INTERPRET is set, and kernels cannot be compiled in the interpreter: unset it"
    return runtime.missing()


@dataclass
class Source:
    """What the compiler gets: a launch, specialised for a target."""

    launch: Launch
    target: Target
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    examples: list[str]  # all examples that it is for
    refusal: str | None = None  # why the launcher would refuse it

    @property
    def key(self) -> str:
        """Everything that the compiler sees: sources with the same key give the same code."""
        kernel = self.launch.kernel
        inputs = (self.signature, self.constants, self.attributes, self.options, self.target.name, self.refusal)
        return f"{kernel.__module__}.{kernel.__name__} {inputs}"


def distinct(requests: Iterable[Request]) -> list[Source]:
    """The distinct kernels among the requests, in order of their first request.

    Raises:
        RuntimeError: nothing can be compiled here.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    by_key: dict[str, Source] = {}
    for request in requests:
        source = _specialise(request.launch, request.target)
        source = by_key.setdefault(source.key, source)
        if request.example not in source.examples:
            source.examples.append(request.example)
    return list(by_key.values())


def compile_all(
    sources: Iterable[Source], *, workers: int | None = None, done: Callable[[], None] = lambda: None
) -> list[Report]:
    """One report per source, in the same order.

    Args:
        sources: from `distinct`.
        workers: threads; None: one per processor.
        done: called after each report.
    """

    def work(source: Source) -> Report:
        report = _compile(source)
        done()
        return report

    sources = list(sources)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        reports = list(pool.map(work, sources))
    # The compiler's front end is not quite thread-safe, so what failed is compiled once more, alone.
    return [r if r.code is not None else _compile(s) for s, r in zip(sources, reports, strict=True)]


def _gpu(target: Target) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(target.backend, target.arch, target.warp_size)


def _specialise(launch: Launch, target: Target) -> Source:
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(_gpu(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    # The launcher's default, given explicitly: without it Triton warns that the default will change.
    options = {**asdict(launch.options), "enable_fp_fusion": True}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        bound, specialisation, _ = bind(**launch.arguments, **launch.constants)
        _, signature, constants, attributes = kernel._pack_args(backend, dict(options), bound, specialisation, options)
    except (TypeError, KeyError, ValueError) as error:  # a wrong argument, or an option that the GPU does not have
        return Source(launch, target, {}, {}, {}, options, [], refusal=" ".join(map(str, error.args)))
    return Source(launch, target, signature, constants, attributes, options, [])


def _compile(source: Source) -> Report:
    from triton import compile as triton_compile
    from triton.compiler import ASTSource

    kernel, target = source.launch.kernel, source.target
    common: dict[str, Any] = {
        "kernel": kernel.__name__,
        "target": target.name,
        "examples": tuple(source.examples),
        "constants": _flat((_name(source, path), value) for path, value in source.constants.items()),
        "signature": {name: kind for name, kind in _flat(source.signature.items()).items() if kind != "constexpr"},
        "options": asdict(source.launch.options),
    }
    if source.refusal is not None:
        return Report(**common, violations=(f"cannot be launched: {source.refusal}",))
    try:
        ast = ASTSource(kernel, source.signature, source.constants, source.attributes)
        compiled = triton_compile(ast, target=_gpu(target), options=source.options)
        if target.backend == "hip":
            code = machine_code.amd(compiled.asm["amdgcn"])
        else:
            code = machine_code.nvidia(_resource_usage(compiled.asm["cubin"]), compiled.asm["ptx"])
    except Exception as error:  # the passes of the compiler raise errors of many types
        return Report(**common, violations=(f"does not compile: {' '.join(str(error).split())[:300]}",))
    warps = compiled.metadata.num_warps
    shared = compiled.metadata.shared
    occupancy = blocks_at_once(
        MULTIPROCESSORS[target.name],
        warps=warps,
        registers=code.registers,
        shared_memory=shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
    )
    expected = machine_code.expected_instruction(machine_code.dots(compiled.asm["ttir"]), target.name, warps)
    violations = tuple(_violations(code, target, shared, expected))
    return Report(
        **common, shared_memory=shared, occupancy=occupancy, expected=expected, code=code, violations=violations
    )


def _name(source: Source, path: tuple[int, ...]) -> str:
    """The name of an argument, or of a field of a tuple argument, as "query.base"."""
    name = source.launch.kernel.arg_names[path[0]]
    value = {**source.launch.arguments, **source.launch.constants}.get(name)
    for index in path[1:]:
        name += f".{_fields(value)[index]}"
        value = value[index] if value is not None else None
    return name


def _flat(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The items with each tuple replaced by its fields, under dotted names."""
    found: dict[str, Any] = {}
    for name, value in items:
        if isinstance(value, tuple):
            fields = zip(_fields(value), value, strict=True)
            found |= _flat((f"{name}.{field}", content) for field, content in fields)
        else:
            found[name] = value
    return found


def _fields(value: Any) -> tuple[str, ...]:
    return getattr(value, "_fields", None) or tuple(str(index) for index in range(len(value)))


def _violations(code: Code, target: Target, shared: int, expected: str | None) -> Iterable[str]:
    if code.stack:
        yield f"spills {code.stack} bytes per thread"
    if code.spilled:
        yield f"spills {code.spilled} vector registers"
    if shared > target.shared_memory:
        yield f"takes {shared} bytes of shared memory, and a block has {target.shared_memory}"
    # Where mma.sync is expected, a newer instruction is as good.
    if expected is not None and expected not in code.matrix and not (expected == machine_code.MMA and code.matrix):
        yield f"has no {expected}"


def _resource_usage(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
