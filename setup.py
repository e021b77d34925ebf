"""Builds the CPU kernels of `csrc/cpu` into `softprompt_kernels.kernels.cpu._native`; metadata is in pyproject.toml.

The module takes raw pointers, so building needs no torch and one build serves every torch. Each kernel is compiled once
for each instruction set of the platform and the right one is chosen when it runs, so a wheel serves every such machine.

    SOFTPROMPT_CPU   auto (default): build where there is a C++ compiler that can; 1: insist on it; 0: do not build
    CXX              the compiler; default: g++, clang++ or c++, the first that is there
    CXXFLAGS, LDFLAGS  are added to its arguments

Without the module the package works, slower, on PyTorch's own kernels; `softprompt doctor` says so.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MODULE = "softprompt_kernels.kernels.cpu._native"
COMMON = (
    "bindings_cpu.cpp",
    "bindings_cpu_attention.cpp",
    "bindings_cpu_kl.cpp",
    "bindings_cpu_product.cpp",
    "cpu/attention.cpp",
    "cpu/attention_plan.cpp",
    "cpu/isa.cpp",
    "cpu/kl.cpp",
    "cpu/parallel.cpp",
    "cpu/product_call.cpp",
)
FOR_EACH_INSTRUCTION_SET = (
    "cpu/attention_backward.cpp",
    "cpu/attention_forward.cpp",
    "cpu/kl_rows.cpp",
    "cpu/kl_tile.cpp",
    "cpu/table.cpp",
)
FOR_ONE = {"amx": ("cpu/product.cpp",)}
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma"
INSTRUCTION_SETS = {
    "x86_64": {
        "amx": f"{AVX512} -mamx-tile -mamx-bf16 -DSPK_AMX",  # on Linux, and by compilers that know it
        "avx512": AVX512,
        "avx2": "-mavx2 -mfma",
        "baseline": "",
    },
}
FLAGS = "-std=c++17 -O3 -fPIC -ffp-contract=fast -fvisibility=hidden -Wall -Wextra -Wno-psabi"


def compiler() -> str | None:
    """The C++ compiler, None if there is none."""
    named = os.environ.get("CXX")
    return named or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def openmp() -> str:
    """The flag for GCC, whose OpenMP symbols torch's runtime has; nothing for Clang (see csrc/cpu/parallel.cpp)."""
    version = subprocess.run([*shlex.split(compiler() or ""), "--version"], capture_output=True, text=True)
    return "" if "clang" in version.stdout.lower() else "-fopenmp"


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


def wanted() -> bool:
    """Whether to build, from SOFTPROMPT_CPU and what is there."""
    choice = os.environ.get("SOFTPROMPT_CPU", "auto")
    if choice not in ("auto", "0", "1"):
        sys.exit(f"SOFTPROMPT_CPU must be auto, 0 or 1; got {choice!r}")
    if choice == "0":
        return False
    if os.name == "posix" and compiler() is not None:
        return True
    if choice == "1":
        sys.exit("SOFTPROMPT_CPU=1 asks for the CPU kernels, and there is no C++ compiler here: install g++ or clang++")
    print("softprompt-kernels: no C++ compiler here, so the CPU kernels are left out", file=sys.stderr)
    return False


class NinjaBuild(build_ext):
    """Compiles each source for each instruction set, several at a time, and only what has changed."""

    def build_extension(self, ext: Extension) -> None:
        """Writes a build.ninja and runs it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            (folder / "build.ninja").write_text(self._rules(target))
            subprocess.run([sys.executable, "-m", "ninja", "-C", str(folder)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            failed = f"softprompt-kernels: the CPU kernels did not compile ({error}); CXX names another compiler"
            if os.environ.get("SOFTPROMPT_CPU") == "1":
                sys.exit(f"{failed}, SOFTPROMPT_CPU=0 installs without them")
            print(f"{failed}. They are left out; SOFTPROMPT_CPU=1 makes this an error.", file=sys.stderr)
            ext.optional = True  # or setuptools misses the file where it copies it

    def _rules(self, target: Path) -> str:
        import pybind11

        includes = [sysconfig.get_path("include"), pybind11.get_include(), str(ROOT / "csrc")]
        quoted = [shlex.quote(path) for path in includes]
        flags = " ".join([FLAGS, openmp(), *(f"-isystem {path}" for path in quoted[:2]), f"-I{quoted[2]}"])
        flags += f" {os.environ.get('CXXFLAGS', '')}"
        sets = instruction_sets()
        flags += "".join(f" -DSPK_HAS_{name.upper()}" for name in sets)
        link = "-shared" if sys.platform != "darwin" else "-bundle -undefined dynamic_lookup"
        rules = [
            f"cxx = {compiler()}",
            f"flags = {flags.replace('$', '$$')}",
            f"ldflags = {link} {os.environ.get('LDFLAGS', '')}".replace("$", "$$"),
            "rule compile",
            "  command = $cxx $flags $isa -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $cxx $in $ldflags -o $out",
        ]
        objects = []
        units = [(source, "neutral", "") for source in COMMON]
        units += [
            (source, name, f"{options} -fno-exceptions -DSPK_ISA={name}")
            for name, options in sets.items()
            for source in (*FOR_EACH_INSTRUCTION_SET, *FOR_ONE.get(name, ()))
        ]
        for source, name, options in units:
            objects.append(f"{name}/{Path(source).stem}.o")
            rules += [f"build {objects[-1]}: compile {_escape(ROOT / 'csrc' / source)}", f"  isa = {options}"]
        rules += [f"build {_escape(target)}: link {' '.join(objects)}", ""]
        return "\n".join(rules)


def _escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


setup(
    ext_modules=[Extension(MODULE, [])] if wanted() else [],
    cmdclass={"build_ext": NinjaBuild},
)
