"""KV and embedding prompts: which tokens are trained, which are frozen, and in which dtype."""

import pytest
import torch

from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix


def kv(k: int = 5, frozen: int = 1, dtype: torch.dtype = torch.float32) -> KVPrompt:
    torch.manual_seed(0)
    return KVPrompt(torch.randn(2, 3, k, 8, dtype=dtype), torch.randn(2, 3, k, 4, dtype=dtype), frozen_tokens=frozen)


def embedding(k: int = 5, frozen: int = 2) -> EmbeddingPrompt:
    torch.manual_seed(0)
    return EmbeddingPrompt(torch.randn(k, 6), frozen_tokens=frozen)


def train(prompt: KVPrompt | EmbeddingPrompt, steps: int = 3) -> None:
    """AdamW with strong weight decay. Momentum and decay would change a frozen parameter even without a gradient."""
    optimiser = torch.optim.AdamW(prompt.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(steps):
        optimiser.zero_grad()
        if isinstance(prompt, KVPrompt):
            sum((key.square().sum() + value.sum()) for key, value in prompt.prefix().layers).backward()
        else:
            prompt.vectors().square().sum().backward()
        optimiser.step()


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_training_changes_every_token_of_a_kv_prompt_except_frozen_ones(frozen: int) -> None:
    prompt = kv(frozen=frozen)
    before_key, before_value = (tensor.detach().clone() for tensor in prompt.stacked())
    train(prompt)
    for before, after in zip((before_key, before_value), prompt.stacked(), strict=True):
        assert torch.equal(after[:, :, :frozen], before[:, :, :frozen])
        assert (after[:, :, frozen:] != before[:, :, frozen:]).all()


@pytest.mark.parametrize("frozen", [0, 2])
def test_training_changes_every_row_of_an_embedding_prompt_except_frozen_ones(frozen: int) -> None:
    prompt = embedding(frozen=frozen)
    before = prompt.vectors().detach().clone()
    train(prompt)
    assert torch.equal(prompt.vectors()[:frozen], before[:frozen])
    assert (prompt.vectors()[frozen:] != before[frozen:]).all()


def test_a_prompt_of_frozen_tokens_only_gives_its_prefix() -> None:
    prompt = kv(k=1, frozen=1)
    assert prompt.key.numel() == 0 and prompt.prefix().length == 1


def test_frozen_tokens_are_in_the_state_but_are_not_parameters() -> None:
    assert {name for name, _ in kv().named_parameters()} == {"key", "value"}
    assert {name for name, _ in embedding().named_parameters()} == {"embedding"}
    assert set(kv().state_dict()) == {"key", "value", "frozen_key", "frozen_value"}
    assert set(kv(frozen=0).state_dict()) == {"key", "value"}  # savers of files may drop one of two empty tensors
    assert set(embedding(frozen=0).state_dict()) == {"embedding"}
    other = kv()
    other.load_state_dict({name: torch.full_like(value, 7) for name, value in kv().state_dict().items()})
    assert all((tensor == 7).all() for tensor in other.stacked())


def test_the_prefix_has_one_row_with_all_tokens_in_order() -> None:
    torch.manual_seed(0)
    key, value = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 5, 4)
    prefix = KVPrompt(key, value, frozen_tokens=2).prefix()
    assert (prefix.rows, prefix.length, prefix.num_layers, prefix.lengths) == (1, 5, 2, None)
    for layer, pair in enumerate(prefix.layers):
        assert torch.equal(pair[0], key[layer][None]) and torch.equal(pair[1], value[layer][None])


def test_layers_of_a_prefix_are_views_of_one_concatenation() -> None:
    for frozen in (0, 1):
        prefix = kv(frozen=frozen).prefix()
        assert len({key.untyped_storage().data_ptr() for key, _ in prefix.layers}) == 1


def test_parameters_stay_fp32_and_the_gradient_reaches_them_through_a_cast() -> None:
    prompt = kv(dtype=torch.bfloat16)
    assert prompt.key.dtype == prompt.frozen_value.dtype == torch.float32
    prefix = prompt.prefix(torch.bfloat16)
    assert prefix.dtype == torch.bfloat16
    prefix.layers[1][0].sum().backward()
    assert prompt.key.grad is not None and prompt.key.grad.dtype == torch.float32
    assert (prompt.key.grad[1] == 1).all() and (prompt.key.grad[0] == 0).all()
    assert embedding().vectors(torch.float16).dtype == torch.float16


def test_the_prompt_copies_the_tensor_that_it_was_made_from() -> None:
    rows = torch.zeros(3, 4)
    prompt = EmbeddingPrompt(rows)
    rows.fill_(9)
    assert (prompt.vectors() == 0).all()


@pytest.mark.parametrize("frozen", [0, 2])
def test_gradients_of_the_prefix(frozen: int) -> None:
    prompt = kv(k=3, frozen=frozen, dtype=torch.float64)

    def prefix(*_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(tensor for pair in prompt.prefix().layers for tensor in pair)

    # gradcheck changes the parameters in place, so the prompt uses the changed values.
    assert torch.autograd.gradcheck(prefix, (prompt.key, prompt.value))


def test_from_prefix_takes_one_row_of_equal_layers() -> None:
    source = kv().prefix()
    again = KVPrompt.from_prefix(source, frozen_tokens=2)
    assert again.frozen_tokens == 2 and again.length == 5
    assert all(
        torch.equal(a, b)
        for one, two in zip(source.layers, again.prefix().layers, strict=True)
        for a, b in zip(one, two, strict=True)
    )
    bank = Prefix.of([(torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 3, 4))])
    with pytest.raises(ValueError, match="2 rows"):
        KVPrompt.from_prefix(bank)
    uneven = Prefix.of(
        [(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)), (torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4))]
    )
    with pytest.raises(ValueError, match="layer 1"):
        KVPrompt.from_prefix(uneven)


def test_shapes_and_frozen_tokens_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="k ≥ 1"):
        KVPrompt(torch.zeros(2, 3, 0, 8), torch.zeros(2, 3, 0, 8))
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 8\) and \(2, 3, 4, 8\)"):
        KVPrompt(torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 4, 8))
    with pytest.raises(ValueError, match=r"frozen_tokens: got 6, accepted is 0 to 5"):
        kv(frozen=6)
    with pytest.raises(ValueError, match=r"frozen_tokens: got -1"):
        embedding(frozen=-1)
    with pytest.raises(ValueError, match=r"\[k, d\]"):
        EmbeddingPrompt(torch.zeros(0, 4))


def test_printing_names_the_sizes() -> None:
    assert repr(kv()) == "KVPrompt(layers=2, kv_heads=3, tokens=5, head_dim=8, frozen=1)"
    assert repr(embedding()) == "EmbeddingPrompt(tokens=5, hidden_size=6, frozen=2)"
