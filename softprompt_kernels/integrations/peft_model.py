"""A PEFT model whose prompt is a prefix that the batch shares. `share_prompt` gives a model this class.

PEFT copies a prompt for each sequence of a batch. Each layer then concatenates it with the keys and values of the
sequence. Here the prompt stays one row, and `prompt_attention` reads it beside the own tokens.

    PREFIX_TUNING, CARTRIDGE    keys and values are views of what PEFT's encoder gives for one row
    PROMPT_TUNING               the virtual tokens run through the model at batch 1, and their keys and values are the
                                prefix

Cost for B sequences of M tokens: prefix tuning runs B·M tokens through the model, prompt tuning k + B·M, and PEFT's
prompt tuning B·(k + M). Keys and values of the prompt take the same memory for every batch. The logits of prompt tuning
are those of k + M tokens, as PEFT's are: the last virtual token predicts the first token of the input, and the loss
contains that.

Positions are PEFT's: column j of the input has position k + j.

A call that needs what only PEFT's way gives runs PEFT's own forward, in which the package's attention sees no prefix:
`use_cache=True` or `past_key_values` (its cache holds the prompt), router logits, and for prompt tuning hidden states
of all layers and a selection of logits that includes the prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModelForCausalLM, PeftType
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.errors import NotServedError, SoftPromptError
from softprompt_kernels.models import embed_prefix, generate, prepare, release
from softprompt_kernels.models.attention import Call, register
from softprompt_kernels.models.capture import LayerSink
from softprompt_kernels.models.families import check_positions, check_supported, head_size, is_wrapper, text_config
from softprompt_kernels.models.forward import check_complete
from softprompt_kernels.models.prepare import check_prepared
from softprompt_kernels.prompts.layout import unflatten
from softprompt_kernels.prompts.prefix import Prefix

_KEY_VALUE = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
_SERVED = (*_KEY_VALUE, PeftType.PROMPT_TUNING)
# PEFT's `disable_adapter` puts the first two into the instance, and leaves them there.
_REPLACED = ("forward", "prepare_inputs_for_generation", "generate")


class SharedPromptModel(PeftModelForCausalLM):
    """A `PeftModelForCausalLM` after `patch`. Same attributes, parameters, arguments and results.

    Other packages keep references to a model's forward, accelerate for example. Each method therefore looks whether
    the model still has this class, and hands the call back to PEFT if not.
    """

    base_model: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        task_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As PEFT's.

        Args:
            input_ids: `[B, M]` int64, or `inputs_embeds [B, M, d]`.
            attention_mask: `[B, M]`, non-zero for real tokens. Padding may be anywhere.
            labels: `[B, M]` int64, −100 for tokens without a loss.
            kwargs: other arguments of the base model's forward.

        Returns:
            The base model's output: logits `[B, M, V]`, for prompt tuning `[B, k + M, V]`.

        Raises:
            SoftPromptError: prompt and input are longer than the model's window, shapes do not fit, or an argument asks
                for what the package's attention does not give (dropout, attention weights, packed sequences).
        """
        arguments = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "inputs_embeds": inputs_embeds,
            "labels": labels,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        if not isinstance(self, SharedPromptModel):
            return type(self).forward(self, task_ids=task_ids, **arguments, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise SoftPromptError("adapter_names: got some, accepted is None: a batch has one prompt, see set_adapter")
        own = _own_tokens(input_ids, inputs_embeds, attention_mask)
        if _needs_peft(self, own.shape[1], labels, output_hidden_states, kwargs):
            return super().forward(task_ids=task_ids, **arguments, **kwargs)
        check_prepared(self.base_model)
        check_positions(text_config(self.base_model), self.active_peft_config.num_virtual_tokens, own.shape[1])
        self._adjust_prompt_learning_kwargs(self.active_peft_config, kwargs=kwargs)
        kwargs |= {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "use_cache": False,
            "return_dict": True,
        }
        if self.active_peft_config.peft_type in _KEY_VALUE:
            inputs = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "labels": labels}
            output = _run(self, _key_value_prefix(self), attention_mask, own, inputs | kwargs)
        else:
            if inputs_embeds is None:
                inputs_embeds = cast(Any, self.word_embeddings)(input_ids)
            output = _run_behind_tokens(self, inputs_embeds, attention_mask, labels, kwargs)
        return output.to_tuple() if return_dict is False else output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`softprompt_kernels.models.generate` behind the active prompt. It always keeps a cache.

        Args:
            args: at most `input_ids [B, M]` int64, also accepted by name.
            kwargs: other arguments of transformers' `generate`, except those that would replace the cache or the
                positions.

        Returns:
            What transformers' `generate` returns.

        Raises:
            SoftPromptError: as `softprompt_kernels.models.generate`.
        """
        if not isinstance(self, SharedPromptModel):
            return type(self).generate(self, *args, **kwargs)
        if self._adapters_disabled:
            return super().generate(*args, **kwargs)
        given = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
        named = given.pop("inputs", None)
        input_ids = given.pop("input_ids", named)
        if not isinstance(input_ids, Tensor) or len(args) > 1:
            got = type(input_ids).__name__
            raise SoftPromptError(f"input_ids: got {got}, accepted is [B, M] int64, and all else by name")
        given.pop("use_cache", None)
        if "generation_config" in vars(self):
            given.setdefault("generation_config", self.generation_config)
        mask = given.pop("attention_mask", None)
        mask = _guessed_mask(self.base_model, input_ids, given) if mask is None else mask
        with torch.no_grad():
            if self.active_peft_config.peft_type in _KEY_VALUE:
                prefix = _key_value_prefix(self)
            else:
                prefix = embed_prefix(self.base_model, _rows(self))
            return generate(self.base_model, input_ids, prefix, attention_mask=mask, **given)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """PEFT's: inside, the base model runs without the prompt."""
        before = {name: vars(self)[name] for name in _REPLACED if name in vars(self)}
        try:
            with super().disable_adapter():
                yield
        finally:
            for name in _REPLACED:
                vars(self).pop(name, None)
            vars(self).update(before)

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # a model that was pickled may be the first one of its process
        super().__setstate__(state)


# --- patch and unpatch ------------------------------------------------------------------------------------------------


def share_prompt(model: Any) -> None:
    """`patch` of a PEFT model.

    Raises:
        SoftPromptError: see `patch`. The model is unchanged then.
    """
    if isinstance(model, SharedPromptModel):
        prepare(model.base_model)
        return
    _check(model)
    prepare(model.base_model)
    for name in _REPLACED:
        if vars(model).get(name) == getattr(PeftModelForCausalLM, name).__get__(model):
            delattr(model, name)
    model.__class__ = SharedPromptModel


def unshare_prompt(model: Any) -> None:
    """`unpatch` of a PEFT model.

    Raises:
        SoftPromptError: the model's class was changed again since `patch`.
    """
    if not isinstance(model, SharedPromptModel):
        return
    if type(model) is not SharedPromptModel:
        raise SoftPromptError(
            f"model: its class became {type(model).__name__} after patch, accepted is the patched model itself: call "
            "unpatch before what changed it"
        )
    cast(Any, model).__class__ = PeftModelForCausalLM
    release(model.base_model)


def _check(model: Any) -> None:
    """Raise unless the model can be patched."""
    configs: dict[str, Any] = model.peft_config
    kinds = sorted({PeftType(config.peft_type).value for config in configs.values()})
    if not {PeftType(kind) for kind in kinds} <= set(_SERVED):
        raise NotServedError(
            f"model: got a PEFT model of type {', '.join(kinds)}, accepted are PREFIX_TUNING, CARTRIDGE and "
            "PROMPT_TUNING; patch(model.get_base_model()) changes the attention alone"
        )
    if type(model) is not PeftModelForCausalLM:
        raise NotServedError(
            f"model: got a {type(model).__name__}, accepted is a PeftModelForCausalLM, which PEFT makes for "
            'task_type="CAUSAL_LM"'
        )
    base: Any = model.base_model
    if not isinstance(base, PreTrainedModel):
        raise NotServedError(
            f"model: got a prompt on a {type(base).__name__}, accepted is one on a transformers PreTrainedModel: merge "
            "the inner adapter into its model"
        )
    check_supported(base)
    if is_wrapper(base):
        raise NotServedError(
            f"model: got a prompt on a '{base.config.model_type}', accepted are models of text alone, such as its "
            f"'{text_config(base).model_type}' as a ...ForCausalLM"
        )
    config = text_config(base)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    accepted = config.num_hidden_layers, heads, heads * head_size(base), 1
    for name, one in configs.items():
        got = one.num_layers, one.num_attention_heads, one.token_dim, one.num_transformer_submodules
        if one.peft_type in _KEY_VALUE and got != accepted:
            raise SoftPromptError(
                f"model: adapter {name!r} has num_layers, num_attention_heads, token_dim and num_transformer_submodules"
                f" = {got}, accepted is {accepted}"
            )
    for name in _REPLACED:
        replaced = vars(model).get(name)
        function = getattr(replaced, "__func__", replaced)
        known = function in (None, getattr(PeftModelForCausalLM, name))
        if not known and inspect.unwrap(cast(Any, function)) is not getattr(SharedPromptModel, name):
            raise SoftPromptError(
                f"model: its {name} was replaced by {_name(function)}, accepted is PEFT's own: call patch before the "
                "Trainer, the Accelerator or whatever replaced it"
            )


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


# --- one forward ------------------------------------------------------------------------------------------------------


def _own_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None, mask: Tensor | None) -> Tensor:
    """The inputs, of which only the shape `[B, M, ...]` and the device are read.

    Raises:
        SoftPromptError: there are none, or the mask is not `[B, M]`.
    """
    own = input_ids if inputs_embeds is None else inputs_embeds
    if not isinstance(own, Tensor) or own.dim() < 2 or own.numel() == 0:
        raise SoftPromptError(
            f"input_ids: got {_shape(own)}, accepted is [B, M] with B and M ≥ 1, or inputs_embeds [B, M, d]"
        )
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != own.shape[:2]):
        raise SoftPromptError(
            f"attention_mask: got {_shape(mask)}, accepted is shape {tuple(own.shape[:2])}, one entry for each token "
            "of the input"
        )
    return own


def _shape(given: object) -> str:
    return f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"{type(given).__name__}"


def _needs_peft(
    model: Any, tokens: int, labels: Tensor | None, hidden_states: bool | None, kwargs: dict[str, Any]
) -> bool:
    """Whether the call asks for what only PEFT's own forward gives."""
    config = text_config(model.base_model)
    if kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        return True
    if kwargs.get("output_router_logits") or getattr(config, "output_router_logits", False):
        return True
    if model.active_peft_config.peft_type in _KEY_VALUE:
        return False
    if hidden_states or (hidden_states is None and config.output_hidden_states):
        return True
    kept = kwargs.get("logits_to_keep", 0)
    return not isinstance(kept, int) or kept > (tokens if labels is None else 0)


def _run(model: Any, prefix: Prefix | None, mask: Tensor | None, own: Tensor, kwargs: dict[str, Any]) -> Any:
    """One forward of the base model behind `prefix`, for inputs of the shape of `own [B, M, ...]`, padded by `mask`."""
    base = model.base_model
    graph = torch.is_grad_enabled() and prefix is not None and prefix.layers[0][0].requires_grad
    call = Call(prefix, wants_grad=graph)
    if mask is not None and (torch.compiler.is_compiling() or not bool(mask.all())):
        call = call.behind(mask.to(own.device).bool())
    packed = kwargs.get("position_ids") is not None and mask is None
    if kwargs.get("position_ids") is None:
        start = 0 if prefix is None else prefix.length
        kwargs["position_ids"] = torch.arange(start, start + own.shape[1], device=own.device)[None]
    if not packed:  # transformers then does not look whether the positions restart; `call` has the padding
        kwargs["attention_mask"] = own.new_zeros(1, 1, 1, 1, dtype=torch.int64)
    output = base(**kwargs, softprompt=call)
    check_complete(base, call)
    return output


def _run_behind_tokens(
    model: Any, embeds: Tensor, mask: Tensor | None, labels: Tensor | None, kwargs: dict[str, Any]
) -> Any:
    """One forward of virtual tokens and one of `embeds [B, M, d]` behind them. Logits and loss as of k + M tokens."""
    batch, base = embeds.shape[0], model.base_model
    kept = kwargs.get("logits_to_keep", 0)
    first, prefix = _run_virtual_tokens(model, kwargs | {"logits_to_keep": 1 if kept else 0})
    output = _run(model, prefix, mask, embeds, kwargs | {"inputs_embeds": embeds})
    if kept:
        return output
    logits, loss = torch.cat([first.expand(batch, -1, -1), output.logits], dim=1), None
    if labels is not None:
        labels = torch.cat([labels.new_full((batch, prefix.length), -100, dtype=torch.int64), labels], dim=1)
        loss = base.loss_function(logits=logits, labels=labels, vocab_size=text_config(base).vocab_size, **kwargs)
    return type(output)(**{**output, "loss": loss, "logits": logits})


def _run_virtual_tokens(model: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Prefix]:
    """Logits `[1, k, V]` of the virtual tokens, and their keys and values in all layers."""
    base, sink = model.base_model, LayerSink()
    tokens = _rows(model).to(model.word_embeddings.weight.dtype)[None]
    call = Call(None, sink=sink, wants_grad=torch.is_grad_enabled() and tokens.requires_grad)
    positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    options = {name: value for name, value in kwargs.items() if name in ("use_cache", "return_dict", "logits_to_keep")}
    output = base(
        inputs_embeds=tokens,
        position_ids=positions,
        attention_mask=positions.new_zeros(1, 1, 1, 1),
        softprompt=call,
        **options,
    )
    check_complete(base, call)
    return output.logits, sink.close()


# --- the prompt, from PEFT's parameters -------------------------------------------------------------------------------


def _rows(model: Any) -> Tensor:
    """What PEFT's encoder of the active adapter gives for one sequence: `[k, width]`."""
    config, encoder = model.active_peft_config, model.prompt_encoder[model.active_adapter]
    if not config.inference_mode:
        indices = model.prompt_tokens[model.active_adapter].to(next(encoder.parameters()).device)
        return cast(Tensor, encoder(indices[None])[0])
    table = encoder if config.peft_type == PeftType.CARTRIDGE else encoder.embedding
    return cast(Tensor, table.weight)


def _key_value_prefix(model: Any) -> Prefix:
    """Keys and values of prefix tuning or of a cartridge, one row, in the dtype of the base model.

    Cost: one cast where PEFT's parameters have another dtype. The layers are views, and their gradient is one stack.
    """
    config = model.active_peft_config
    rows = _rows(model).to(model.base_model.dtype)
    key, value = unflatten(rows, config.num_layers, config.num_attention_heads)
    return Prefix.of(zip(key.unsqueeze(1).unbind(), value.unsqueeze(1).unbind(), strict=True))


def _guessed_mask(model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """The mask that transformers' `generate` guesses where the caller gives none, from the padding token."""
    config = kwargs.get("generation_config") or model.generation_config
    pad, eos = (kwargs.get(name, getattr(config, name)) for name in ("pad_token_id", "eos_token_id"))
    ends = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
    return None if pad is None or pad in ends else input_ids != pad
