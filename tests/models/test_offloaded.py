"""A model whose weights accelerate keeps elsewhere gives the same results as one that is in memory."""

import copy

import pytest
import torch

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import (
    capture,
    embed_prefix,
    generate,
    head_of,
    prefix_of,
    prepare,
    prompted_logits,
    sample,
)
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, load, save
from softprompt_kernels.prompts.fingerprint import differences, model_fingerprint

accelerate = pytest.importorskip("accelerate")

CALLS = {
    "prompted_logits": lambda model, ids, prefix: prompted_logits(model, ids, prefix),
    "capture": lambda model, ids, prefix: capture(model, ids).layers[1][0],
    "embed_prefix": lambda model, ids, prefix: embed_prefix(model, torch.ones(3, 32)).layers[1][0],
    "prefix_of": lambda model, ids, prefix: prefix_of(model, EmbeddingPrompt(torch.ones(3, 32))).layers[1][1],
    "gradient": lambda model, ids, prefix: _gradient(model, ids, prefix),
    "generate": lambda model, ids, prefix: generate(model, ids, prefix, max_new_tokens=4, do_sample=False),
    "sample": lambda model, ids, prefix: torch.stack(
        [c.hidden for c in sorted(sample(model, ids.tolist(), prefix, new_tokens=4), key=lambda c: c.index)]
    ),
}


@torch.enable_grad()
def _gradient(model, ids, prefix):
    prompt = KVPrompt.from_prefix(prefix)
    prompted_logits(model, ids, prompt.prefix()).square().mean().backward()
    return prompt.key.grad


@pytest.fixture(params=["untied", "tied", "tied, on disk", "half of it"])
def offloaded_and_whole(request, build, tmp_path):
    whole = build("llama", tie_word_embeddings=request.param.startswith("tied"))
    prepare(whole)
    model = copy.deepcopy(whole)
    if request.param == "half of it":
        devices = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
        devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
        accelerate.dispatch_model(model, devices, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    elif request.param.endswith("disk"):
        accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(parameter.is_meta for parameter in model.parameters())
    return model, whole


@pytest.mark.parametrize("name", CALLS)
def test_an_offloaded_model_gives_the_same(name, offloaded_and_whole, tokens):
    model, whole = offloaded_and_whole
    ids, prefix = tokens(2, 4), capture(whole, tokens(1, 6, seed=1))
    with torch.no_grad():
        expected = CALLS[name](whole, ids, prefix)
        torch.testing.assert_close(CALLS[name](model, ids, prefix), expected, atol=1e-5, rtol=0)
    assert any(parameter.is_meta for parameter in model.parameters())


def test_its_prompt_is_saved_and_loaded(offloaded_and_whole, tokens, tmp_path):
    model, whole = offloaded_and_whole
    assert differences(model_fingerprint(whole), model_fingerprint(model)) == []
    prompt = KVPrompt.from_prefix(capture(whole, tokens(1, 6)))
    save(tmp_path / "prompt", prompt, model=model)
    for reader in (model, whole):
        loaded, _ = load(tmp_path / "prompt", reader)
        assert torch.equal(loaded.stacked()[0], prompt.stacked()[0])


def test_weights_that_nobody_keeps_are_refused(build):
    model = build("llama")
    model.lm_head.to("meta")
    with pytest.raises(SoftPromptError, match=r"model: its head is on the meta device, .* accepted is a head with"):
        head_of(model)
    with pytest.raises(SoftPromptError, match=r"model: its parameter lm_head.weight is on the meta device"):
        model_fingerprint(model)
