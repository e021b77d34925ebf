"""A tiny random model of each supported family and wrapper, with the features of the family switched on."""

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.masking_utils import eager_mask

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
# Windows are shorter than every sequence in the tests. Families that mix both kinds of layer have one of each.
_MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_GRANITE = {
    "logits_scaling": 3.0,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.7,
}
_ONLY_MULTI_HEAD = {"num_key_value_heads": None, "head_dim": None, "intermediate_size": None}

CONFIGURATIONS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 5}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, **_MIXED}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": (
        "Gemma2Config",
        {**_MIXED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 6},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_MIXED,
            "query_pre_attn_scalar": 6,
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
    "apertus": ("ApertusConfig", {}),
    "arcee": ("ArceeConfig", {}),
    "cohere": ("CohereConfig", {"logit_scale": 0.3, "use_qk_norm": True}),
    "cohere2": ("Cohere2Config", {**_MIXED, "logit_scale": 0.3}),
    "dots1": ("Dots1Config", {**_ROUTED, **_MIXED, "n_shared_experts": 1}),
    "ernie4_5": ("Ernie4_5Config", {}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1},
    ),
    "exaone4": ("Exaone4Config", {**_MIXED, "sliding_window_pattern": 2}),
    "gemma": ("GemmaConfig", {}),
    "glm": ("GlmConfig", {}),
    "glm4": ("Glm4Config", {}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {
            **_ROUTED,
            "use_qk_norm": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        },
    ),
    "granite": ("GraniteConfig", _GRANITE),
    "granitemoe": ("GraniteMoeConfig", {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoeshared": (
        "GraniteMoeSharedConfig",
        {**_GRANITE, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    ),
    "helium": ("HeliumConfig", {}),
    "internlm3": ("InternLM3Config", {"bias": True, "qkv_bias": True}),
    "llama4": (
        "Llama4TextConfig",
        {
            "no_rope_layers": [1, 0],
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "attn_temperature_tuning": True,
            "floor_scale": 65,
            "attention_chunk_size": 64,
        },
    ),
    "minimax_m2": ("MiniMaxM2Config", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "ministral": ("MinistralConfig", _MIXED),
    "ministral3": ("Ministral3Config", {"rope_parameters": {**_YARN, "llama_4_scaling_beta": 0.3}}),
    "mixtral": ("MixtralConfig", {"sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo": ("OlmoConfig", {"clip_qkv": 0.5}),
    "olmo2": ("Olmo2Config", {}),
    "olmo3": ("Olmo3Config", _MIXED),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "phi": ("PhiConfig", {"head_dim": None, "qk_layernorm": True}),
    "qwen2_moe": ("Qwen2MoeConfig", {**_EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "num_experts": 4, "use_sliding_window": True, "sliding_window": 5}),
    "seed_oss": ("SeedOssConfig", {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0], "use_sliding_window": True, **_MIXED}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 5}),
}

# Multimodal wrappers, with the text family that each has here. Encoders for images are as small as they can be.
_VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_PIXELS = {"image_size": 28, "patch_size": 14}
_SIGLIP = {"model_type": "siglip_vision_model", **_VISION, **_PIXELS}
_CLIP = {"model_type": "clip_vision_model", **_VISION, **_PIXELS, "projection_dim": 16}
_PATCHES = {"depth": 1, "num_heads": 2, "patch_size": 14, "hidden_size": 16, "out_hidden_size": 32}
_QWEN_VISION = {**_PATCHES, "intermediate_size": 16, "fullatt_block_indexes": [0], "deepstack_visual_indexes": [0]}
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
# Text models that exist only inside a wrapper.
INNER: dict[str, tuple[str, dict]] = {
    "glm4v": ("Glm4vTextConfig", _THREE_AXES),
    "qwen2_5_vl": ("Qwen2_5_VLTextConfig", {**_THREE_AXES, **_MIXED, "use_sliding_window": True}),
    "qwen2_vl": ("Qwen2VLTextConfig", {**_THREE_AXES, **_MIXED, "use_sliding_window": True}),
    "qwen3_vl": ("Qwen3VLTextConfig", _THREE_AXES),
    "qwen3_vl_moe": ("Qwen3VLMoeTextConfig", {**_THREE_AXES, **_EXPERTS, "num_experts": 4}),
}
WRAPPERS: dict[str, tuple[str, str, dict]] = {
    "wrapped aya_vision": ("AyaVisionConfig", "cohere2", {"vision_config": _SIGLIP}),
    "wrapped cohere2_vision": ("Cohere2VisionConfig", "cohere2", {"vision_config": _SIGLIP}),
    "wrapped gemma3": ("Gemma3Config", "gemma3", {"vision_config": _SIGLIP, "mm_tokens_per_image": 4}),
    "wrapped glm4v": (
        "Glm4vConfig",
        "glm4v",
        {"vision_config": {**_PATCHES, "intermediate_size": 16, "image_size": 28}},
    ),
    "wrapped idefics3": ("Idefics3Config", "llama", {"vision_config": {**_VISION, **_PIXELS}}),
    "wrapped internvl": (
        "InternVLConfig",
        "qwen2",
        {"vision_config": {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]}},
    ),
    "wrapped llama4": (
        "Llama4Config",
        "llama4",
        {"vision_config": {**_VISION, **_PIXELS, "vision_output_dim": 16, "projector_input_dim": 16}},
    ),
    "wrapped llava": ("LlavaConfig", "llama", {"vision_config": _CLIP}),
    "wrapped llava_next": ("LlavaNextConfig", "mistral", {"vision_config": _CLIP}),
    "wrapped llava_onevision": ("LlavaOnevisionConfig", "qwen2", {"vision_config": _SIGLIP}),
    "wrapped mistral3": (
        "Mistral3Config",
        "mistral",
        {"vision_config": {"model_type": "pixtral", **_VISION, **_PIXELS, "head_dim": 8}},
    ),
    "wrapped qwen2_5_vl": ("Qwen2_5_VLConfig", "qwen2_5_vl", {"vision_config": _QWEN_VISION}),
    "wrapped qwen2_audio": (
        "Qwen2AudioConfig",
        "qwen2",
        {"audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16}},
    ),
    "wrapped qwen2_vl": (
        "Qwen2VLConfig",
        "qwen2_vl",
        {"vision_config": {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 14}},
    ),
    "wrapped qwen3_vl": ("Qwen3VLConfig", "qwen3_vl", {"vision_config": _QWEN_VISION}),
    "wrapped qwen3_vl_moe": ("Qwen3VLMoeConfig", "qwen3_vl_moe", {"vision_config": _QWEN_VISION}),
    "wrapped smolvlm": ("SmolVLMConfig", "llama", {"vision_config": {**_VISION, **_PIXELS}}),
    "wrapped voxtral": ("VoxtralConfig", "llama", {"audio_config": _VISION}),
}
# No test draws these tokens: models count them.
_MARKS = dict.fromkeys(
    ("image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id"), 60
) | {"audio_token_id": 60, "image_start_token_id": 60, "image_end_token_id": 60}


def _build(family: str, **changes: object) -> PreTrainedModel:
    """A model of the family with eager attention, not prepared. Weights are large enough to change the logits."""
    wrapper, family, parts = WRAPPERS.get(family, (None, family, {}))
    name, options = (CONFIGURATIONS | INNER)[family]
    options = {**_COMMON, **options, **changes}
    options = {key: value for key, value in options.items() if value is not None or key == "eos_token_id"}
    config = getattr(transformers, name)(**options)
    if wrapper is not None:
        config = getattr(transformers, wrapper)(text_config=config, **parts, **_MARKS)
    torch.manual_seed(sum(map(ord, family)))
    auto = AutoModelForCausalLM if wrapper is None else AutoModelForMultimodalLM
    model = auto.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval().requires_grad_(False)


@pytest.fixture
def build() -> Callable[..., PreTrainedModel]:
    """`build(family, **config_changes)`: a fresh model, not prepared."""
    return _build


def _params(*without: str) -> list[object]:
    """All families but some. Most wrappers are slow tests: they run the decoders that the families test alone."""
    quick = {*CONFIGURATIONS, "wrapped gemma3", "wrapped llama4", "wrapped qwen3_vl"}
    names = sorted({*CONFIGURATIONS, *WRAPPERS} - {*without})
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.fixture(params=_params())
def family(request: pytest.FixtureRequest) -> str:
    """Each supported family in turn, alone and inside multimodal wrappers."""
    return request.param


@pytest.fixture(params=_params("gpt2"))
def rotary_family(request: pytest.FixtureRequest) -> str:
    """As `family`, without the one whose positions are learned."""
    return request.param


@pytest.fixture
def families() -> list[str]:
    """The names of all supported families."""
    return sorted(CONFIGURATIONS)


@pytest.fixture
def wrappers() -> list[str]:
    """The names of all supported multimodal wrappers, each around one family."""
    return sorted(WRAPPERS)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


@pytest.fixture
def tokens() -> Callable[..., Tensor]:
    """`tokens(*shape, seed=0)`: random ids without the padding id."""

    def draw(*shape: int, seed: int = 0) -> Tensor:
        return torch.randint(2, VOCABULARY - 1, shape, generator=torch.Generator().manual_seed(seed))

    return draw


def _double(model: PreTrainedModel) -> PreTrainedModel:
    config = model.config.get_text_config()
    if any(
        hasattr(config, name) for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    ):
        model.set_experts_implementation("eager")  # the grouped GEMM does not support float64
    return model.double()


@pytest.fixture
def double() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """`double(model)`: the same model in float64."""
    return _double


@pytest.fixture
def float64_reference() -> Callable[[PreTrainedModel], PreTrainedModel]:
    """`float64_reference(model)`: the same model in float64, with textbook attention and transformers' own masks.

    The eager attention of most families rounds its softmax to fp32, which is too inexact to check a gradient."""

    def attention(module, query, key, value, attention_mask, scaling, softcap=None, s_aux=None, **_):
        group = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(group, dim=1).mT * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores + attention_mask
        if s_aux is not None:
            sinks = s_aux.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(-1)[..., : key.shape[2]]
        return (weights @ value.repeat_interleave(group, dim=1)).transpose(1, 2), None

    def switch(model: PreTrainedModel) -> PreTrainedModel:
        AttentionInterface.register("textbook", attention)
        AttentionMaskInterface.register("textbook", eager_mask)
        model.set_attn_implementation("textbook")
        return _double(model)

    return switch


@pytest.fixture
def concatenated_run() -> Callable[..., Tensor]:
    """The reference: `concatenated_run(model, contexts, rows)` gives the logits of each row after its context.

    An unprepared model runs context and row as one sequence. Takes lists of 1-D tensors, returns a list of
    `[row, V]`."""

    @torch.no_grad()
    def run(model: PreTrainedModel, contexts: list[Tensor], rows: list[Tensor]) -> list[Tensor]:
        return [
            model(torch.cat([context, row])[None]).logits[0, len(context) :]
            for context, row in zip(contexts, rows, strict=True)
        ]

    return run


@pytest.fixture
def padded() -> Callable[[list[Tensor], str], tuple[Tensor, Tensor]]:
    """`padded(rows, side)`: ids `[B, M]` and mask `[B, M]`. Side is "left", "right" or "both": padding on both sides,
    and a hole in the middle of the first row."""

    def pad(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
        width = max(map(len, rows)) + (2 if side == "both" else 0)
        ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
        for b, row in enumerate(rows):
            columns = torch.arange(len(row)) + {"left": width - len(row), "right": 0, "both": 1}[side]
            if side == "both" and b == 0:
                columns[len(row) // 2 :] += 1
            ids[b, columns], mask[b, columns] = row, 1
        return ids, mask

    return pad
