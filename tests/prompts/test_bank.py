"""A bank pads its prompts to the longest and keeps their lengths."""

import pytest
import torch

from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, PromptBank


def kv(k: int, seed: int = 0) -> KVPrompt:
    torch.manual_seed(seed)
    return KVPrompt(torch.randn(2, 3, k, 8), torch.randn(2, 3, k, 4))


def test_each_row_is_its_prompt_followed_by_zeros() -> None:
    prompts = [kv(3, 1), kv(5, 2), kv(1, 3)]
    prefix = PromptBank(prompts).prefix()
    assert (prefix.rows, prefix.length) == (3, 5)
    assert prefix.lengths is not None and prefix.lengths.tolist() == [3, 5, 1]
    for row, prompt in enumerate(prompts):
        for mine, alone in zip(prefix.layers, prompt.prefix().layers, strict=True):
            for padded, tensor in zip(mine, alone, strict=True):
                assert torch.equal(padded[row, :, : prompt.length], tensor[0])
                assert (padded[row, :, prompt.length :] == 0).all()


def test_prompts_of_equal_length_give_no_lengths() -> None:
    assert PromptBank([kv(3, 1), kv(3, 2)]).prefix().lengths is None


def test_gradients_reach_each_prompt_but_no_frozen_token() -> None:
    bank = PromptBank([kv(3, 1), kv(5, 2)])
    prefix = bank.prefix(torch.bfloat16)
    prefix.layers[0][0][1].float().sum().backward()
    first, second = bank.prompts
    assert (first.key.grad == 0).all()
    assert (second.key.grad[0] == 1).all() and (second.key.grad[1] == 0).all()
    assert second.frozen_key.grad is None


def test_embedding_prompts_are_padded_to_the_longest() -> None:
    prompts = [EmbeddingPrompt(torch.randn(2, 6)), EmbeddingPrompt(torch.randn(4, 6), frozen_tokens=1)]
    vectors, lengths = PromptBank(prompts).vectors()
    assert vectors.shape == (2, 4, 6) and lengths is not None and lengths.tolist() == [2, 4]
    assert torch.equal(vectors[0, :2], prompts[0].vectors()) and (vectors[0, 2:] == 0).all()
    assert torch.equal(vectors[1], prompts[1].vectors())


def test_lengths_move_with_the_bank_but_are_not_in_its_state() -> None:
    bank = PromptBank([kv(3), kv(5)])
    assert len(bank) == 2 and bank.length == 5
    assert "lengths" not in bank.state_dict()
    assert bank.to("meta").lengths.device.type == "meta"


def test_different_kinds_and_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="got none"):
        PromptBank([])
    with pytest.raises(ValueError, match=r"prompts\[1\]: got EmbeddingPrompt"):
        PromptBank([kv(3), EmbeddingPrompt(torch.zeros(2, 6))])
    with pytest.raises(ValueError, match=r"prompts\[1\].*\(1, 3, 8, 4\)"):
        PromptBank([kv(3), KVPrompt(torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 2, 4))])


def test_vectors_and_prefix_refuse_banks_of_the_other_kind() -> None:
    with pytest.raises(TypeError, match="KVPrompt"):
        PromptBank([kv(3)]).vectors()
    with pytest.raises(TypeError, match="EmbeddingPrompt"):
        PromptBank([EmbeddingPrompt(torch.zeros(2, 6))]).prefix()
