"""The compiled attention: instruction sets agree, threads, forks, memory that runs out, arguments that are refused."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.ops import prompt_attention

pytestmark = pytest.mark.usefixtures("module")

PROBE = """
import torch
from softprompt_kernels.ops import prompt_attention
torch.manual_seed(0)
torch.set_num_threads(2)
shapes = [(3, 6, 70, 40), *[(3, 2, 70, 40)] * 2, *[(1, 2, 90, 40)] * 2]
inputs = [torch.randn(s).to(torch.DTYPE).requires_grad_() for s in shapes]
out, lse = prompt_attention(*inputs, softcap=4.0, window=100, return_lse=True, backend="cpu")
gradients = torch.autograd.grad(out.float().square().sum() + lse.sum(), inputs)
"""


def python(code, timeout=120, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_instruction_sets_agree(module, tmp_path, dtype):
    names = module.instruction_sets()
    assert names[-1] == "baseline"
    results = {}
    for name in names:
        code = PROBE.replace("DTYPE", dtype) + (
            f"from softprompt_kernels.kernels.cpu import native\n"
            f"assert native.module().instruction_set() == {name!r}\n"
            f"torch.save([t.detach() for t in (out, lse, *gradients)], {str(tmp_path / name)!r})\n"
        )
        done = python(code, SOFTPROMPT_ISA=name)
        assert done.returncode == 0, done.stderr
        results[name] = torch.load(tmp_path / name)
    tolerance = 2e-5 if dtype == "float32" else 2e-2
    for name in names[:-1]:
        for a, b in zip(results[name], results["baseline"], strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def test_an_unknown_instruction_set_is_refused_with_the_available_ones(module):
    done = python(PROBE.replace("DTYPE", "float32"), SOFTPROMPT_ISA="mmx")
    accepted = ", ".join(module.instruction_sets())
    assert f"SOFTPROMPT_ISA must be one of {accepted} on this machine; got 'mmx'" in done.stderr


def test_without_permission_for_amx_the_next_instruction_set_runs(module):
    """Linux refuses tile registers to a process whose signal stack is too small for them."""
    if module.instruction_sets()[0] != "amx":
        pytest.skip("this machine has no AMX")
    small_signal_stack = """
import ctypes
class Stack(ctypes.Structure):
    _fields_ = [("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]
memory = ctypes.create_string_buffer(4096)
stack = Stack(ctypes.cast(memory, ctypes.c_void_p), 0, 4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None) == 0
"""
    code = (
        small_signal_stack
        + PROBE.replace("DTYPE", "float32")
        + (
            "from softprompt_kernels.kernels.cpu import native\n"
            "print(native.module().instruction_sets()[0], native.module().instruction_set())"
        )
    )
    done = python(code, SOFTPROMPT_ISA="")
    assert done.stdout.split() == ["avx512", "avx512"], done.stderr
    done = python(code, SOFTPROMPT_ISA="amx")
    assert "SOFTPROMPT_ISA must be one of avx512" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_torch_s_openmp_runtime_is_the_only_one_that_is_loaded():
    code = PROBE.replace("DTYPE", "float32") + (
        "maps = open('/proc/self/maps').read().splitlines()\n"
        "print(*{line.split()[-1] for line in maps if 'omp' in line.split()[-1].rsplit('/', 1)[-1]}, sep='\\n')"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    (runtime,) = done.stdout.split()
    assert Path(torch.__file__).parent in Path(runtime).parents


def test_calls_from_several_python_threads_at_once():
    torch.manual_seed(0)
    problems = [[torch.randn(2, 2, 50 + i, 16, requires_grad=True) for _ in range(5)] for i in range(6)]

    def work(inputs):
        for _ in range(5):
            out = prompt_attention(*inputs, prompt_index=torch.tensor([0, 1]), backend="cpu")
            gradients = torch.autograd.grad(out.square().sum(), inputs)
        return [out.detach(), *gradients]

    alone = [work(inputs) for inputs in problems]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(work, problems))
    for a, b in zip(alone, together, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y)  # not equal: a Python thread may get another number of OpenMP threads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_after_use_works_and_gives_the_same_bits():
    code = PROBE.replace("DTYPE", "float32") + (
        "import os\n"
        "child = os.fork()\n"
        "again, _ = prompt_attention(*inputs, softcap=4.0, window=100, return_lse=True, backend='cpu')\n"
        "if child == 0:  # compared by numpy: torch's kernels would wait for threads that only the parent has\n"
        "    os._exit(0 if (out.detach().numpy() == again.detach().numpy()).all() else 3)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    done = python(code, timeout=60)
    assert done.stdout.strip() == "0", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the address space this way")
def test_a_failed_allocation_is_a_memory_error_and_leaves_no_gradient():
    code = """
import resource, torch
from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.ops import prompt_attention
torch.set_num_threads(4)  # each thread needs a workspace of 40 MiB for rows of this size
inputs = [torch.randn(1, 1, tokens, 8192, requires_grad=True) for tokens in (1024, 1, 1, 1, 1)]
prompt_attention(*inputs, backend="cpu").sum().backward()
for tensor in inputs:
    tensor.grad = None
out = prompt_attention(*inputs, backend="cpu")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**27, -1))
for call in (lambda: prompt_attention(*inputs, backend="cpu"), lambda: out.sum().backward()):
    try:
        call()
    except MemoryError:
        print("MemoryError")
print([t.grad for t in inputs])
"""
    done = python(code)
    assert done.stdout.split("\n")[:3] == ["MemoryError", "MemoryError", str([None] * 5)], done.stderr


# --- what the bindings refuse before a pointer is followed ------------------------------------------------------------


def view(*sizes, strides=None):
    """A tensor at an address of no memory: whoever follows it crashes."""
    return 16, sizes, torch.empty(sizes, device="meta").stride() if strides is None else strides


def arguments(**changes):
    given = {
        "dtype": 0,
        "query": view(2, 4, 3, 8),
        "key": view(2, 2, 5, 8),
        "value": view(2, 2, 5, 6),
        "prompt_key": view(1, 2, 7, 8),
        "prompt_value": view(1, 2, 7, 6),
        "prompt_index": None,
        "prompt_lengths": None,
        "key_lengths": None,
        "cu_seqlens": None,
        "sinks": None,
        "causal": True,
        "window": None,
        "softcap": None,
        "scale": 1.0,
        "threads": 1,
    }
    return [*{**given, **changes}.values()]


REFUSED = [
    ({"dtype": 3}, "dtype must be one of 0 (float32), 1 (bfloat16), 2 (float16); got 3"),
    ({"threads": 0}, "threads must be in [1, 4096]; got 0"),
    ({"window": 0}, "window must be at least 1; got 0"),
    ({"value": view(2, 2, 4, 6)}, "value's shape must be [2, 2, 5, 6]; got [2, 2, 4, 6]"),
    ({"prompt_value": view(1, 1, 7, 6)}, "prompt_value's shape must be [1, 2, 7, 6]; got [1, 1, 7, 6]"),
    ({"query": view(2, 3, 3, 8)}, "query's heads must be a multiple of key's heads, 2; got 3"),
    ({"key": view(2, 2, 5, 8, strides=(80, 40, 1, 5))}, "key's last stride must be 1; got strides [80, 40, 1, 5]"),
    ({"prompt_index": (16, 3)}, "prompt_index's length must be 2; got 3"),
    (
        {"prompt_key": view(3, 2, 7, 8), "prompt_value": view(3, 2, 7, 6)},
        "prompt_index must be given for 3 prompts and 2 sequences; got None",
    ),
    ({"cu_seqlens": (16, 2)}, "cu_seqlens must be given for a batch of 1"),
    ({"sinks": (16, 5)}, "sinks's length must be 4; got 5"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_sizes_and_strides_are_checked_before_pointers_are_followed(module, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        module.AttentionProblem(*arguments(**changes))


def test_outputs_are_checked_too(module):
    problem = module.AttentionProblem(*arguments())
    with pytest.raises(ValueError, match=re.escape("out's shape must be [2, 4, 3, 6]; got [2, 4, 3, 8]")):
        problem.forward(view(2, 4, 3, 8), (16, 24))
    with pytest.raises(ValueError, match="out must be dense in memory as"):
        problem.forward(view(2, 4, 3, 6), (16, 24))
    with pytest.raises(ValueError, match="lse's length must be 24; got 23"):
        problem.forward(view(2, 4, 3, 6, strides=(72, 6, 24, 1)), (16, 23))


OUT_OF_RANGE = {
    "prompt_index": ([1, 0], "prompt_index must be in [0, 0]; got 1 at 0"),
    "prompt_lengths": ([8], "prompt_lengths must be in [0, 7]; got 8 at 0"),
    "key_lengths": ([5, -1], "key_lengths must be in [0, 5]; got -1 at 1"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_indices_and_lengths_out_of_range_are_refused(name):
    values, message = OUT_OF_RANGE[name]
    query, key, prompt = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(1, 2, 7, 8)
    with pytest.raises(ValueError, match=re.escape(message)):
        prompt_attention(query, key, key, prompt, prompt, **{name: torch.tensor(values)}, backend="cpu")


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ([1, 3], "cu_seqlens must be in [0, 0]; got 1 at 0"),
        ([0, 2, 1], "cu_seqlens must be in [2, 3]; got 1 at 2"),
        ([0, 4], "cu_seqlens must be in [0, 3]; got 4 at 1"),
    ],
)
def test_cu_seqlens_that_do_not_partition_the_tokens_are_refused(starts, message):
    query, key, prompt = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 7, 8)
    with pytest.raises(ValueError, match=re.escape(message)):
        prompt_attention(query, key, key, prompt, prompt, cu_seqlens=torch.tensor(starts), backend="cpu")


def test_float64_is_refused_with_the_argument(module):
    tensors = [torch.randn(1, 1, 2, 4, dtype=torch.float64) for _ in range(5)]
    with pytest.raises(ValueError, match=r"cpu: query is torch.float64, and it computes in fp32"):
        prompt_attention(*tensors, backend="cpu")


def test_a_missing_module_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(native, "_why_missing", "its module was not built: install a C++ compiler")
    with pytest.raises(RuntimeError, match="install a C"):
        native.module()
    with pytest.raises(ValueError, match="cpu: its module was not built: install a C"):
        prompt_attention(*[torch.randn(1, 1, 2, 4) for _ in range(5)], backend="cpu")
