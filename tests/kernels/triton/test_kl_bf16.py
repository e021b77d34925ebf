"""The Triton losses in bf16, with checks of bounds: under `ttsem`, which executes Triton's language itself.

Triton's interpreter computes bf16 wrongly and detects no access out of bounds. Each test runs in a process of its own,
because a session of `ttsem` makes torch believe that there is a CUDA device.
"""

import importlib.util
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ttsem") is None, reason="ttsem is not installed"),
    pytest.mark.no_interpreter,
]

PRELUDE = """
import torch
from ttsem import sanitize
from softprompt_kernels.kernels.problems.loss import *
from softprompt_kernels.kernels.reference import divergence as reference
from softprompt_kernels.kernels.device import head_expectation
from softprompt_kernels.kernels.triton.losses import expectation, kl_div, linear_kl_div
torch.manual_seed(0)
"""

LOGITS = """
for kind in ("forward", "reverse", "jsd"):
    student, teacher = ((torch.randn(5, 300) * 2).bfloat16() for _ in range(2))
    student[3] = torch.nan
    weights = torch.tensor([1.0, 1, 2, 0, 1])
    problem = LogitsProblem(student, teacher, weights, Divergence(kind, 0.3, 1.5), 290)
    with sanitize.session(cuda_is_cpu=False):
        loss, statistics = kl_div.forward(problem)
        gradient = kl_div.backward(problem, torch.ones(5), statistics)
    kept = [0, 1, 2, 4]
    wide = (t[kept, :290].double() / 1.5 for t in (student, teacher))
    expected, wanted = reference.rows(*wide, problem.divergence)
    torch.testing.assert_close(loss[kept].double(), expected * 1.5**2, rtol=1e-6, atol=0)
    assert loss[3] == 0 and (gradient[3] == 0).all() and (gradient[:, 290:] == 0).all()
    wanted = wanted * 1.5
    assert (gradient[kept, :290].double() - wanted).norm() <= torch.finfo(torch.bfloat16).eps * wanted.norm()
"""

HEADS = """
head_expectation._TILE = 256
weight, teacher = (torch.randn(600, 64) / 4).bfloat16(), torch.randn(6, 64).bfloat16()
student = (teacher.double() + 0.024 * torch.randn(6, 64).double()).bfloat16()
p, q = (torch.softmax(h.double() @ weight.double().mT, -1) for h in (teacher, student))
loss, wanted = (p * (p / q).log()).sum(-1), (q - p) @ weight.double()
assert 5e-4 < loss.mean() < 2e-3
head = Head(weight, None, None, 1.0)
with sanitize.session(cuda_is_cpu=False):
    problem = HeadProblem(student, teacher, head, head, None, Divergence("forward", 0.5, 1.0), 4)
    found, gradient = linear_kl_div.forward(problem, True)
    mean = expectation.forward(ExpectationProblem(student, head, None, None, 1.0, 4, True)).mean
torch.testing.assert_close(found.double(), loss, rtol=1e-4, atol=0)
assert (gradient.double() - wanted).norm() < 5e-3 * wanted.norm()  # most of it is the rounding of the gradient to bf16
assert (mean.double() - p @ weight.double() - wanted).norm() < 5e-4 * wanted.norm()
"""


@pytest.mark.parametrize("code", [LOGITS, HEADS], ids=["logits", "heads near convergence"])
def test_bf16_and_bounds(code):
    command = [sys.executable, "-W", "ignore", "-c", PRELUDE + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
