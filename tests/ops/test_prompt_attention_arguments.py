"""The argument checks: each error names the argument, what it got and what is accepted."""

import re

import pytest
import torch

from softprompt_kernels.ops import prompt_attention

INT = torch.int64


def tensors(**changes):
    shapes = {"query": (2, 4, 5, 8), "key": (2, 2, 5, 8), "value": (2, 2, 5, 8), "prompt_key": (1, 2, 3, 8)}
    shapes["prompt_value"] = (1, 2, 3, 8)
    made = {name: torch.randn(changes.pop(name, shape)) for name, shape in shapes.items()}
    return made | changes


CASES = [
    ({"query": (4, 5, 8)}, ValueError, "query must have 4 dimensions; got shape (4, 5, 8)"),
    ({"key": (2, 3, 5, 8)}, ValueError, "query's heads must be a multiple of key's; got Hq = 4 and Hkv = 3"),
    ({"key": (2, 2, 5, 7)}, ValueError, "key must have shape [B, Hkv, N, D] = [2, 2, 5, 8]; got [2, 2, 5, 7]"),
    ({"value": (2, 2, 4, 8)}, ValueError, "value must have shape [B, Hkv, N, Dv] = [2, 2, 5, 8]; got [2, 2, 4, 8]"),
    ({"prompt_key": (1, 2, 3, 4)}, ValueError, "prompt_key must have shape [R, Hkv, P, D] = [1, 2, 3, 8]"),
    ({"prompt_value": (1, 2, 2, 8)}, ValueError, "prompt_value must have shape [R, Hkv, P, Dv] = [1, 2, 3, 8]"),
    ({"key_lengths": torch.zeros(3, dtype=INT)}, ValueError, "key_lengths must have shape [B = 2]; got [3]"),
    ({"key_lengths": torch.zeros(2)}, TypeError, "key_lengths must be int32 or int64; got torch.float32"),
    ({"prompt_index": [0, 0]}, TypeError, "prompt_index must be None or a tensor; got list"),
    ({"prompt_index": torch.zeros(3, dtype=INT)}, ValueError, "prompt_index must have shape [number of sequences = 2]"),
    ({"prompt_lengths": torch.zeros(2, dtype=INT)}, ValueError, "prompt_lengths must have shape [R = 1]; got [2]"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "query must have B = 1 with cu_seqlens; got B = 2"),
    ({"window": 0}, ValueError, "window must be None or at least 1; got 0"),
    ({"softcap": -1.0}, ValueError, "softcap must be None or a finite number above 0; got -1.0"),
    ({"scale": float("nan")}, ValueError, "scale must be None or finite; got nan"),
    ({"sinks": torch.zeros(2)}, ValueError, "sinks must have shape [Hq] = [4]; got [2]"),
    (
        {"backend": "fast"},
        ValueError,
        "backend must be None or one of composed, cpu, cuda, reference, simt, triton; got 'fast'",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), CASES, ids=[c[2] for c in CASES])
def test_error_names_argument_got_and_accepted(changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        prompt_attention(**tensors(**changes))


def test_several_prompts_need_an_index():
    with pytest.raises(ValueError, match=r"prompt_index must be given unless there is one prompt.*got None with R = 3"):
        prompt_attention(**tensors(prompt_key=(3, 2, 3, 8), prompt_value=(3, 2, 3, 8)))


def test_packed_form_needs_equal_lengths_and_no_key_lengths():
    packed = {"query": (1, 4, 5, 8), "key": (1, 2, 6, 8), "value": (1, 2, 6, 8), "cu_seqlens": torch.tensor([0, 5])}
    with pytest.raises(ValueError, match="query and key must have M = N with cu_seqlens; got 5 and 6"):
        prompt_attention(**tensors(**packed))
    packed |= {"key": (1, 2, 5, 8), "value": (1, 2, 5, 8), "key_lengths": torch.tensor([5])}
    with pytest.raises(ValueError, match="key_lengths must be None with cu_seqlens"):
        prompt_attention(**tensors(**packed))


def test_dtypes_must_agree():
    made = tensors()
    made["prompt_key"] = made["prompt_key"].double()
    with pytest.raises(TypeError, match=r"prompt_key must have query's dtype torch.float32; got torch.float64"):
        prompt_attention(**made)
    with pytest.raises(TypeError, match=r"query must be float16, bfloat16, float32 or float64; got torch.int64"):
        prompt_attention(**tensors() | {"query": torch.zeros(2, 4, 5, 8, dtype=INT)})
    with pytest.raises(TypeError, match="query must be a tensor; got list"):
        prompt_attention(**tensors() | {"query": []})


def test_devices_must_agree():
    with pytest.raises(ValueError, match="key must be on cpu; got meta"):
        prompt_attention(**tensors() | {"key": torch.empty(2, 2, 5, 8, device="meta")})
