"""`head_of` gives the parameters of the model's head."""

import pytest
import torch
from torch.nn.utils import prune

from softprompt_kernels.errors import NotServedError, SoftPromptError
from softprompt_kernels.models import head_of, prepare, prompted_hidden, prompted_logits, registry


def test_head_gives_the_models_logits(family, build, tokens):
    model = build(family)
    with torch.no_grad():
        expected = model(tokens(2, 5)).logits
    prepare(model)
    head = head_of(model)
    hidden = prompted_hidden(model, tokens(2, 5), None)
    torch.testing.assert_close(head.logits(hidden), expected, atol=1e-5, rtol=0)


def test_head_shares_the_models_weight(build):
    model = build("llama")
    head = head_of(model)
    assert head.weight is model.lm_head.weight
    assert (head.bias, head.softcap, head.logit_scale) == (None, None, 1.0)


def test_softcap_is_found(build):
    assert head_of(build("gemma2")).softcap == 1.5
    assert head_of(build("gemma2", final_logit_softcapping=None)).softcap == pytest.approx(30.0)  # the family's default
    assert head_of(build("gemma3")).softcap is None
    assert head_of(build("gemma3", final_logit_softcapping=3.0)).softcap == 3.0


def test_bias_is_found(build, tokens):
    model = build("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.arange(61.0))
    with torch.no_grad():
        expected = model(tokens(2, 5)).logits
    prepare(model)
    head = head_of(model)
    assert head.bias is model.lm_head.bias
    torch.testing.assert_close(head.logits(prompted_hidden(model, tokens(2, 5), None)), expected, atol=1e-5, rtol=0)


def test_a_quantised_head_is_refused(build):
    model = build("llama")
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(976, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(SoftPromptError, match=r"its head is torch.uint8 of shape \(976, 1\)"):
        head_of(model)


def _with_an_adapter(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))


def _with_a_trained_copy(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))


def _with_a_hook(model):
    def doubled(module, args, output):
        return output * 2

    model.lm_head.register_forward_hook(doubled)


def _with_a_forward_of_its_own(model):
    model.lm_head.forward = lambda hidden: hidden


def _in_float8(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)


def _of_another_tensor_type(model):
    class Packed(torch.Tensor):
        pass

    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.as_subclass(Packed), requires_grad=False)


def _compiled(model):
    model.lm_head = torch.compile(model.lm_head)


def _of_another_class(model):
    class Scaled(torch.nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model.lm_head = Scaled(32, 61, bias=False)


def _with_a_call_of_its_own(model):
    class Called(torch.nn.Linear):
        def __call__(self, hidden):
            return 2 * super().__call__(hidden)

    model.lm_head = Called(32, 61, bias=False)


REFUSED = {
    _with_a_call_of_its_own: r"its head is a \S*Called, accepted is a torch.nn.Linear",
    _with_an_adapter: r"its head is a peft\.\S*lora\S*\.Linear, accepted is a torch.nn.Linear: merge an adapter",
    _with_a_trained_copy: r"its head is a peft\.\S*ModulesToSaveWrapper, accepted is a torch.nn.Linear",
    _with_a_hook: r"its head has hooks \(.*doubled\), accepted is a torch.nn.Linear without",
    _with_a_forward_of_its_own: r"its head has hooks \(a forward of its own\)",
    _in_float8: r"its head is torch.float8_e4m3fn of shape \(61, 32\)",
    _of_another_tensor_type: r"the weight of its head is a \S*Packed with layout torch.strided",
    _compiled: r"its head is a torch\.\S*OptimizedModule",
    _of_another_class: r"its head is a \S*Scaled, accepted is a torch.nn.Linear",
    lambda model: prune.l1_unstructured(model.lm_head, "weight", 0.5): r"its head has hooks \(L1Unstructured\)",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_head_that_is_more_than_weight_and_bias_is_refused(change, build, tokens):
    model = build("llama")
    prepare(model)
    change(model)
    for call in (head_of, lambda model: prompted_logits(model, tokens(1, 4), None)):
        with pytest.raises(NotServedError, match=REFUSED[change]):
            call(model)


def test_a_declared_wrapper_has_a_scale_of_its_own(build, monkeypatch):
    model = build("wrapped gemma3")
    assert head_of(model).logit_scale == 1
    scaled = registry.Family(logit_scale=lambda config: config.hidden_size / 8)
    monkeypatch.setattr(registry, "_families", registry._families | {"gemma3": scaled})
    assert head_of(model).logit_scale == 4
    assert head_of(build("gemma3")).logit_scale == 1, "its text model alone has none"


def _reparametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


def _moved_by_accelerate(model):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.lm_head, hooks.AlignDevicesHook("cpu", io_same_device=True))


def _with_an_adapter_in_its_layers(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))


@pytest.mark.parametrize("change", [_reparametrised, _moved_by_accelerate, _with_an_adapter_in_its_layers])
def test_a_head_whose_weight_can_be_read_is_served(change, build, tokens):
    model = build("llama")
    change(model)
    with torch.no_grad():
        expected = model(tokens(2, 5)).logits
        prepare(model)
        torch.testing.assert_close(prompted_logits(model, tokens(2, 5), None), expected, atol=1e-5, rtol=0)
