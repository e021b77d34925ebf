"""What a compiled kernel uses, read from its code: registers, memory for spills, matrix products, ways to memory.

| read from | by |
|---|---|
| cubin | `cuobjdump --dump-resource-usage`: registers and stack a thread |
| ptx | which instructions it has |
| amdgcn | both, the first from its metadata |
| ttir | which products the kernel asks for, and so which instruction each chip should make of them |

All functions take text and know no compiler.
"""

import re
from dataclasses import dataclass

MMA, WGMMA, TCGEN05, MFMA = "mma.sync", "wgmma", "tcgen05", "mfma"
CP_ASYNC, TMA = "cp.async", "TMA"

# A warp group's product has 64 rows, of a tile of 64 or more; smaller tiles are the older instruction's.
_GROUP_ROWS, _GROUP_WARPS = 64, 4


@dataclass(frozen=True)
class Code:
    """What a kernel's code uses."""

    registers: int  # a thread
    stack: int  # bytes of local memory a thread: where spilled registers go
    spilled: int  # vector registers that AMD's compiler moved, to the stack or to registers of matrix products
    scalars: int  # scalar registers that it keeps in lanes of vector registers: no memory, but instructions
    matrix: tuple[str, ...]  # kinds of matrix products
    copies: tuple[str, ...]  # kinds of asynchronous copies from global to shared memory
    load_bytes: tuple[int, ...]  # that one thread reads from global memory at once, widths that occur
    store_bytes: tuple[int, ...]
    atomics: int  # instructions


@dataclass(frozen=True)
class Product:
    """A matrix product of tiles [M, K] [K, N]."""

    rows: int
    depth: int
    columns: int
    dtype: str  # bf16, f16, f32
    precision: str  # of f32: ieee, tf32


def nvidia(usage: str, ptx: str) -> Code:
    """Of a cubin's resource usage and the PTX that it was made from."""
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
    """Of a gfx assembly with its metadata."""
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


def products(ttir: str) -> list[Product]:
    """The matrix products that a kernel asks for."""
    found = []
    for line in ttir.splitlines():
        if not re.search(r"\btt\.dot\b", line):
            continue
        types = re.search(r"tensor<(\d+)x(\d+)x(\w+)> \* tensor<(\d+)x(\d+)x\w+>", line)
        if types is not None:
            rows, depth, dtype, _, columns = types.groups()
            precision = re.search(r"inputPrecision = (\w+)", line)
            asked = precision.group(1) if precision else "ieee"
            found.append(Product(int(rows), int(depth), int(columns), dtype, asked))
    return found


def expected(asked: list[Product], target: str, warps: int) -> str | None:
    """The matrix instruction that the code for a target should have; None where none of the products needs one.

    fp32 in full precision has no matrix instruction on NVIDIA's chips. tf32 has, but a warp group's takes its operands
    in one order only, so nothing beyond the older one can be asked for.
    """
    if target.startswith("gfx"):
        return MFMA if asked else None
    fast = [product for product in asked if product.dtype != "f32" or product.precision != "ieee"]
    if not fast:
        return None
    grouped = warps >= _GROUP_WARPS and any(p.rows >= _GROUP_ROWS and p.dtype != "f32" for p in fast)
    return {"sm_90": WGMMA, "sm_100": TCGEN05}.get(target, MMA) if grouped else MMA


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"the compiler's report has no {pattern!r}: {text[:500]!r}")
    return int(found.group(1))


def _present(text: str, patterns: dict[str, str]) -> tuple[str, ...]:
    return tuple(name for name, pattern in patterns.items() if re.search(pattern, text))


def _widths(pattern: str, ptx: str) -> tuple[int, ...]:
    """Bytes of vector accesses, as "ld.global.v4.b32"."""
    found = set()
    for instruction in re.findall(pattern, ptx):
        size = re.search(r"\.[busf](\d+)$", instruction)
        if size is not None:
            vector = re.search(r"\.v(\d+)\.", instruction)
            found.add(int(size.group(1)) // 8 * (int(vector.group(1)) if vector else 1))
    return tuple(sorted(found))


def _amd_width(kind: str) -> int:
    """Bytes of "dwordx4", "ushort_d16", "ubyte"."""
    if words := re.match(r"dword(?:x(\d+))?", kind):
        return 4 * int(words.group(1) or 1)
    return 2 if "short" in kind else 1
