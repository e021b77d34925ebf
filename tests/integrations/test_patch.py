"""patch and unpatch: what they change, what they restore, what they refuse, and copies of a patched model."""

import copy
import pickle
import subprocess
import sys
import types
import warnings

import pytest
import torch
import transformers
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

import softprompt_kernels
from softprompt_kernels import patch, unpatch
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.integrations import register


def state(model):
    """All that patch may change: attributes, classes, hooks and configurations of all modules."""
    config = model.config
    return (
        [
            (name, type(module), sorted(vars(module)), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
        dict(vars(config)),
    )


@pytest.fixture(params=["transformers", "PREFIX_TUNING", "CARTRIDGE", "PROMPT_TUNING"])
def make(request, build, with_prompt):
    """`make(family)`: an unpatched model, of each kind that can be patched."""

    def model(family="llama", **options):
        base = build(family, **options)
        return base if request.param == "transformers" else with_prompt(base, request.param)

    return model


def train(model, ids):
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.zero_grad()


def test_unpatch_restores_attributes_and_bits(make, tokens):
    model, ids = make(), tokens(2, 6)
    before, logits = state(model), model(ids).logits
    assert patch(model) is model
    assert state(model) != before
    patched = model(ids).logits
    assert unpatch(model) is model
    assert state(model) == before
    assert torch.equal(model(ids).logits, logits)
    torch.testing.assert_close(patched, logits, atol=1e-5, rtol=0)


def test_unpatch_after_training_keeps_the_weights_and_gives_their_bits(make, tokens):
    model, ids = make(), tokens(2, 6)
    fresh = copy.deepcopy(model)
    before = model(ids).logits
    train(patch(model), ids)
    fresh.load_state_dict(unpatch(model).state_dict())
    assert torch.equal(model(ids).logits, fresh(ids).logits)
    assert (model(ids).logits - before).abs().max() > 1e-3
    patch(model)
    torch.testing.assert_close(model(ids).logits, fresh(ids).logits, atol=1e-5, rtol=0)


def test_twice_is_once(make, tokens):
    model = make()
    before = state(model)
    unpatch(model)
    assert state(model) == before
    once = state(patch(model))
    assert state(patch(model)) == once
    assert state(unpatch(model)) == before
    assert state(unpatch(model)) == before


def test_only_this_model_changes(make, tokens):
    first, second, ids = make(), make(), tokens(2, 6)
    before, logits = state(second), second(ids).logits
    patch(first)
    assert state(second) == before
    assert torch.equal(second(ids).logits, logits)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_a_patched_model_are_patched_and_independent(copied, make, tokens):
    model, ids = make(), tokens(2, 6)
    unpatched = model(ids).logits
    logits = patch(model)(ids).logits
    twin = copied(model)
    unpatch(model)
    assert torch.equal(twin(ids).logits, logits)
    assert torch.equal(unpatch(twin)(ids).logits, unpatched)


def test_a_pickled_model_opens_in_a_new_process(build, with_prompt, tokens, tmp_path):
    model, ids = patch(with_prompt(build("llama"), "PREFIX_TUNING")), tokens(2, 6)
    torch.save((model, ids, model(ids).logits), tmp_path / "model.pt")
    code = (
        "import sys, torch; model, ids, logits = torch.load(sys.argv[1], weights_only=False);"
        "assert torch.equal(model(ids).logits, logits)"
    )
    root = str(softprompt_kernels.__path__[0]).rpartition("/")[0]
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True, cwd=root)


def test_what_a_patched_model_saves_loads_without_us(kind, build, with_prompt, tokens, tmp_path):
    model, ids = with_prompt(build("llama"), kind), tokens(2, 6)
    logits, names = model(ids).logits, list(model.state_dict())
    patch(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert not any("softprompt" in file.read_text() for file in tmp_path.glob("*.json"))
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert type(loaded) is PeftModelForCausalLM
    assert torch.equal(loaded(ids).logits, logits)


def test_a_configuration_with_tuples_gets_them_back(build):
    register()
    model = build("llama", return_dict=False)
    for attention in ("sdpa", "softprompt", "eager"):
        model.set_attn_implementation(attention)
        assert patch(patch(model)).config.return_dict
        assert not unpatch(model).config.return_dict
        assert model.config._attn_implementation == attention
    patch(model).set_attn_implementation("eager")
    patch(model)
    assert not unpatch(model).config.return_dict
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_attention_by_its_name(family, build, tokens, tmp_path):
    register()
    expected = build(family)
    expected.save_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="softprompt")
    torch.testing.assert_close(model(tokens(2, 6)).logits, expected(tokens(2, 6)).logits, atol=1e-5, rtol=0)
    unpatch(patch(model))  # nothing to do, nothing to undo
    assert model.config._attn_implementation == "softprompt"


def test_the_attention_by_its_name_is_refused_where_tokens_see_later_ones():
    register()
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 32}
    bert = transformers.BertModel._from_config(
        transformers.BertConfig(vocab_size=61, **sizes), attn_implementation="softprompt"
    )
    with pytest.raises(SoftPromptError, match="custom mask function, accepted are causal models"):
        bert(torch.ones(1, 4, dtype=torch.int64))
    clip = transformers.CLIPVisionModel._from_config(
        transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14), attn_implementation="softprompt"
    )
    with pytest.raises(SoftPromptError, match="for a CLIPAttention that reads in both directions, accepted are causal"):
        clip.eval()(torch.zeros(1, 3, 28, 28))


# --- what other packages leave in a model -----------------------------------------------------------------------------


def test_a_wrapped_forward_that_outlives_unpatch_runs_pefts(kind, pair, tokens):
    """As accelerate's: it keeps the class's function, and calls it with the model."""
    model, patched = pair(kind)
    ids, function = tokens(2, 6), type(patched).forward

    def wrapper(self, *args, **kwargs):
        return function(self, *args, **kwargs)

    wrapper.__wrapped__ = function
    patched.forward = types.MethodType(wrapper, patched)
    unpatch(patched)
    assert torch.equal(patched(ids).logits, model(ids).logits)
    assert torch.equal(patched(ids, use_cache=True).logits, model(ids).logits)
    patch(patched)  # again: the wrapper still leads here
    torch.testing.assert_close(patched(ids).logits, model(ids).logits, atol=1e-5, rtol=0)
    assert patched(ids).past_key_values is None


def test_a_forward_that_was_replaced_before_patch_is_refused(kind, pair):
    model, _ = pair(kind)
    before = state(model)
    model.forward = types.MethodType(lambda self, *args, **kwargs: None, model)
    with pytest.raises(SoftPromptError, match=r"its forward was replaced by .*<lambda>, accepted is PEFT's own: call"):
        patch(model)
    del model.forward
    assert state(model) == before


def test_what_disable_adapter_leaves_is_no_obstacle(kind, pair, tokens):
    model, patched = pair(kind)
    with model.disable_adapter():
        pass
    assert "forward" in vars(model)  # PEFT's own, bound
    patch(model)
    assert torch.equal(model(tokens(2, 6)).logits, patched(tokens(2, 6)).logits)
    assert model(tokens(2, 6)).past_key_values is None


def test_a_class_that_changed_again_is_refused_by_unpatch(kind, pair):
    _, model = pair(kind)
    model.__class__ = type("Sharded", (type(model),), {})
    with pytest.raises(SoftPromptError, match="its class became Sharded after patch, accepted is the patched model"):
        unpatch(model)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _lora(build):
    return get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))


def _on_lora(build):
    return get_peft_model(_lora(build), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **_SIZES))


def _p_tuning(build):
    return get_peft_model(build("llama"), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def _other_task(build):
    return get_peft_model(build("llama"), PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4))


def _other_heads(build):
    model = get_peft_model(build("llama"), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.peft_config["default"].num_attention_heads = 4
    return model


def _family(build):
    sizes = {"vocab_size": 61, "hidden_size": 32, "n_head": 4, "n_layer": 1}
    base = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    return get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))


def _wrapper(build):
    return get_peft_model(
        build("wrapped gemma3"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, token_dim=32)
    )


def _encoder_decoder(build):
    sizes = {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    base = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    return get_peft_model(base, PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))


_SIZES = {"num_layers": 2, "num_attention_heads": 2, "token_dim": 16}
REFUSED = {
    _lora: r"type LORA, accepted are PREFIX_TUNING, CARTRIDGE and PROMPT_TUNING; patch\(model.get_base_model\(\)\)",
    _on_lora: "got a prompt on a PeftModelForCausalLM, accepted is one on a transformers PreTrainedModel: merge",
    _p_tuning: "type P_TUNING, accepted are PREFIX_TUNING, CARTRIDGE and PROMPT_TUNING",
    _other_task: 'got a PeftModelForFeatureExtraction, accepted is a PeftModelForCausalLM, .* task_type="CAUSAL_LM"',
    _other_heads: r"adapter 'default' has .* = \(2, 4, 16, 1\), accepted is \(2, 2, 16, 1\)",
    _family: "got the family 'bloom', but it computes its attention itself",
    _wrapper: "got a prompt on a 'gemma3', accepted are models of text alone, such as its 'gemma3_text'",
    _encoder_decoder: "got a PeftModelForSeq2SeqLM, accepted is a PeftModelForCausalLM",
}


@pytest.mark.parametrize("make_refused", REFUSED, ids=lambda make_refused: make_refused.__name__[1:])
def test_what_cannot_be_patched_is_refused_and_unchanged(make_refused, build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make_refused(build)
    before = state(model)
    with pytest.raises(SoftPromptError, match=REFUSED[make_refused]):
        patch(model)
    assert state(model) == before


@pytest.mark.parametrize("change", [patch, unpatch])
def test_what_is_no_model_is_refused(change, build):
    for thing in (None, "my-model", torch.nn.Linear(2, 2), torch.compile(build("llama"))):
        with pytest.raises(TypeError, match=rf"model: got {type(thing).__name__}, accepted are a transformers"):
            change(thing)
