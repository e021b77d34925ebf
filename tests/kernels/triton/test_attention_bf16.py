"""The Triton attention kernels in bf16, with checks of bounds and races: under `ttsem`, like the losses."""

import importlib.util
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed"),
    pytest.mark.no_interpreter,
]

CODE = """
import torch
from ttsem import sanitize
from softprompt_kernels.kernels.problems.attention import AttentionProblem, Needs
from softprompt_kernels.kernels.reference import attention as reference
from softprompt_kernels.kernels.triton.attention.plan import plan_backward, plan_forward
from softprompt_kernels.kernels.triton.targets import TARGETS

torch.manual_seed(0)
B, kv_heads, group, M, P, D, rows = {sizes}
N = M
options = dict.fromkeys(("prompt_index", "prompt_lengths", "key_lengths", "cu_seqlens", "sinks", "window", "softcap"))
options |= {options}
shapes = [(B, kv_heads * group, M, D), (B, kv_heads, N, D), (B, kv_heads, N, D)] + [(rows, kv_heads, P, D)] * 2
tensors = [torch.randn(shape).bfloat16() for shape in shapes]
problem = AttentionProblem(*tensors, causal=True, scale=D**-0.5, **options)
needs = Needs(True, True, True, True, True, problem.sinks is not None)
with sanitize.session(cuda_is_cpu=False):
    out, lse, launches = plan_forward(problem, TARGETS["sm_80"])
    for launch in launches:
        launch.run()
    grad_out, grad_lse = torch.randn(out.shape).bfloat16(), torch.randn(lse.shape)
    gradients, launches = plan_backward(problem, out, lse, grad_out, grad_lse, needs, TARGETS["sm_80"])
    for launch in launches:
        launch.run()
if options["sinks"] is not None:
    options["sinks"] = options["sinks"].double()
exact = AttentionProblem(*[t.double() for t in tensors], causal=True, scale=D**-0.5, **options)
wanted_out, wanted_lse = reference.forward(exact)
wanted_gradients = reference.backward(exact, wanted_out, wanted_lse, grad_out.double(), grad_lse.double(), needs)
eps = torch.finfo(torch.bfloat16).eps
for actual, wanted in zip([out, lse, *gradients], [wanted_out, wanted_lse, *wanted_gradients]):
    if wanted is not None:
        actual, wanted = (torch.where(t == -torch.inf, 0, t) for t in (actual, wanted))  # lse of rows that see no key
        assert (actual.double() - wanted).norm() <= 2 * eps * wanted.norm(), (actual.shape, eps)
"""

CASES = {
    "shared prompt": ((2, 1, 2, 20, 9, 16, 1), "{}"),
    "bank": (
        (2, 2, 1, 9, 20, 16, 2),
        "dict(prompt_index=torch.tensor([1, 0]), prompt_lengths=torch.tensor([20, 7]), softcap=3.0, window=11)",
    ),
    "packed": ((1, 1, 3, 30, 7, 24, 1), "dict(cu_seqlens=torch.tensor([0, 11, 12, 28]), sinks=torch.randn(3))"),
    "few queries": ((4, 1, 2, 1, 150, 16, 1), "{}"),
}


@pytest.mark.parametrize("case", CASES)
def test_bf16_bounds_and_races(case):
    sizes, options = CASES[case]
    code = CODE.replace("{sizes}", str(sizes)).replace("|= {options}", f"|= {options}")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
