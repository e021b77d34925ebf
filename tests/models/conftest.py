"""One tiny random model of each served family, with the features of the family switched on."""

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 61
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
# Windows are smaller than every sequence in the tests, and both kinds of layer occur where a family mixes them.
_MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
_ONLY_MULTI_HEAD = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}

CONFIGURATIONS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, **_MIXED}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": (
        "Gemma2Config",
        {**_MIXED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 8},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_MIXED,
            "query_pre_attn_scalar": 8,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "phi3": (
        "Phi3Config",
        {
            "sliding_window": 5,
            "head_dim": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt2": ("GPT2Config", {**_ONLY_MULTI_HEAD, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "gpt_neox": (
        "GPTNeoXConfig",
        {
            **_ONLY_MULTI_HEAD,
            "intermediate_size": 48,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**_MIXED, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _YARN},
    ),
}


def _build(family: str, **changes: object) -> PreTrainedModel:
    """A model of the family with eager attention, not prepared. Weights are large enough to matter."""
    name, options = CONFIGURATIONS[family]
    options = {key: value for key, value in {**_COMMON, **options, **changes}.items() if value is not None}
    config = getattr(transformers, name)(**options, attn_implementation="eager")
    torch.manual_seed(sum(map(ord, family)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval().requires_grad_(False)


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """`build(family, **config_changes)`: a fresh model, not prepared."""
    return _build


@pytest.fixture(params=sorted(CONFIGURATIONS))
def family(request: pytest.FixtureRequest) -> str:
    """Each served family in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """`tokens(*shape, seed=0)`: random ids without the padding id."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randint(2, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))

    return draw
