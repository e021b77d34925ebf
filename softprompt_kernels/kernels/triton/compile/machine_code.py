"""What a compiled kernel uses, read from its code: registers, spills, matrix instructions, copies and access widths.

| source | what is read from it |
|---|---|
| cubin | registers and stack per thread, by `cuobjdump --dump-resource-usage` |
| ptx | which instructions the kernel has |
| amdgcn | both: registers and stack from its metadata |
| ttir | the kernel's dots (`tt.dot`), which decide the matrix instruction that each chip should use |

All functions take text and need no compiler.
"""

import re
from dataclasses import dataclass

MMA, WGMMA, TCGEN05, MFMA = "mma.sync", "wgmma", "tcgen05", "mfma"
CP_ASYNC, TMA = "cp.async", "TMA"

# wgmma and tcgen05 take 64 rows per warp group of 4 warps; smaller tiles use mma.sync.
_GROUP_ROWS, _GROUP_WARPS = 64, 4


@dataclass(frozen=True)
class Code:
    """What a kernel's code uses."""

    registers: int  # per thread
    stack: int  # bytes of local memory per thread, which holds spilled registers
    spilled: int  # vector registers that AMD's compiler spilled, to the stack or to accumulator registers
    scalars: int  # scalar registers that AMD's compiler keeps in lanes of vector registers: costs instructions only
    matrix: tuple[str, ...]  # kinds of matrix instructions
    copies: tuple[str, ...]  # kinds of asynchronous copies from global to shared memory
    load_bytes: tuple[int, ...]  # widths of global loads of one thread
    store_bytes: tuple[int, ...]
    atomics: int  # instructions


@dataclass(frozen=True)
class Dot:
    """A `tt.dot` of tiles [M, K] and [K, N]."""

    rows: int  # M
    depth: int  # K
    columns: int  # N
    dtype: str  # bf16, f16, f32
    precision: str  # of f32: ieee, tf32


def nvidia(usage: str, ptx: str) -> Code:
    """The `Code` of a cubin, from its resource usage and its PTX."""
    return Code(
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
        spilled=0,
        scalars=0,
        matrix=_present(ptx, {MMA: r"\bmma\.sync", WGMMA: r"\bwgmma\.mma_async", TCGEN05: r"\btcgen05\.mma"}),
        copies=_present(ptx, {CP_ASYNC: r"\bcp\.async\.c[ag]\.", TMA: r"\bcp\.async\.bulk\.tensor"}),
        load_bytes=_widths(r"\bld\.global[\w.:]*", ptx),
        store_bytes=_widths(r"\bst\.global[\w.:]*", ptx),
        atomics=len(re.findall(r"\b(?:atom|red)\.global|\b(?:atom|red)(?:\.\w+)*\.global", ptx)),
    )


def amd(amdgcn: str) -> Code:
    """The `Code` of a gfx assembly with its metadata."""
    loads = re.findall(r"\b(?:buffer|global|flat)_load_(\w+)", amdgcn)
    stores = re.findall(r"\b(?:buffer|global|flat)_store_(\w+)", amdgcn)
    return Code(
        registers=_number(r"\.vgpr_count:\s*(\d+)", amdgcn),
        stack=_number(r"\.private_segment_fixed_size:\s*(\d+)", amdgcn),
        spilled=_number(r"\.vgpr_spill_count:\s*(\d+)", amdgcn),
        scalars=_number(r"\.sgpr_spill_count:\s*(\d+)", amdgcn),
        matrix=_present(amdgcn, {MFMA: r"\bv_mfma_"}),
        copies=(),
        load_bytes=tuple(sorted({_amd_width(kind) for kind in loads})),
        store_bytes=tuple(sorted({_amd_width(kind) for kind in stores})),
        atomics=len(re.findall(r"\b(?:buffer|global|flat)_atomic_", amdgcn)),
    )


def dots(ttir: str) -> list[Dot]:
    """The dots of a kernel."""
    found = []
    for line in ttir.splitlines():
        if not re.search(r"\btt\.dot\b", line):
            continue
        types = re.search(r"tensor<(\d+)x(\d+)x(\w+)> \* tensor<(\d+)x(\d+)x\w+>", line)
        if types is not None:
            rows, depth, dtype, _, columns = types.groups()
            precision = re.search(r"inputPrecision = (\w+)", line)
            name = precision.group(1) if precision else "ieee"
            found.append(Dot(int(rows), int(depth), int(columns), dtype, name))
    return found


def expected_instruction(dots: list[Dot], target: str, warps: int) -> str | None:
    """The matrix instruction that the code for a target should have; None if none of the dots needs one.

    NVIDIA's chips have no matrix instruction for fp32 in full precision. They have one for tf32, but wgmma and tcgen05
    take tf32 operands in one memory order only, so only mma.sync is expected there.
    """
    if target.startswith("gfx"):
        return MFMA if dots else None
    on_tensor_cores = [dot for dot in dots if dot.dtype != "f32" or dot.precision != "ieee"]
    if not on_tensor_cores:
        return None
    grouped = warps >= _GROUP_WARPS and any(d.rows >= _GROUP_ROWS and d.dtype != "f32" for d in on_tensor_cores)
    return {"sm_90": WGMMA, "sm_100": TCGEN05}.get(target, MMA) if grouped else MMA


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}: {text[:500]!r}")
    return int(found.group(1))


def _present(text: str, patterns: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name, pattern in patterns.items() if re.search(pattern, text))


def _widths(pattern: str, ptx: str) -> tuple[int, ...]:
    """The widths in bytes of all accesses that match, such as 16 of "ld.global.v4.b32"."""
    found = set()
    for instruction in re.findall(pattern, ptx):
        size = re.search(r"\.[busf](\d+)$", instruction)
        if size is not None:
            vector = re.search(r"\.v(\d+)\.", instruction)
            found.add(int(size.group(1)) // 8 * (int(vector.group(1)) if vector else 1))
    return tuple(sorted(found))


def _amd_width(kind: str) -> int:
    """The width in bytes of "dwordx4", "ushort_d16", "ubyte"."""
    if words := re.match(r"dword(?:x(\d+))?", kind):
        return 4 * int(words.group(1) or 1)
    return 2 if "short" in kind else 1
