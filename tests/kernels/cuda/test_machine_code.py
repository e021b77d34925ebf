"""The machine code that nvcc makes of the CUDA kernels: its instructions, registers and memory."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
SOURCES = sorted(path.relative_to(CSRC / "cuda").as_posix() for path in (CSRC / "cuda").rglob("*.cu"))
ARCHS = (80, 86, 89, 90, 100, 120)
REGISTERS = 65536  # of a multiprocessor
THREADS = {"exponentials": 256}  # of a block; 128 elsewhere

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc here"),
]


def nvcc(source, *options):
    command = ["nvcc", "-std=c++17", f"-I{CSRC}", *options, str(CSRC / "cuda" / source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """The PTX for sm_80 of each kernel, by mangled name."""
    folder, found = tmp_path_factory.mktemp("ptx"), {}
    for source in SOURCES:
        nvcc(source, "-ptx", "-arch=compute_80", "-o", str(folder / source.replace("/", "_")))
        text = (folder / source.replace("/", "_")).read_text()
        found |= dict(re.findall(r"\.entry (\w+)\((.*?)^\}", text, re.DOTALL | re.MULTILINE))
    return found


def bodies(kernels, name):
    found = [body for mangled, body in kernels.items() if name in mangled]
    assert found, (name, list(kernels))
    return found


def test_every_kernel_is_compiled(kernels):
    attention = ("14forward_kernel", "18backward_dq_kernel", "20backward_dkdv_kernel", "20reduce_splits_kernel")
    assert [len(bodies(kernels, name)) for name in attention] == [6, 6, 6, 6]  # two dtypes, three head sizes
    assert len(bodies(kernels, "17divergence_kernel")) == 3 and len(bodies(kernels, "19exponentials_kernel")) == 1
    assert len(kernels) == 28


def test_no_kernel_has_local_memory_or_adds_floats_atomically(kernels):
    for name, body in kernels.items():
        assert not re.search(r"\.local\b|\b(ld|st)\.local", body), name
        assert not re.search(r"\b(atom|red)\.", body), name


@pytest.mark.parametrize(
    ("name", "gemms"), [("14forward_kernel", 2), ("18backward_dq_kernel", 3), ("20backward_dkdv_kernel", 4)]
)
def test_attention_uses_tensor_cores_and_asynchronous_copies(name, gemms, kernels):
    """The tile loop's body is unrolled: for D = 64, a GEMM of 16 rows with a 64 x 64 tile is 32 mma instructions."""
    for mangled, body in kernels.items():
        if name not in mangled:
            continue
        kind = "bf16" if "bfloat16" in mangled else "f16"
        found = re.findall(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(\w+)\.\w+\.f32", body)
        assert set(found) == {kind}, mangled
        if "Li64E" in mangled:
            assert len(found) == gemms * 32, mangled
        assert "cp.async.cg.shared.global" in body and "ldmatrix.sync.aligned.m8n8.x4.shared" in body
        assert "ldmatrix.sync.aligned.m8n8.x4.trans.shared" in body
        wide = r"st\.(volatile\.)?(global\.)?v4\.\w32|st\.(global\.)?v2\.\w64"
        assert re.search(wide, body), mangled


def test_losses_load_vectors_of_16_bytes(kernels):
    for name in ("17divergence_kernel", "19exponentials_kernel"):
        for body in bodies(kernels, name):
            assert re.search(r"ld\.(global\.)?(nc\.)?v4\.\w32", body) and "mma.sync" not in body


@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_two_blocks_fit_on_a_multiprocessor(source, tmp_path):
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    said = nvcc(source, *codes, "-O3", "-Xptxas", "-v", "-c", "-o", str(tmp_path / "out.o")).stderr
    found = re.findall(
        r"entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        said,
        re.DOTALL,
    )
    assert {int(arch) for _, arch, *_ in found} == set(ARCHS)
    for name, arch, stack, stores, loads, registers in found:
        assert (stack, stores, loads) == ("0", "0", "0"), (name, arch)
        threads = next((n for part, n in THREADS.items() if part in name), 128)
        assert 2 * -(-int(registers) // 8) * 8 * threads <= REGISTERS, (name, arch, registers)
