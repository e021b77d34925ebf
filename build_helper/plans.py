"""Which source of a module is compiled with which options.

    CXXFLAGS, LDFLAGS      are added to the arguments of the C++ compiler when it compiles and when it links
    CXX                    if it is set, nvcc uses this compiler for host code
    SOFTPROMPT_CUDA_ARCHS  the architectures of the CUDA kernels; default: 80;86;89;90;100;120. Fewer build faster

The modules take raw pointers and link no torch, so one build serves every version of torch.
"""

import os
import shlex
import sys
import sysconfig
from pathlib import Path

from build_helper import compilers
from build_helper.ninja import DEPENDENCY_FILE, IN, OPTIONS, OUT, Plan, Unit, literal

CSRC = Path(__file__).resolve().parent.parent / "csrc"
COMPILE = f"-MMD -MF {DEPENDENCY_FILE} -c {IN} -o {OUT}"

# Macros of csrc begin with SPK_, for softprompt-kernels:
#   SPK_ISA        the instruction set that a file is compiled for, and the name of its namespace
#   SPK_HAS_<SET>  the sets that the module contains
#   SPK_GEMM       this set has a GEMM
#   SPK_SIMT       the CUDA kernels are compiled for the CPU

# --- C++ --------------------------------------------------------------------------------------------------------------

CXX_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi"


def include_flags() -> str:
    """Where the headers of Python, of pybind11 and of csrc are."""
    import pybind11

    system = (sysconfig.get_path("include"), pybind11.get_include())
    return " ".join([*(f"-isystem {shlex.quote(path)}" for path in system), f"-I{shlex.quote(str(CSRC))}"])


def compile_cxx(options: str) -> str:
    """The command that compiles for this machine."""
    flags = f"{CXX_FLAGS} {options} {include_flags()} {os.environ.get('CXXFLAGS', '')}"
    return f"{literal(f'{compilers.cxx()} {flags}')} {OPTIONS} {COMPILE}"


def link_cxx() -> str:
    """The command that links what was compiled for this machine."""
    shared = "-shared" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
    return f"{literal(str(compilers.cxx()))} {IN} {shared} {literal(os.environ.get('LDFLAGS', ''))} -o {OUT}"


# --- the CPU kernels --------------------------------------------------------------------------------------------------

CPU_COMMON = (
    "bindings/cpu.cpp",
    "bindings/cpu_attention.cpp",
    "bindings/cpu_losses.cpp",
    "bindings/cpu_gemm.cpp",
    "cpu/attention/attention.cpp",
    "cpu/attention/plan.cpp",
    "cpu/platform/instruction_set.cpp",
    "cpu/losses/kl.cpp",
    "cpu/platform/parallel.cpp",
    "cpu/gemm/gemm.cpp",
)
CPU_FOR_EACH_INSTRUCTION_SET = (
    "cpu/attention/backward.cpp",
    "cpu/attention/forward.cpp",
    "cpu/losses/kl_rows.cpp",
    "cpu/losses/kl_tile.cpp",
    "cpu/kernel_table.cpp",
)
CPU_GEMM = {"amx": "cpu/gemm/gemm_amx.cpp", "avx512": "cpu/gemm/gemm_avx512.cpp"}


def cpu_plan() -> Plan:
    """Common code is compiled once, kernels once for each instruction set. Which set is used is decided at run time."""
    sets = compilers.instruction_sets()
    has = "".join(f" -DSPK_HAS_{name.upper()}" for name in sets)
    units = [Unit(source, "neutral", "compile") for source in CPU_COMMON]
    for name, options in sets.items():
        gemm = CPU_GEMM.get(name)
        options += f" -fno-exceptions -DSPK_ISA={name}" + (" -DSPK_GEMM" if gemm else "")
        sources = [*CPU_FOR_EACH_INSTRUCTION_SET, *([gemm] if gemm else [])]
        units += [Unit(source, name, "compile", options) for source in sources]
    options = f"-O3 -ffp-contract=fast {compilers.openmp_flag()}{has}"
    return Plan({"compile": compile_cxx(options), "link": link_cxx()}, units)


# --- the CUDA kernels -------------------------------------------------------------------------------------------------

CUDA_ARCHS = "80;86;89;90;100;120"


def cuda_archs() -> list[str]:
    """The architectures to build for, as numbers, the oldest first."""
    given = os.environ.get("SOFTPROMPT_CUDA_ARCHS") or CUDA_ARCHS
    archs = [arch.strip() for arch in given.replace(",", ";").split(";")]
    wrong = [arch for arch in archs if not arch.isdecimal() or int(arch) < 80]
    if wrong:
        sys.exit(f"SOFTPROMPT_CUDA_ARCHS must be numbers from 80 up, as in {CUDA_ARCHS!r}; got {given!r}")
    return sorted(set(archs), key=int)


def cuda_sources() -> list[str]:
    """The kernels, and the functions that launch them."""
    return sorted(file.relative_to(CSRC).as_posix() for file in (CSRC / "cuda").rglob("*.cu"))


def cuda_bindings() -> list[str]:
    """The pybind11 module."""
    return sorted(file.relative_to(CSRC).as_posix() for file in (CSRC / "bindings").glob("cuda*.cpp"))


def cuda_plan() -> Plan:
    """Machine code for each architecture, and PTX of the newest for later ones. The CUDA runtime is linked in."""
    archs = cuda_archs()
    codes = "".join(f" -gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
    codes += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    host = f"-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall {include_flags()}"
    if os.environ.get("CXX"):
        host += f" -ccbin {shlex.quote(os.environ['CXX'])}"
    host += f""" '-DSPK_CUDA_ARCHS="{";".join(archs)}"'"""
    nvcc = literal(str(compilers.nvcc()))
    rules = {
        "compile": f"{nvcc} {literal(host)} -lineinfo{codes} {COMPILE}",
        "bind": f"{nvcc} {literal(host)} {COMPILE}",
        "link": f"{nvcc} -shared -cudart static -Xlinker --strip-debug {IN} -o {OUT}",
    }
    units = [Unit(source, "cuda", "compile") for source in cuda_sources()]
    units += [Unit(source, "neutral", "bind") for source in cuda_bindings()]
    return Plan(rules, units)


def simt_plan() -> Plan:
    """The CUDA kernels compiled for the host, with a call before each load and store; see csrc/simt/README.md.

    The calls are those that ThreadSanitizer inserts. A build under another sanitizer goes without them. Loads of
    vectors stay whole (no SRA), so that their alignment can be checked.
    """
    checks = "-fsanitize=thread --param tsan-instrument-func-entry-exit=0 -fno-tree-sra"
    if "-fsanitize" in os.environ.get("CXXFLAGS", ""):
        checks = ""
    host = f"-O1 -g -DSPK_SIMT -I{shlex.quote(str(CSRC / 'simt' / 'include'))}"
    rules = {"compile": compile_cxx(host), "link": link_cxx()}
    units = [Unit(source, "kernels", "compile", f"{checks} -Wno-unknown-pragmas -x c++") for source in cuda_sources()]
    runtime = sorted(file.relative_to(CSRC).as_posix() for file in (CSRC / "simt").rglob("*.cpp"))
    units += [Unit(source, "runtime", "compile", "-O3") for source in runtime]
    units += [Unit(source, "neutral", "compile") for source in cuda_bindings()]
    return Plan(rules, units)
