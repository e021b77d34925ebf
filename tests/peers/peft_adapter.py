"""Runs PEFT's tests of prompts on our attention, and compares what PEFT computes with what we compute.

- A model of the hub becomes a tiny random one of the same family, prepared with our attention. An OPT, a family that we
  do not serve, becomes a Llama.
- After each forward of a PeftModel, and whenever one is saved, its prompt is saved by PEFT, loaded by us, and run.
  The logits must be those of PEFT, and those of PEFT with transformers' own attention.

Tokens behind a hole in the mask are not compared: PEFT counts the hole as a position, and we do not.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.models import prefix_of, prepare, prompted_logits, release
from softprompt_kernels.prompts import load

SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
NO_DROPOUT = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SIZES),
    "opt": ("LlamaConfig", SIZES),
    "qwen2": ("Qwen2Config", SIZES | WINDOW | {"use_sliding_window": True}),
    "qwen3": ("Qwen3Config", SIZES),
    "gemma3": ("Gemma3TextConfig", SIZES | WINDOW),
    "mistral": ("MistralConfig", SIZES | {"sliding_window": 6}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 128} | NO_DROPOUT,
    ),
}
TOLERANCE = 2e-5
compared = 0


def tiny(name: str, *_: Any, dtype: torch.dtype | None = None, **__: Any) -> PreTrainedModel:
    """The model in place of the hub's `name`: the same numbers each time."""
    family = next((family for family in FAMILIES if family in name.lower()), None)
    if family is None:
        raise OSError(f"{name} is on the hub, and there is no tiny model in its place")
    kind, options = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options)).eval()
        with torch.no_grad():  # with small weights, attention hardly changes the logits
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 2 and "embed" not in parameter_name and "wte" not in parameter_name:
                    parameter.mul_(8)
    model = model.to(dtype or torch.float32)
    model.config._name_or_path = model.name_or_path = name
    prepare(model)
    return model


def check(model: peft.PeftModel, ids: Tensor, mask: Tensor | None, given: Tensor | None) -> None:
    """Compare the logits of a PeftModel's prompt: PEFT on our attention, PEFT on transformers', and ours."""
    global compared
    base, training = model.get_base_model(), model.training
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        ours = copy.deepcopy(base)
        given = forward(model, input_ids=ids, attention_mask=mask).logits if given is None else given
        release(base)
        theirs = forward(model, input_ids=ids, attention_mask=mask).logits
        prepare(base)
        save(model, folder, selected_adapters=[model.active_adapter], save_embedding_layers=False)
        adapter = folder if model.active_adapter == "default" else f"{folder}/{model.active_adapter}"
        prompt, _ = load(adapter, ours)
        logits = prompted_logits(ours, ids, prefix_of(ours, prompt), attention_mask=mask)
        model.train(training)
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cumprod(dim=1).bool()
    own = ids.shape[1]
    for name, other in (("on our attention", given), ("on transformers' attention", theirs)):
        difference = (logits - other[:, -own:])[real].abs().max().item()
        assert difference <= TOLERANCE, f"our logits differ by {difference:.2g} from those of PEFT {name}"
    compared += 1


forward, save = peft.PeftModelForCausalLM.forward, peft.PeftModel.save_pretrained


def comparable(model: peft.PeftModel, ids: Any, mask: Any) -> bool:
    """Whether this is a prompt that we have, in fp32, on a model that the test has not replaced parts of."""
    kinds = {peft.PeftType.PROMPT_TUNING, peft.PeftType.PREFIX_TUNING, peft.PeftType.CARTRIDGE}
    return (
        isinstance(model, peft.PeftModelForCausalLM)
        and model.active_peft_config.peft_type in kinds
        and not model._adapters_disabled
        and isinstance(model.base_model, PreTrainedModel)
        and "forward" not in vars(model.base_model)
        and model.dtype == torch.float32
        and isinstance(ids, Tensor)
        and (mask is None or mask.dim() == 2)
    )


def checked_forward(model: Any, input_ids: Any = None, attention_mask: Any = None, **options: Any) -> Any:
    result = forward(model, input_ids=input_ids, attention_mask=attention_mask, **options)
    if comparable(model, input_ids, attention_mask) and not options.get("past_key_values"):
        plain = not set(options) - {"labels", "return_dict"}
        check(model, input_ids, attention_mask, result.logits.detach() if plain else None)
    return result


def checked_save(model: Any, folder: Any, *arguments: Any, **options: Any) -> Any:
    result = save(model, folder, *arguments, **options)
    ids = torch.arange(3, 19).view(2, 8)
    if comparable(model, ids, None):
        check(model, ids, None, None)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    before = compared
    try:
        return (yield)
    finally:
        item.user_properties.append(("compared", compared - before))


def pytest_configure() -> None:
    pipeline = type("StableDiffusionPipeline", (), {})  # their helpers test image models too
    sys.modules.setdefault("diffusers", SimpleNamespace(StableDiffusionPipeline=pipeline))  # type: ignore[arg-type]
    transformers.AutoModelForCausalLM.from_pretrained = tiny  # type: ignore[method-assign]
    peft.PeftModelForCausalLM.forward = checked_forward
    peft.PeftModel.save_pretrained = checked_save
