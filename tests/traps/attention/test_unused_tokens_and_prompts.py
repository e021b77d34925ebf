"""Trap: gradients of tokens after the last packed sequence, or of unused prompts, are uninitialised memory.

They must be 0.
"""

import pytest
import torch


@pytest.mark.refused("simt", "cuda", match="cu_seqlens is given")
def test_tokens_and_prompts_of_no_sequence_have_gradient_zero(backend, attention):
    torch.manual_seed(0)
    shapes = [(1, 4, 9, 8), *[(1, 2, 9, 8)] * 2, *[(3, 2, 5, 8)] * 2]
    tensors = [torch.randn(s) for s in shapes]
    for tensor in tensors[:3]:
        tensor[:, :, 7:] = torch.nan
    for tensor in tensors:
        tensor.requires_grad_()
    out = attention(
        *tensors,
        prompt_index=torch.tensor([2, 0]),
        prompt_lengths=torch.tensor([4, 5, 2]),
        cu_seqlens=torch.tensor([0, 3, 7]),
        backend=backend,
    )
    assert (out[:, :, 7:] == 0).all()
    gradients = torch.autograd.grad(out.sum(), tensors)
    for gradient in gradients[:3]:
        assert (gradient[:, :, 7:] == 0).all() and gradient.isfinite().all()
    for gradient in gradients[3:]:
        assert (gradient[1] == 0).all() and (gradient[0, :, 4:] == 0).all() and (gradient[2, :, 2:] == 0).all()
        assert (gradient[0, :, :4] != 0).any() and (gradient[2, :, :2] != 0).any()
