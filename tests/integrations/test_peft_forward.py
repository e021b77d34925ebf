"""A patched PEFT model gives the logits, losses and gradients of PEFT, for every way to call its forward."""

import pytest
import torch
from peft import PeftModel

from softprompt_kernels import patch
from softprompt_kernels.errors import SoftPromptError

TEN = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "gpt_oss")
NO_WINDOW = ("llama", "qwen3", "gpt2", "gpt_neox")  # the windows of the other tiny models are shorter than a batch
K = 4
PROJECTION = {"prefix_projection": True, "encoder_hidden_size": 8}


def batch(tokens, mask=None):
    ids = tokens(3, 7)
    if mask is None:
        return {"input_ids": ids, "labels": ids}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def padding(side):
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, slice(4, 7) if side == "right" else slice(0, 3)] = 0
    mask[2, slice(6, 7) if side == "right" else slice(0, 1)] = 0
    return mask


@pytest.mark.parametrize("family", TEN)
def test_same_step_as_peft(family, kind, pair, tokens, assert_same_step):
    models = pair(kind, family)
    assert_same_step(*models, **batch(tokens))
    assert_same_step(*models, **batch(tokens, padding("right")))


@pytest.mark.parametrize("family", NO_WINDOW)
def test_same_step_with_left_padding(family, kind, pair, tokens, assert_same_step):
    assert_same_step(*pair(kind, family), **batch(tokens, padding("left")))


def gap():
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[1, 2:4] = mask[2, 0] = mask[2, 5] = 0
    return mask


@pytest.mark.parametrize("family", NO_WINDOW)
def test_same_step_with_padding_between_tokens(family, kind, pair, tokens, assert_same_step):
    """The first token behind the gap is predicted by padding, and has no label."""
    inputs = batch(tokens, gap())
    inputs["labels"][1, 4] = inputs["labels"][2, 6] = -100
    assert_same_step(*pair(kind, family), **inputs)


@pytest.mark.parametrize("mask", [padding("left"), padding("right"), gap()], ids=["left", "right", "gap"])
@pytest.mark.parametrize("family", NO_WINDOW)
def test_same_step_of_a_transformers_model(family, mask, build, tokens, assert_same_step):
    models = [build(family).requires_grad_(True) for _ in range(2)]
    patch(models[1])
    inputs = batch(tokens, mask)
    behind_padding = torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0
    inputs["labels"].masked_fill_(behind_padding, -100)
    assert_same_step(*models, **inputs)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_stands_at_padding_changes_nothing(family, side, kind, pair, tokens):
    _, model = pair(kind, family)
    mask, ids = padding(side), tokens(3, 7)
    others = torch.where(mask.bool(), ids, tokens(3, 7, seed=5))
    first, second = (model(input_ids=x, attention_mask=mask).logits[:, -7:][mask.bool()] for x in (ids, others))
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)
    without = model(input_ids=ids).logits[:, -7:][mask.bool()]
    assert side == "right" or (first - without).abs().max() > 1e-3  # the mask is read


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_left_padded_rows_equal_rows_alone_where_positions_say_so(family, pair, tokens):
    _, model = pair("PREFIX_TUNING", family)
    mask, ids = padding("left"), tokens(3, 7)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, real in enumerate(mask.bool()):
        alone = model(input_ids=ids[row : row + 1, real]).logits[0]
        torch.testing.assert_close(logits[row, real], alone, atol=1e-5, rtol=0)


def test_a_loss_over_a_given_number_of_tokens(kind, pair, tokens, assert_same_step):
    assert_same_step(*pair(kind), **batch(tokens), num_items_in_batch=torch.tensor(50))


def test_labels_of_32_bits_for_prompt_tuning(pair, tokens, assert_same_step):
    """PEFT's prompt tuning takes them."""
    ids = tokens(2, 5)
    assert_same_step(*pair("PROMPT_TUNING"), input_ids=ids, labels=ids.int())


def test_one_virtual_token(kind, pair, tokens, assert_same_step):
    options = {"num_frozen_tokens": 0} if kind == "CARTRIDGE" else {}
    assert_same_step(*pair(kind, num_virtual_tokens=1, **options), **batch(tokens))


def test_embeddings_in_place_of_ids(kind, pair, tokens, assert_same_step):
    models = pair(kind)
    ids = tokens(2, 5)
    embeds = models[0].get_input_embeddings()(ids).detach()
    assert_same_step(*models, inputs_embeds=embeds, labels=ids)


def test_frozen_tokens_of_a_cartridge(pair, tokens, assert_same_step):
    models = pair("CARTRIDGE", num_frozen_tokens=2)
    assert_same_step(*models, **batch(tokens))
    assert models[1].prompt_encoder["default"].frozen_embedding.grad is None


def test_prefix_projection(pair, tokens, assert_same_step):
    assert_same_step(*pair("PREFIX_TUNING", **PROJECTION), **batch(tokens))


@pytest.mark.parametrize(
    ("kind", "options"),
    [("PREFIX_TUNING", {}), ("PREFIX_TUNING", PROJECTION), ("CARTRIDGE", {}), ("PROMPT_TUNING", {})],
    ids=["prefix", "projection", "cartridge", "prompt"],
)
def test_a_loaded_adapter_in_inference_mode(kind, options, pair, build, tokens, tmp_path):
    """PEFT saves what a projection gives, and loads it without the projection."""
    model, patched = pair(kind, **options)
    patched.save_pretrained(tmp_path)
    loaded = patch(PeftModel.from_pretrained(build("llama"), tmp_path))
    assert loaded.active_peft_config.inference_mode
    torch.testing.assert_close(loaded(tokens(2, 5)).logits, model(tokens(2, 5)).logits, atol=1e-5, rtol=0)


def test_adapters_are_switched_by_set_adapter(kind, pair, tokens):
    models = pair(kind)
    for model in models:
        config = model.peft_config["default"]
        model.add_adapter("second", type(config)(num_virtual_tokens=2, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for parameter in model.prompt_encoder["second"].parameters():
                parameter.fill_(0.4)
    seen = []
    for name in ("second", "default"):
        for model in models:
            model.set_adapter(name)
        seen.append([model(tokens(2, 5)).logits[:, -5:] for model in models])
        torch.testing.assert_close(*seen[-1], atol=1e-5, rtol=0)
    assert (seen[0][1] - seen[1][1]).abs().max() > 1e-2


def test_without_the_adapter_it_is_the_base_model(kind, pair, tokens):
    model, patched = pair(kind)
    ids = tokens(2, 5)
    inside = []
    for one in (model, patched):
        with one.disable_adapter():
            inside.append(one(ids).logits)
            assert torch.equal(one.generate(ids, max_new_tokens=2, do_sample=False)[:, :5], ids)
    torch.testing.assert_close(*inside, atol=1e-5, rtol=0)
    assert "forward" not in vars(patched)
    torch.testing.assert_close(patched(ids).logits, model(ids).logits, atol=1e-5, rtol=0)


def test_an_error_inside_disable_adapter_leaves_nothing_behind(kind, pair, tokens):
    _, patched = pair(kind)
    before, logits = dict(vars(patched)), patched(tokens(2, 5)).logits
    with pytest.raises(KeyError), patched.disable_adapter():
        raise KeyError
    assert vars(patched).keys() == before.keys()
    assert torch.equal(patched(tokens(2, 5)).logits, logits)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, kind, pair, tokens, assert_same_step):
    model, patched = pair(kind)
    model.train(), patched.train()
    patched.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        patched.enable_input_require_grads()
        with pytest.raises(SoftPromptError, match="gradient checkpointing: got the re-entrant kind"):
            patched(**batch(tokens)).loss.backward()
    else:
        assert_same_step(model, patched, **batch(tokens, padding("right")))


def test_a_cache_that_is_asked_for_holds_the_prompt_as_with_peft(kind, pair, tokens):
    ids, mask = tokens(2, 5), torch.ones(2, K + 6)
    for side in (torch.ones(2, 5), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])):
        nexts = []
        for model in pair(kind):
            cache = model(input_ids=ids, attention_mask=side, use_cache=True).past_key_values
            assert cache.get_seq_length() == K + 5
            mask[:, K : K + 5] = side
            nexts.append(model.base_model(tokens(2, 1), attention_mask=mask, past_key_values=cache).logits)
        torch.testing.assert_close(*nexts, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"logits_to_keep": 2},
        {"logits_to_keep": 8},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"position_ids": torch.arange(5)[None] + 3},
        {"token_type_ids": torch.zeros(2, 5, dtype=torch.int64)},
    ],
    ids=lambda options: next(iter(options)) + str(next(iter(options.values())))[:2],
)
def test_other_arguments_of_forward(options, kind, pair, tokens):
    expected, got = (model(input_ids=tokens(2, 5), **options) for model in pair(kind))
    if "return_dict" in options:
        expected, got = expected[:1], got[:1]
        assert isinstance(got, tuple)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        return
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=0)
    if "output_hidden_states" in options:
        torch.testing.assert_close(got.hidden_states, expected.hidden_states, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (lambda ids: {"input_ids": ids, "output_attentions": True}, "output_attentions: got True, accepted is False"),
        (lambda ids: {"input_ids": ids, "attention_mask": ids[:, 1:]}, r"attention_mask: got shape \(2, 4\)"),
        (
            lambda ids: {"input_ids": ids, "attention_mask": {"full_attention": None}},
            r"attention_mask: got dict, accepted is shape \(2, 5\)",
        ),
        (lambda ids: {"input_ids": ids[:, :0]}, r"input_ids: got shape \(2, 0\), accepted is \[B, M\]"),
        (lambda ids: {"input_ids": ids.tolist()}, r"input_ids: got list, accepted is \[B, M\]"),
        (lambda ids: {"labels": ids}, "input_ids: got NoneType, accepted is"),
        (
            lambda ids: {"input_ids": ids.repeat(1, 13)},
            "too long: 4 prompt . 65 input tokens, the model's window is 64",
        ),
        (lambda ids: {"input_ids": ids, "adapter_names": ["default"] * 2}, "adapter_names: got some, accepted is None"),
    ],
    ids=["attentions", "mask", "masks", "empty", "list", "nothing", "too long", "adapter names"],
)
def test_inputs_that_cannot_be_served_are_refused(inputs, message, pair, tokens):
    _, model = pair("PREFIX_TUNING")
    with pytest.raises(SoftPromptError, match=message):
        model(**inputs(tokens(2, 5)))


def test_positions_that_restart_are_refused(pair, tokens):
    _, model = pair("CARTRIDGE")
    with pytest.raises(SoftPromptError, match="got packed sequences"):
        model(input_ids=tokens(1, 6), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))


def test_another_attention_set_after_patch_is_refused(pair, tokens):
    _, model = pair("CARTRIDGE")
    model.base_model.set_attn_implementation("eager")
    with pytest.raises(SoftPromptError, match="its attention is 'eager', accepted is a model after"):
        model(input_ids=tokens(1, 6))
