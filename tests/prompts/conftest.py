"""Tiny random models of three families, a tokenizer without files, and reference results from transformers."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from softprompt_kernels.prompts import KVPrompt, Prefix

VOCABULARY = 53


def configuration(family: str, **changes: object) -> object:
    common = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    # Grouped heads, and head dimensions that are not hidden_size / heads.
    rotary_sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 6}
    rotary_sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128}
    if family == "llama":
        return LlamaConfig(**(common | rotary_sizes | changes))
    if family == "qwen3":
        return Qwen3Config(**(common | rotary_sizes | changes))
    dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    gpt2_sizes = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 128}
    return GPT2Config(**(common | gpt2_sizes | dropout | changes))


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """`make_model(family, seed=0, **changes)`: the same model for the same arguments, in evaluation mode."""

    def make(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configuration(family, **changes)).eval()
        # With transformers' small initial weights, attention hardly changes the logits, so scale them up.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "embed" not in name and "wte" not in name:
                    parameter.mul_(8)
        return model

    return make


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def random_kv() -> Callable[..., KVPrompt]:
    """`random_kv(model, k)`: a KV prompt of the model's shape with unit noise."""

    def make(model: PreTrainedModel, k: int = 5, frozen_tokens: int = 1, seed: int = 1) -> KVPrompt:
        config = model.config
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        generator = torch.Generator().manual_seed(seed)
        key, value = torch.randn(2, config.num_hidden_layers, heads, k, dim, generator=generator)
        return KVPrompt(key, value, frozen_tokens=frozen_tokens)

    return make


@pytest.fixture
def capture() -> Callable[[PreTrainedModel, Tensor], Prefix]:
    """The keys and values in transformers' cache after a context `[1, C]`."""

    @torch.no_grad()
    def run(model: PreTrainedModel, context: Tensor) -> Prefix:
        cache = DynamicCache()
        model(context, past_key_values=cache)
        return Prefix.of((layer.keys, layer.values) for layer in cache.layers)

    return run


@pytest.fixture
def cached_logits() -> Callable[[PreTrainedModel, Tensor, Prefix], Tensor]:
    """Logits of transformers with a prefix of one row as `past_key_values`. Positions continue at its length."""

    @torch.no_grad()
    def run(model: PreTrainedModel, ids: Tensor, prefix: Prefix) -> Tensor:
        cache = DynamicCache()
        for index, (key, value) in enumerate(prefix.to(dtype=model.dtype).layers):
            cache.update(key.expand(len(ids), -1, -1, -1), value.expand(len(ids), -1, -1, -1), index)
        return model(ids, past_key_values=cache).logits

    return run


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """`make_tokenizer(*words)`: a tokenizer of whole words."""

    def make(*words: str, **special: str) -> PreTrainedTokenizerFast:
        vocabulary = {word: index for index, word in enumerate(("<unk>", "<s>", "</s>", *words))}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = Whitespace()
        names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | special
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)

    return make
