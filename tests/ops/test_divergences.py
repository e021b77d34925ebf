"""Every kind of divergence is in one table. All other kinds raise, in every place that branches on the kind."""

import pytest
import torch

from softprompt_kernels.kernels.composed import rows as composed
from softprompt_kernels.kernels.host import fused_linear, streamed_vocabulary
from softprompt_kernels.kernels.host.gemm import TORCH
from softprompt_kernels.kernels.host.rows import KlColumn
from softprompt_kernels.kernels.problems.loss import DIVERGENCES, Divergence, Head, HeadProblem
from softprompt_kernels.kernels.reference import divergence as reference
from softprompt_kernels.ops import kl_div, linear_kl_div

REFUSED = r"divergence must be one of forward, reverse, jsd.*; got '{}'"


@pytest.fixture
def unimplemented(monkeypatch) -> str:
    """A kind that is in the table, but that no kernel implements."""
    monkeypatch.setitem(DIVERGENCES, "hellinger", max(DIVERGENCES.values()) + 1)
    return "hellinger"


def test_kinds_have_the_numbers_of_the_compiled_kernels():
    assert DIVERGENCES == {"forward": 0, "reverse": 1, "jsd": 2}
    assert [Divergence(kind, 0.5, 1.0).code for kind in DIVERGENCES] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["kl", "JSD", ""])
def test_an_unknown_kind_is_refused_before_it_reaches_a_kernel(kind):
    logits, weight = torch.randn(2, 3), torch.randn(5, 3)
    refused = REFUSED.format(kind)
    with pytest.raises(ValueError, match=refused):
        Divergence(kind, 0.5, 1.0)
    with pytest.raises(ValueError, match=refused):
        kl_div(logits, logits, divergence=kind)
    with pytest.raises(ValueError, match=refused):
        linear_kl_div(logits, logits, weight, divergence=kind)


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_a_kind_that_a_backend_does_not_implement_raises(backend, unimplemented):
    logits, weight = torch.randn(2, 3), torch.randn(5, 3)
    refused = REFUSED.format(unimplemented)
    with pytest.raises(ValueError, match=refused):
        kl_div(logits, logits, divergence=unimplemented, backend=backend)
    with pytest.raises(ValueError, match=refused):
        linear_kl_div(logits, logits, weight, divergence=unimplemented, backend=backend)


def test_a_kind_that_a_kernel_does_not_implement_raises(unimplemented):
    logits, divergence = torch.randn(2, 3), Divergence(unimplemented, 0.5, 1.0)
    head = Head(torch.randn(5, 3), None, None, 1.0)
    refused = REFUSED.format(unimplemented)
    with pytest.raises(ValueError, match=refused):
        reference.rows(logits, logits, divergence)
    with pytest.raises(ValueError, match=refused):
        composed.divergence_(logits.clone(), logits.clone(), divergence, (logits.clone(), logits.clone()))
    with pytest.raises(ValueError, match=refused):
        streamed_vocabulary._gradient_(torch.ones(4, 3), torch.ones(2, len(KlColumn)), unimplemented)
    with pytest.raises(ValueError, match=refused):
        problem = HeadProblem(logits, logits, head, head, None, divergence, None)
        fused_linear._streaming_is_faster(problem, None, True, TORCH)
