"""A prompt saved here loads in PEFT with the same logits, and a prompt saved by PEFT loads here."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    CartridgeConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from softprompt_kernels.models import generate, prefix_of, prepare, prompted_logits
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix, load, save

Maker = Callable[..., PreTrainedModel]
FAMILIES = ("llama", "qwen3", "gpt2")
K = 5


@pytest.fixture
def embedding_prompt() -> EmbeddingPrompt:
    return EmbeddingPrompt(torch.randn(K, 24, generator=torch.Generator().manual_seed(2)))


@torch.no_grad()
def our_logits(model: PreTrainedModel, ids: Tensor, prompt: EmbeddingPrompt | KVPrompt) -> Tensor:
    prepare(model)
    return prompted_logits(model, ids, prefix_of(model, prompt))


def peft_logits(model: PreTrainedModel, folder: Path, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(folder)).eval()(input_ids=ids).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv_type", ["CARTRIDGE", "PREFIX_TUNING"])
def test_peft_gives_a_saved_kv_prompt_the_same_logits(
    family: str,
    kv_type: str,
    make_model: Maker,
    random_kv: Callable[..., KVPrompt],
    cached_logits: Callable[[PreTrainedModel, Tensor, Prefix], Tensor],
    ids: Tensor,
    tmp_path: Path,
) -> None:
    prompt = random_kv(make_model(family), K, frozen_tokens=2)
    save(tmp_path / "prompt", prompt, model=make_model(family), kv_type=kv_type)
    peft = peft_logits(make_model(family), tmp_path / "prompt", ids)
    expected = cached_logits(make_model(family), ids, prompt.prefix())
    assert (peft - expected).abs().max() <= 1e-5
    assert (peft - our_logits(make_model(family), ids, prompt)).abs().max() <= 1e-5
    with torch.no_grad():  # the prompt matters, so that the comparison can fail
        assert (peft - make_model(family)(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_gives_a_saved_embedding_prompt_the_same_logits(
    family: str, make_model: Maker, embedding_prompt: EmbeddingPrompt, ids: Tensor, tmp_path: Path
) -> None:
    model = make_model(family)
    save(tmp_path / "prompt", embedding_prompt, model=model)
    peft = peft_logits(make_model(family), tmp_path / "prompt", ids)[:, K:]
    with torch.no_grad():
        rows = torch.cat((embedding_prompt.vectors().expand(len(ids), -1, -1), model.get_input_embeddings()(ids)), 1)
        expected = model(inputs_embeds=rows).logits[:, K:]
    assert (peft - expected).abs().max() <= 1e-5
    assert (peft - our_logits(make_model(family), ids, embedding_prompt)).abs().max() <= 1e-5
    with torch.no_grad():
        assert (peft - make_model(family)(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("kv_type", ["CARTRIDGE", "PREFIX_TUNING"])
def test_peft_generates_the_same_tokens(
    kv_type: str, make_model: Maker, random_kv: Callable[..., KVPrompt], ids: Tensor, tmp_path: Path
) -> None:
    prompt = random_kv(make_model(), K)
    save(tmp_path / "prompt", prompt, model=make_model(), kv_type=kv_type)
    wrapped = PeftModel.from_pretrained(make_model(), str(tmp_path / "prompt")).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    peft = wrapped.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    model = make_model()
    prepare(model)
    assert torch.equal(generate(model, ids, prompt.prefix(), **options), peft)


def test_the_configuration_has_the_number_of_key_heads_and_of_frozen_tokens(
    make_model: Maker, random_kv: Callable[..., KVPrompt], tmp_path: Path
) -> None:
    save(tmp_path / "prompt", random_kv(make_model(), K, frozen_tokens=2), model=make_model())
    config = json.loads((tmp_path / "prompt" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_frozen_tokens"], config["num_virtual_tokens"]) == ("CARTRIDGE", 2, K)
    assert (config["token_dim"], config["num_attention_heads"]) == (2 * 8, 2)


COMMON = {"task_type": "CAUSAL_LM", "num_virtual_tokens": K}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "PROMPT_TUNING": lambda: PromptTuningConfig(**COMMON),
    "PREFIX_TUNING": lambda: PrefixTuningConfig(**COMMON),
    "PREFIX_TUNING with a projection": lambda: PrefixTuningConfig(
        **COMMON, prefix_projection=True, encoder_hidden_size=7
    ),
    "CARTRIDGE": lambda: CartridgeConfig(**COMMON, num_frozen_tokens=2),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_a_prompt_saved_by_peft_loads_here_with_the_same_logits(
    family: str, kind: str, make_model: Maker, ids: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    wrapped = get_peft_model(make_model(family), CONFIGS[kind]()).eval()
    wrapped.save_pretrained(str(tmp_path / "peft"))
    with torch.no_grad():
        peft = wrapped(input_ids=ids).logits[:, -ids.shape[1] :]
    with pytest.warns(UserWarning, match=r"no softprompt\.json: its shapes are checked"):
        prompt, record = load(tmp_path / "peft", make_model(family))
    assert record is None
    assert prompt.length == K and prompt.frozen_tokens == (2 if kind == "CARTRIDGE" else 0)
    assert (peft - our_logits(make_model(family), ids, prompt)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["models/base", "./models/../models/base/", "."])
def test_peft_finds_a_model_of_a_relative_path_from_another_folder(
    name: str, make_model: Maker, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "models" / "base"
    make_model().save_pretrained(base)
    monkeypatch.chdir(base if name == "." else tmp_path)
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    torch.manual_seed(2)
    prompt = EmbeddingPrompt(torch.randn(K, 24))
    save(tmp_path / "prompt", prompt, model=model)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = AutoPeftModelForCausalLM.from_pretrained("../prompt").eval()
    with torch.no_grad():
        peft = found(input_ids=ids).logits[:, K:]
    assert (peft - our_logits(model, ids, prompt)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["org/model", "gone/folder", ""])
def test_a_name_that_is_no_folder_here_is_kept(
    name: str, make_model: Maker, random_kv: Callable[..., KVPrompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model()
    model.config._name_or_path = name
    save(tmp_path / "prompt", random_kv(model), model=model)
    config = json.loads((tmp_path / "prompt" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == (name or None)


def test_a_folder_that_save_wrote_loads_without_a_warning(
    make_model: Maker, random_kv: Callable[..., KVPrompt], tmp_path: Path
) -> None:
    save(tmp_path / "prompt", random_kv(make_model()), model=make_model())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(tmp_path / "prompt", make_model())
