"""Caches of Cartridges give the same logits there as a prompt does here, in both directions.

`their_logits` does what their package does with a file: `from_pretrained` (lists of tensors, frozen tokens first) and
the forward of its models (positions `arange(n) + cartridge_len`; each token sees the whole cache and its own sequence
up to itself). With `added=False` the positions are those of their data, as in code that forgets the length. It was
written after cartridges/cache.py, datasets.py, generation.py and models/ of HazyResearch/cartridges and its forks.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.formats.cartridges import moved
from softprompt_kernels.formats.content import Content, FirstQuery
from softprompt_kernels.formats.exporting import export
from softprompt_kernels.formats.files import read
from softprompt_kernels.formats.importing import import_prompt
from softprompt_kernels.models import prepare
from softprompt_kernels.prompts import KVPrompt, load

NAMES = ("trainable_keys", "trainable_values", "frozen_keys", "frozen_values")


@torch.no_grad()
def their_logits(model: LlamaForCausalLM, file: Path, ids: Tensor, added: bool = True) -> Tensor:
    checkpoint = torch.load(file, weights_only=False)
    assert all(name in checkpoint for name in NAMES)
    assert len(checkpoint["frozen_keys"]) == len(checkpoint["trainable_keys"])
    cache = DynamicCache()
    for layer in range(len(checkpoint["trainable_keys"])):
        keys, values = (
            torch.cat([checkpoint[f"frozen_{part}"][layer], checkpoint[f"trainable_{part}"][layer]], dim=2)
            for part in ("keys", "values")
        )
        cache.update(keys, values, layer)
    k, n = cache.get_seq_length(), ids.shape[1]
    sees = torch.cat((torch.ones(n, k), torch.ones(n, n).tril()), dim=1).bool()
    positions = torch.arange(n)[None] + (k if added else 0)
    return model(ids, past_key_values=cache, position_ids=positions, attention_mask=sees[None, None]).logits


def their_file(file: Path, prompt: KVPrompt, frozen: int) -> Path:
    """A file as their `save` writes it: nn.ParameterList, in bfloat16, the frozen ones without gradient."""
    lists = {}
    for part, numbers in zip(("keys", "values"), prompt.stacked(torch.bfloat16), strict=True):
        layers = numbers.detach()[:, None]
        lists[f"trainable_{part}"] = nn.ParameterList([nn.Parameter(one[:, :, frozen:].clone()) for one in layers])
        kept = [nn.Parameter(one[:, :, :frozen].clone(), requires_grad=False) for one in layers]
        lists[f"frozen_{part}"] = nn.ParameterList(kept if frozen else [])
    torch.save(lists, file)
    return file


@pytest.mark.parametrize("queries_at", ["k", "0"])
@pytest.mark.parametrize("frozen", [0, 1, 6])
def test_an_exported_prompt_has_the_same_logits_there(
    frozen: int,
    queries_at: FirstQuery,
    kv: KVPrompt,
    saved: Callable[..., Path],
    model: LlamaForCausalLM,
    plain_model: LlamaForCausalLM,
    ids: Tensor,
    logits: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    prompt = KVPrompt(*kv.stacked(), frozen_tokens=frozen)
    moving = model if queries_at == "0" else None
    export(read(saved(prompt)), "cartridges", tmp_path / "cache.pt", queries_at=queries_at, model=moving)
    theirs = their_logits(plain_model, tmp_path / "cache.pt", ids, added=queries_at == "k")
    assert (theirs - logits(prompt)).abs().max() <= 1e-5
    tensors = torch.load(tmp_path / "cache.pt", weights_only=True)  # no class of ours or theirs in it
    assert [tensors["frozen_keys"][0].shape, tensors["trainable_keys"][0].shape] == [
        (1, 2, frozen, 8),
        (1, 2, 6 - frozen, 8),
    ]


@pytest.mark.parametrize(("frozen", "queries_at"), [(0, "k"), (2, "k"), (2, "0")])
def test_a_cache_of_theirs_has_the_same_logits_here(
    frozen: int,
    queries_at: FirstQuery,
    kv: KVPrompt,
    model: LlamaForCausalLM,
    plain_model: LlamaForCausalLM,
    tokenizer: object,
    ids: Tensor,
    logits: Callable[..., Tensor],
    tmp_path: Path,
) -> None:
    file = their_file(tmp_path / "cache.pt", kv, frozen)
    import_prompt(read(file, first_query=queries_at), model, tokenizer, tmp_path / "ours")  # type: ignore[arg-type]
    prompt, record = load(tmp_path / "ours", model)
    assert prompt.frozen_tokens == frozen and record is not None and record["objective"]["name"].endswith("cartridges")
    if frozen:  # their own loader refuses empty lists
        float_file = tmp_path / "float.pt"
        torch.save(
            {name: [one.float() for one in found] for name, found in torch.load(file, weights_only=False).items()},
            float_file,
        )
        theirs = their_logits(plain_model, float_file, ids, added=queries_at == "k")
        assert (theirs - logits(prompt)).abs().max() <= 1e-5


def test_the_two_positions_differ_and_moving_back_restores_the_keys(
    kv: KVPrompt, model: LlamaForCausalLM, plain_model: LlamaForCausalLM, ids: Tensor, content: Content, tmp_path: Path
) -> None:
    export(content, "cartridges", tmp_path / "ours.pt")
    both = [their_logits(plain_model, tmp_path / "ours.pt", ids, added=added) for added in (True, False)]
    assert (both[0] - both[1]).abs().max() > 1e-2
    content = read(their_file(tmp_path / "cache.pt", kv, 1))
    assert moved(content, model, "k") is content
    back = moved(moved(content, model, "0"), model, "k").prompt
    assert isinstance(back, KVPrompt)
    assert (back.stacked()[0] - kv.stacked(torch.bfloat16)[0].float()).abs().max() <= 1e-5


def test_an_exported_cache_says_its_positions_and_keeps_the_record(
    content: Content, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    export(content, "cartridges", tmp_path / "k.pt")
    assert read(tmp_path / "k.pt", first_query="0").first_query == "k"
    export(content, "cartridges", tmp_path / "c.pt", queries_at="0", model=model)
    again = read(tmp_path / "c.pt", first_query="k")
    assert again.first_query == "0" and again.record["context"] == content.record["context"]
    with pytest.raises(SoftPromptError, match="keys are for queries at 0; accepted with --model"):
        export(again, "safetensors", tmp_path / "x.safetensors")


def test_models_whose_keys_cannot_be_moved_are_refused(kv: KVPrompt, tmp_path: Path) -> None:
    content = read(their_file(tmp_path / "cache.pt", kv, 1), first_query="0")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
    learned = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=64))
    sliding = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=2, intermediate_size=32, sliding_window=16))
    for other, reason in ((learned, "positions are learned"), (sliding, "sliding windows")):
        prepare(other)
        with pytest.raises(SoftPromptError, match=reason):
            moved(content, other, "k")
    assert moved(replace(content, first_query="k"), learned, "k").first_query == "k"  # nothing has to move


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frozen_values": None}, "has no list of tensors frozen_values"),
        ({"trainable_values": [torch.zeros(1, 2, 5, 8)]}, r"frozen_values has 2 layers, accepted are 0 or 1"),
        ({"trainable_values": [torch.zeros(1, 2, 4, 8)] * 2}, "the value of layer 0 has shape"),
        ({"trainable_keys": [torch.zeros(2, 5, 8)] * 2}, r"trainable_keys\[0\] is float32 of shape \(2, 5, 8\)"),
        ({"frozen_keys": [torch.zeros(1, 3, 1, 8)] * 2}, "does not fit"),
        ({"trainable_keys": [torch.full((1, 2, 5, 8), torch.nan)] * 2}, "not finite"),
        ({"trainable_keys": [torch.zeros(1, 2, 5, 8, dtype=torch.int64)] * 2}, "floating-point"),
        ({"trainable_keys": [torch.full((1, 2, 5, 8), 1e300, dtype=torch.float64)] * 2}, "not finite in float32"),
        ({"trainable_keys": [torch.zeros(1, 2, 5, 8).to_sparse()] * 2}, r"trainable_keys\[0\] is sparse"),
        ({"trainable_keys": [torch.zeros(1, 2, 5, 8, device="meta")] * 2}, "accepted is a dense tensor"),
        ({"trainable_keys": 5}, "has no list of tensors trainable_keys"),
    ],
)
def test_a_damaged_cache(kv: KVPrompt, change: dict[str, object], message: str, tmp_path: Path) -> None:
    lists = torch.load(their_file(tmp_path / "cache.pt", kv, 1), weights_only=False)
    torch.save({name: found for name, found in {**lists, **change}.items() if found is not None}, tmp_path / "bad.pt")
    with pytest.raises(SoftPromptError, match=message):
        read(tmp_path / "bad.pt")


def test_the_note_of_a_cache_is_json(content: Content, model: LlamaForCausalLM, tmp_path: Path) -> None:
    export(content, "cartridges", tmp_path / "c.pt", queries_at="0", model=model)
    note = json.loads(torch.load(tmp_path / "c.pt", weights_only=True)["softprompt_kernels"])
    assert note["first_query"] == "0" and note["base_model"] == content.base_model
