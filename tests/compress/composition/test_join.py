"""Joined prompts: keys stand where they belong, one sink is left, and what does not fit is refused."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from softprompt_kernels.compress import join_prompts
from softprompt_kernels.compress.composition.join import beside_each_other, join_prefixes
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.models import capture, shift_keys
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix, load, save

IDS = torch.randint(0, 250, (1, 23), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def whole(model: PreTrainedModel) -> Prefix:
    return capture(model, IDS)


def close(found: Prefix, expected: Prefix) -> None:
    assert found.length == expected.length
    for pair, wanted in zip(found.layers, expected.layers, strict=True):
        for tensor, other in zip(pair, wanted, strict=True):
            torch.testing.assert_close(tensor, other, rtol=0, atol=2e-6)


def test_slices_of_one_prompt_joined_are_that_prompt(model: PreTrainedModel, whole: Prefix) -> None:
    cuts = (0, 9, 14, 23)
    parts = [shift_keys(model, whole.slice(start, stop), -start) for start, stop in pairwise(cuts)]
    close(join_prefixes(model, parts, [0, 0, 0]), whole)
    prompts = [KVPrompt.from_prefix(part, frozen_tokens=int(number == 0)) for number, part in enumerate(parts)]
    joined = join_prompts(model, prompts)
    assert isinstance(joined, KVPrompt)
    close(joined.prefix(), whole)
    assert joined.frozen_tokens == 1


def test_contexts_captured_alone_have_the_keys_of_one_text_in_the_layer_that_reads_no_other(
    model: PreTrainedModel, whole: Prefix
) -> None:
    parts = [capture(model, IDS[:, :9]), capture(model, IDS[:, 9:])]
    joined = join_prefixes(model, parts, [0, 0])
    close(Prefix.of(joined.layers[:1]), Prefix.of(whole.layers[:1]))
    second = joined.layers[1][0][:, :, 9:] - whole.layers[1][0][:, :, 9:]
    assert float(second.abs().max()) > 1e-3, "the second text has not read the first"


def test_only_the_first_prompt_keeps_its_sink(model: PreTrainedModel, whole: Prefix) -> None:
    cuts = ((0, 9), (9, 16), (16, 23))
    parts = [shift_keys(model, whole.slice(start, stop), -start) for start, stop in cuts]
    joined = join_prompts(model, [KVPrompt.from_prefix(part, frozen_tokens=2) for part in parts])
    assert isinstance(joined, KVPrompt)
    kept = [whole.slice(0, 9), shift_keys(model, whole.slice(11, 16), -2), shift_keys(model, whole.slice(18, 23), -4)]
    close(joined.prefix(), beside_each_other(kept))
    assert joined.frozen_tokens == 2


def test_keys_that_are_not_moved_are_what_peft_composes(model: PreTrainedModel, whole: Prefix, tmp_path: Path) -> None:
    utils = pytest.importorskip("peft.tuners.cartridge.utils", reason="needs a PEFT with cartridges")
    parts = [whole.slice(0, 9), whole.slice(0, 5)]
    for number, part in enumerate(parts):
        save(tmp_path / str(number), KVPrompt.from_prefix(part), model=model)
    utils.compose_cartridge_adapters([tmp_path / "0", tmp_path / "1"], output_path=tmp_path / "both")
    with pytest.warns(UserWarning, match="only shapes|shapes are checked"):
        composed, _ = load(tmp_path / "both", model)
    assert isinstance(composed, KVPrompt)
    close(composed.prefix(), beside_each_other(parts))


def test_vectors_of_embedding_prompts_stand_one_behind_the_other(model: PreTrainedModel) -> None:
    size = model.config.hidden_size
    prompts = [EmbeddingPrompt(torch.randn(length, size)) for length in (3, 2)]
    joined = join_prompts(model, prompts)
    assert isinstance(joined, EmbeddingPrompt)
    torch.testing.assert_close(joined.vectors(), torch.cat([prompt.vectors() for prompt in prompts]))


def test_what_cannot_be_joined_is_refused(model: PreTrainedModel, whole: Prefix) -> None:
    prompt = KVPrompt.from_prefix(whole)
    layer = KVPrompt.from_prefix(Prefix.of(whole.layers[:1]))
    learned = AutoModelForCausalLM.from_config(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))
    for of_model, prompts, message in (
        (model, [prompt], "got 1, accepted are two or more"),
        (model, [prompt, EmbeddingPrompt(torch.randn(2, 4))], "one kind"),
        (model, [prompt, layer], r"prompts\[1\]: got a prompt of 1 layers"),
        (learned, [prompt, prompt], "positions are learned"),
    ):
        with pytest.raises(SoftPromptError, match=message):
            join_prompts(of_model, prompts)
