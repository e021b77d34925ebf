"""Compiles launches for any target on any machine, and says what came out.

A launch is specialised as Triton's own launcher would do it (by the launcher's own code: sizes that are 1 or multiples
of 16, pointers that are aligned, None), so what is compiled here is what would run there. Launches that differ in
nothing the compiler sees are compiled once. Triton's disk cache (TRITON_CACHE_DIR) makes the next time quick.

Half a second to seven a kernel. The compiler and its assembler run outside Python's lock, so threads suffice.
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

    example: str  # what asked for it
    launch: Launch
    target: Target


@dataclass(frozen=True)
class Report:
    """What came of the launches that are one and the same to the compiler."""

    kernel: str
    target: str
    examples: tuple[str, ...]  # all that asked for it
    constants: dict[str, Any]  # the constexpr arguments, those that the launcher made so included
    signature: dict[str, str]  # of the others
    options: dict[str, Any]
    shared_memory: int = 0  # bytes
    occupancy: int = 0  # blocks that a multiprocessor holds at once
    expected: str | None = None  # matrix instruction
    code: Code | None = None  # None: it did not compile
    violations: tuple[str, ...] = ()


def unavailable() -> str | None:
    """Why nothing can be compiled here; None if it can."""
    if runtime.interpreting():
        return "TRITON_INTERPRET is set, and what the interpreter runs cannot be compiled: unset it"
    return runtime.missing()


@dataclass
class Source:
    """A kernel as the compiler sees it: a launch, specialised for a target."""

    launch: Launch
    target: Target
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    examples: list[str]  # that asked for it
    refusal: str | None = None  # why the launcher would not take it

    @property
    def key(self) -> str:
        """The same for what need not be compiled twice."""
        kernel = self.launch.kernel
        seen = (self.signature, self.constants, self.attributes, self.options, self.target.name, self.refusal)
        return f"{kernel.__module__}.{kernel.__name__} {seen}"


def distinct(requests: Iterable[Request]) -> list[Source]:
    """The different kernels among the requests, in their order.

    Raises:
        RuntimeError: nothing can be compiled here.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    together: dict[str, Source] = {}
    for request in requests:
        source = _specialise(request.launch, request.target)
        source = together.setdefault(source.key, source)
        if request.example not in source.examples:
            source.examples.append(request.example)
    return list(together.values())


def compile_all(
    sources: Iterable[Source], *, workers: int | None = None, done: Callable[[], None] = lambda: None
) -> list[Report]:
    """A report for each.

    Args:
        sources: from `distinct`.
        workers: how many at a time; None: as many as there are processors.
        done: called when another report is there.
    """

    def work(source: Source) -> Report:
        report = _compile(source)
        done()
        return report

    sources = list(sources)
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        reports = list(pool.map(work, sources))
    # Now and then the compiler's front end stumbles over another thread, so what failed is tried once more, alone.
    return [r if r.code is not None else _compile(s) for s, r in zip(sources, reports, strict=True)]


def _gpu(target: Target) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(target.backend, target.arch, target.warp_size)


def _specialise(launch: Launch, target: Target) -> Source:
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(_gpu(target))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    # The launcher's default, said aloud: it is about to change, and warns.
    options = {**asdict(launch.options), "enable_fp_fusion": True}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        bound, specialisation, _ = bind(**launch.arguments, **launch.constants)
        _, signature, constants, attributes = kernel._pack_args(backend, dict(options), bound, specialisation, options)
    except (TypeError, KeyError, ValueError) as error:  # an argument, or an option that this kind of GPU does not have
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
        made = triton_compile(ast, target=_gpu(target), options=source.options)
        if target.backend == "hip":
            code = machine_code.amd(made.asm["amdgcn"])
        else:
            code = machine_code.nvidia(_resource_usage(made.asm["cubin"]), made.asm["ptx"])
    except Exception as error:  # of any of the compiler's passes, each with its own
        return Report(**common, violations=(f"does not compile: {' '.join(str(error).split())[:300]}",))
    warps = made.metadata.num_warps
    shared = made.metadata.shared
    occupancy = blocks_at_once(
        MULTIPROCESSORS[target.name],
        warps=warps,
        registers=code.registers,
        shared_memory=shared,
        tensor_columns=getattr(made.metadata, "tmem_size", None) or 0,
    )
    expected = machine_code.expected(machine_code.products(made.asm["ttir"]), target.name, warps)
    violations = tuple(_violations(code, target, shared, expected))
    return Report(
        **common, shared_memory=shared, occupancy=occupancy, expected=expected, code=code, violations=violations
    )


def _name(source: Source, path: tuple[int, ...]) -> str:
    """ "query.base": an argument, or a part of one that is a tuple."""
    name = source.launch.kernel.arg_names[path[0]]
    value = {**source.launch.arguments, **source.launch.constants}.get(name)
    for index in path[1:]:
        name += f".{_fields(value)[index]}"
        value = value[index] if value is not None else None
    return name


def _flat(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Tuples as their parts, by dotted names."""
    found: dict[str, Any] = {}
    for name, value in items:
        if isinstance(value, tuple):
            parts = zip(_fields(value), value, strict=True)
            found |= _flat((f"{name}.{field}", part) for field, part in parts)
        else:
            found[name] = value
    return found


def _fields(value: Any) -> tuple[str, ...]:
    return getattr(value, "_fields", None) or tuple(str(index) for index in range(len(value)))


def _violations(code: Code, target: Target, shared: int, expected: str | None) -> Iterable[str]:
    if code.stack:
        yield f"spills {code.stack} bytes a thread"
    if code.spilled:
        yield f"moves {code.spilled} vector registers"
    if shared > target.shared_memory:
        yield f"takes {shared} bytes of shared memory of {target.shared_memory}"
    # A newer instruction does for an older one: a chip may make more of a tile than is asked of it.
    if expected is not None and expected not in code.matrix and not (expected == machine_code.MMA and code.matrix):
        yield f"has no {expected}"


def _resource_usage(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
