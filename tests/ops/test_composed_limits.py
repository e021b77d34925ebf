"""Attention calls that the composed backend cannot serve go to the reference."""

import pytest
import torch

from softprompt_kernels import prompt_attention


@pytest.mark.filterwarnings("ignore:.*reference backend")
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 100])
def test_more_queries_than_keys_agree_with_the_reference(causal: bool, window: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 2, 5, 8), torch.randn(2, 1, 3, 8), torch.randn(2, 1, 3, 8)
    prompt_key, prompt_value = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    arguments = (query, key, value, prompt_key, prompt_value)
    default = prompt_attention(*arguments, causal=causal, window=window)
    reference = prompt_attention(*arguments, causal=causal, window=window, backend="reference")
    torch.testing.assert_close(default, reference)


def test_a_decoding_loop_warns_once(recwarn: pytest.WarningsRecorder) -> None:
    for own in range(12, 18):
        key = torch.randn(1, 1, own, 8)
        prompt = torch.randn(1, 1, 4, 8)
        prompt_attention(torch.randn(1, 2, 1, 8), key, key, prompt, prompt, window=5)
    assert len([w for w in recwarn if "reference backend" in str(w.message)]) <= 1
