"""Trap: 32-bit offsets overflow in tensors whose strides reach beyond 2³¹ elements.

The tensors are views of reserved address space. Only the pages with elements are used, so the tests need little memory.
"""

import mmap

import pytest
import torch

from softprompt_kernels.ops import kl_div, linear_kl_div_from_moments, teacher_moments

ROW_STRIDE = 2**31 + 64  # elements
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux: only pages that are used take memory


def reserve_memory(size):
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)


def with_large_row_stride(rows, *shape):
    """An fp32 tensor [rows, *shape] whose rows are ROW_STRIDE elements apart."""
    size = torch.Size(shape).numel()
    memory = torch.frombuffer(reserve_memory(4 * ((rows - 1) * ROW_STRIDE + size)), dtype=torch.float32)
    inner = torch.empty(shape).stride()
    tensor = memory.as_strided((rows, *shape), (ROW_STRIDE, *inner))
    tensor.copy_(torch.randn(tensor.shape))
    return tensor


@pytest.fixture(autouse=True)
def _skip_without_address_space():
    if torch.get_default_device().type != "cpu":
        pytest.skip("the reserved address space is the host's")
    try:
        reserve_memory(4 * 3 * ROW_STRIDE).close()
    except OSError as error:
        pytest.skip(f"the system does not reserve {12 * ROW_STRIDE} bytes of address space: {error}")


def test_attention_over_tensors_with_large_row_strides(backend, attention):
    torch.manual_seed(0)
    query, key, value = (with_large_row_stride(2, *s) for s in ((2, 3, 4), (1, 3, 4), (1, 3, 4)))
    prompt = with_large_row_stride(2, 1, 2, 4)
    inputs = [query, key, value, prompt, prompt]
    index = torch.tensor([1, 0])
    out = attention(*inputs, prompt_index=index, backend=backend)
    expected = attention(*(t.contiguous() for t in inputs), prompt_index=index, backend=backend)
    assert torch.equal(out, expected)


def test_losses_over_rows_with_large_strides(backend):
    torch.manual_seed(0)
    student, teacher = with_large_row_stride(2, 30), with_large_row_stride(2, 30)
    expected = kl_div(student.contiguous(), teacher.contiguous(), backend=backend)
    assert torch.equal(kl_div(student, teacher, backend=backend), expected)
    hidden, weight = with_large_row_stride(2, 8), torch.randn(30, 8)
    moments = teacher_moments(hidden, weight, backend=backend)
    loss = linear_kl_div_from_moments(hidden + 1, moments, weight, backend=backend)
    assert torch.equal(loss, linear_kl_div_from_moments(hidden.contiguous() + 1, moments, weight, backend=backend))
