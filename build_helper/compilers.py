"""Finds the compilers and asks what they can do.

    CXX          the C++ compiler; default: the first of g++, clang++ and c++ that is there
    NVCC         the CUDA compiler; default: nvcc on PATH, else the one in CUDA_HOME, CUDA_PATH or /usr/local/cuda

CXX and NVCC are command lines: they may have arguments, as in `ccache g++`.
"""

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma"
INSTRUCTION_SETS = {  # machine -> {name of the instruction set: flags of the compiler}
    "x86_64": {
        "amx": f"{AVX512} -mamx-tile -mamx-bf16 -DSPK_AMX",
        "avx512": AVX512,
        "avx2": "-mavx2 -mfma",
        "baseline": "",
    },
}
OLDEST_NVCC = (12, 8)  # the first that knows sm_120
DEFAULT_CUDA_HOME = "/usr/local/cuda"

# --- C++ --------------------------------------------------------------------------------------------------------------


def cxx() -> str | None:
    """The command of the C++ compiler, None if there is none."""
    named = os.environ.get("CXX", "").strip()
    return named or next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def is_clang() -> bool:
    """Whether the C++ compiler says that it is Clang. One that does not run is judged by its name."""
    command = shlex.split(cxx() or "")
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout
    except OSError:
        version = " ".join(command)
    return "clang" in version.lower()


def openmp_flag() -> str:
    """-fopenmp for GCC, whose OpenMP symbols torch's runtime has. Nothing for Clang: see cpu/platform/parallel.cpp."""
    return "" if is_clang() else "-fopenmp"


def instruction_sets() -> dict[str, str]:
    """The instruction sets that the CPU kernels are compiled for on this machine: name -> flags of the compiler."""
    machine = platform.machine().replace("AMD64", "x86_64")
    sets = INSTRUCTION_SETS.get(machine, {"baseline": ""})  # on 64-bit Arm, the baseline has NEON
    return {name: flags for name, flags in sets.items() if name != "amx" or has_amx(flags)}


def has_amx(flags: str) -> bool:
    """Whether the compiler and its assembler know AMX, and the system is Linux, which lets a process ask for it."""
    if sys.platform != "linux":
        return False
    command = [*shlex.split(cxx() or ""), *flags.split(), "-x", "c++", "-c", "-o", os.devnull, "-"]
    probe = 'void probe() { __asm__ volatile("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
    return subprocess.run(command, input=probe, capture_output=True, text=True).returncode == 0


# --- CUDA -------------------------------------------------------------------------------------------------------------


def nvcc() -> str | None:
    """The command of the CUDA compiler, None if there is none."""
    named = os.environ.get("NVCC") or shutil.which("nvcc")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + [DEFAULT_CUDA_HOME]
    found = (str(Path(home, "bin", "nvcc")) for home in homes if home and Path(home, "bin", "nvcc").exists())
    return named or next(found, None)


def nvcc_problem() -> str | None:
    """Why CUDA kernels cannot be compiled here, None if they can."""
    command = nvcc()
    if command is None:
        return "there is no nvcc here (install the CUDA toolkit, or set CUDA_HOME)"
    try:
        output = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        return f"nvcc does not run ({error})"
    version = re.search(r"release (\d+)\.(\d+)", output)
    if version is None or (int(version[1]), int(version[2])) < OLDEST_NVCC:
        return f"nvcc must be {'.'.join(map(str, OLDEST_NVCC))} or newer (it says {output.strip()[-200:]!r})"
    return None


def has_driver() -> bool:
    """Whether an NVIDIA driver is there. Without one no CUDA kernel runs."""
    try:
        ctypes.CDLL("libcuda.so.1" if os.name == "posix" else "nvcuda.dll")
    except OSError:
        return False
    return True
