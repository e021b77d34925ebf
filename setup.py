"""Builds the compiled kernels; metadata is in pyproject.toml.

    softprompt_kernels.kernels.cpu._native    csrc/cpu: C++ for CPUs
    softprompt_kernels.kernels.cuda._native   csrc/cuda: CUDA C++ for NVIDIA GPUs
    softprompt_kernels.kernels.cuda._simt     csrc/cuda once more, with csrc/simt, which runs it on the CPU: for tests

The modules take raw pointers, so building needs no torch and one build serves every torch. CPU kernels are compiled
once for each instruction set of the platform, CUDA kernels for each architecture, and the right ones are chosen when
they run, so a wheel serves every such machine.

    SOFTPROMPT_CPU         auto (default): build where a C++ compiler can; 1: insist on it; 0: do not build
    SOFTPROMPT_CUDA        auto (default): build where there are nvcc (12.8 or newer) and an NVIDIA driver; 1: insist on
                           it, without a driver too; 0: do not build
    SOFTPROMPT_CUDA_ARCHS  the architectures; default: 80;86;89;90;100;120. A subset builds faster
    SOFTPROMPT_SIMT        1: build the module for tests; 0 (default): do not
    CXX, NVCC              the compilers; default: g++, clang++ or c++, the first that is there; nvcc, or CUDA_HOME's,
                           which asks the former, if it is named, for code of the host
    CXXFLAGS, LDFLAGS      are added to the C++ compiler's arguments

Without the modules the package works, slower, on other kernels; `softprompt doctor` says so.
"""

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
CSRC = ROOT / "csrc"


@dataclass(frozen=True)
class Unit:
    """One source, compiled one way."""

    source: str  # under csrc
    folder: str  # of its object
    rule: str
    options: str = ""


@dataclass(frozen=True)
class Plan:
    """What ninja is told of a module."""

    rules: dict[str, str]  # name -> command; "link" makes the module
    units: list[Unit]


# --- CPU --------------------------------------------------------------------------------------------------------------

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
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma"
INSTRUCTION_SETS = {
    "x86_64": {
        "amx": f"{AVX512} -mamx-tile -mamx-bf16 -DSPK_AMX",  # on Linux, and by compilers that know it
        "avx512": AVX512,
        "avx2": "-mavx2 -mfma",
        "baseline": "",
    },
}
CXX_FLAGS = "-std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi"
DEPENDENCIES = "-MMD -MF $out.d -c $in -o $out"


def compiler() -> str | None:
    """The C++ compiler, None if there is none."""
    named = os.environ.get("CXX")
    return named or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def is_clang() -> bool:
    """Whether the C++ compiler says that it is Clang, or is named so and does not run; else it is taken for GCC."""
    command = shlex.split(compiler() or "")
    try:
        said = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    except OSError:
        said = " ".join(command)
    return "clang" in said.lower()


def openmp() -> str:
    """The flag for GCC, whose OpenMP symbols torch's runtime has; nothing for Clang (see cpu/platform/parallel.cpp)."""
    return "" if is_clang() else "-fopenmp"


def instruction_sets() -> dict[str, str]:
    """Names and flags of what is compiled for this platform."""
    machine = platform.machine().replace("AMD64", "x86_64")
    sets = INSTRUCTION_SETS.get(machine, {"baseline": ""})  # on 64-bit Arm, NEON is the baseline
    return {name: flags for name, flags in sets.items() if name != "amx" or has_amx(flags)}


def has_amx(flags: str) -> bool:
    """Whether the compiler and its assembler know the matrix unit, and Linux can be asked for it."""
    if sys.platform != "linux":
        return False
    command = [*shlex.split(compiler() or ""), *flags.split(), "-x", "c++", "-c", "-o", os.devnull, "-"]
    probe = 'void probe() { __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
    return subprocess.run(command, input=probe, capture_output=True, text=True).returncode == 0


def include_flags() -> str:
    """Where Python's, pybind11's and our headers are."""
    import pybind11

    system, own = (sysconfig.get_path("include"), pybind11.get_include()), CSRC
    return " ".join([*(f"-isystem {shlex.quote(path)}" for path in system), f"-I{shlex.quote(str(own))}"])


def cxx_command(options: str) -> str:
    """Compiles for this machine."""
    flags = f"{CXX_FLAGS} {options} {include_flags()} {os.environ.get('CXXFLAGS', '')}"
    return f"{compiler()} {flags} $options {DEPENDENCIES}"


def cxx_link() -> str:
    """Links what was compiled for this machine."""
    shared = "-shared" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
    return f"{compiler()} $in {shared} {os.environ.get('LDFLAGS', '')} -o $out"


def cpu_plan() -> Plan:
    """Common code once, kernels for each instruction set."""
    sets = instruction_sets()
    has = "".join(f" -DSPK_HAS_{name.upper()}" for name in sets)
    units = [Unit(source, "neutral", "compile") for source in CPU_COMMON]
    for name, options in sets.items():
        gemm = CPU_GEMM.get(name)
        options += f" -fno-exceptions -DSPK_ISA={name}" + (" -DSPK_GEMM" if gemm else "")
        sources = [*CPU_FOR_EACH_INSTRUCTION_SET, *([gemm] if gemm else [])]
        units += [Unit(source, name, "compile", options) for source in sources]
    return Plan({"compile": cxx_command(f"-O3 -ffp-contract=fast {openmp()}{has}"), "link": cxx_link()}, units)


# --- CUDA -------------------------------------------------------------------------------------------------------------

CUDA_ARCHS = "80;86;89;90;100;120"
LEAST_NVCC = (12, 8)  # the first that knows sm_120


def nvcc() -> str | None:
    """CUDA's compiler, None if there is none."""
    named = os.environ.get("NVCC") or shutil.which("nvcc")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    found = (str(Path(home, "bin", "nvcc")) for home in homes if home and Path(home, "bin", "nvcc").exists())
    return named or next(found, None)


def nvcc_problem() -> str | None:
    """Why CUDA kernels cannot be built here, None if they can."""
    if nvcc() is None:
        return "there is no nvcc here: install the CUDA toolkit, or set CUDA_HOME"
    try:
        said = subprocess.run([*shlex.split(nvcc() or ""), "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        return f"nvcc does not run: {error}"
    version = re.search(r"release (\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < LEAST_NVCC:
        return f"nvcc must be {'.'.join(map(str, LEAST_NVCC))} or newer; it says {said.strip()[-200:]!r}"
    return None


def has_driver() -> bool:
    """Whether an NVIDIA driver is there, without which no CUDA kernel runs."""
    try:
        ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        return False
    return True


def cuda_archs() -> list[str]:
    """The architectures to build for, as numbers."""
    given = os.environ.get("SOFTPROMPT_CUDA_ARCHS") or CUDA_ARCHS
    archs = [arch.strip() for arch in given.replace(",", ";").split(";")]
    wrong = [arch for arch in archs if not arch.isdecimal() or int(arch) < 80]
    if wrong:
        sys.exit(f"SOFTPROMPT_CUDA_ARCHS must be numbers from 80 up, as in {CUDA_ARCHS!r}; got {given!r}")
    return sorted(set(archs), key=int)


def cuda_sources() -> list[str]:
    """Kernels and what launches them."""
    return sorted(str(path.relative_to(CSRC)) for path in (CSRC / "cuda").rglob("*.cu"))


def cuda_bindings() -> list[str]:
    """What Python sees of them."""
    return sorted(str(path.relative_to(CSRC)) for path in (CSRC / "bindings").glob("cuda*.cpp"))


def cuda_plan() -> Plan:
    """Machine code for each architecture, and PTX of the newest for those to come; the CUDA runtime within."""
    archs = cuda_archs()
    codes = "".join(f" -gencode arch=compute_{arch},code=sm_{arch}" for arch in archs)
    codes += f" -gencode arch=compute_{archs[-1]},code=compute_{archs[-1]}"
    host = f"-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall {include_flags()}"
    if os.environ.get("CXX"):
        host += f" -ccbin {shlex.quote(os.environ['CXX'])}"
    host += f""" '-DSPK_CUDA_ARCHS="{";".join(archs)}"'"""
    rules = {
        "compile": f"{nvcc()} {host} -lineinfo{codes} {DEPENDENCIES}",
        "bind": f"{nvcc()} {host} {DEPENDENCIES}",
        "link": f"{nvcc()} -shared -cudart static -Xlinker --strip-debug $in -o $out",
    }
    units = [Unit(source, "cuda", "compile") for source in cuda_sources()]
    units += [Unit(source, "neutral", "bind") for source in cuda_bindings()]
    return Plan(rules, units)


def simt_plan() -> Plan:
    """The CUDA kernels for the host, each of their loads and stores with a call before it; see csrc/simt/README.md.

    The calls are those that ThreadSanitizer would have put there; a build under another sanitizer goes without. Loads
    of vectors stay whole (no SRA), so that their alignment is seen.
    """
    checks = "-fsanitize=thread --param tsan-instrument-func-entry-exit=0 -fno-tree-sra"
    if "-fsanitize" in os.environ.get("CXXFLAGS", ""):
        checks = ""
    twin = f"-O1 -g -DSPK_SIMT -I{shlex.quote(str(CSRC / 'simt' / 'include'))}"
    rules = {"compile": cxx_command(twin), "link": cxx_link()}
    units = [Unit(source, "kernels", "compile", f"{checks} -Wno-unknown-pragmas -x c++") for source in cuda_sources()]
    runtime = sorted(str(path.relative_to(CSRC)) for path in (CSRC / "simt").rglob("*.cpp"))
    units += [Unit(source, "runtime", "compile", "-O3") for source in runtime]
    units += [Unit(source, "neutral", "compile") for source in cuda_bindings()]
    return Plan(rules, units)


# --- what is built ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Module:
    """A module, the variable that asks for it, and what it needs."""

    name: str
    variable: str
    default: str
    what: str
    instead: str  # how to get along without
    problem: Callable[[], str | None]  # why it cannot be built here
    worth_it: Callable[[], bool]  # whether `auto` builds it where it can
    plan: Callable[[], Plan]

    @property
    def choice(self) -> str:
        """auto, 0 or 1."""
        return os.environ.get(self.variable, self.default)

    def wanted(self) -> bool:
        """Whether to build it, from the variable and what is there."""
        if self.choice not in ("auto", "0", "1"):
            sys.exit(f"{self.variable} must be auto, 0 or 1; got {self.choice!r}")
        if self.choice == "0" or (self.choice == "auto" and not self.worth_it()):
            return False
        problem = self.problem()
        if problem is None:
            return True
        if self.choice == "1":
            sys.exit(f"{self.variable}=1 asks for the {self.what}, and {problem}")
        print(f"softprompt-kernels: {problem}; so the {self.what} are left out", file=sys.stderr)
        return False


def compiler_problem() -> str | None:
    """Why C++ cannot be built here, None if it can."""
    if os.name == "posix" and compiler() is not None:
        return None
    return "there is no C++ compiler here: install g++ or clang++"


def simt_problem() -> str | None:
    """Why kernels cannot be compiled for the host, None if they can."""
    if sys.platform != "linux":
        return "they are built on Linux alone"
    if compiler() is None or is_clang():
        return "there is no g++ here: install it, or name it by CXX"
    return None


MODULES = (
    Module(
        "softprompt_kernels.kernels.cpu._native",
        "SOFTPROMPT_CPU",
        "auto",
        "CPU kernels",
        "CXX names another compiler, SOFTPROMPT_CPU=0 installs without them",
        compiler_problem,
        lambda: True,
        cpu_plan,
    ),
    Module(
        "softprompt_kernels.kernels.cuda._native",
        "SOFTPROMPT_CUDA",
        "auto",
        "CUDA kernels",
        "NVCC names another compiler, SOFTPROMPT_CUDA=0 installs without them",
        nvcc_problem,
        lambda: nvcc() is not None and has_driver(),
        cuda_plan,
    ),
    Module(
        "softprompt_kernels.kernels.cuda._simt",
        "SOFTPROMPT_SIMT",
        "0",
        "CUDA kernels for the host",
        "CXX names another g++, SOFTPROMPT_SIMT=0 installs without them",
        simt_problem,
        lambda: True,
        simt_plan,
    ),
)


class NinjaBuild(build_ext):
    """Compiles several sources at a time, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        """Writes a build.ninja and runs it."""
        module = next(module for module in MODULES if module.name == ext.name)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp, *ext.name.split(".")[-2:]).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (folder / "build.ninja").write_text(ninja_file(module.plan(), target))
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            failed = f"softprompt-kernels: the {module.what} did not compile ({error})"
            if module.choice == "1":
                sys.exit(f"{failed}; {module.instead}")
            print(f"{failed}. They are left out; {module.variable}=1 makes this an error.", file=sys.stderr)
            ext.optional = True  # or setuptools misses the file where it copies it


def ninja_file(plan: Plan, target: Path) -> str:
    """The text of a build.ninja."""
    lines = []
    for name, command in plan.rules.items():
        lines += [f"rule {name}", f"  command = {_dollars(command)}"]
        if name != "link":
            lines += ["  depfile = $out.d", "  deps = gcc"]
    objects = []
    for unit in plan.units:
        objects.append(f"{unit.folder}/{Path(unit.source).with_suffix('').as_posix()}.o")
        lines += [f"build {objects[-1]}: {unit.rule} {_path(CSRC / unit.source)}", f"  options = {unit.options}"]
    lines += [f"build {_path(target)}: link {' '.join(objects)}", ""]
    return "\n".join(lines)


def _dollars(command: str) -> str:
    return re.sub(r"\$(?!in\b|out\b|options\b)", "$$$$", command)


def _path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension(module.name, []) for module in MODULES if module.wanted()],
    cmdclass={"build_ext": NinjaBuild},
)
