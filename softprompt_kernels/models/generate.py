"""transformers' own `generate` with a prefix: sampling, beams, streamers, stopping and logits processors all work.

`generate` rejects keywords that it does not know. Therefore a pre-hook on the model's forward adds the prefix. The hook
acts only on calls that carry the cache of its own `generate` call. Other calls on the same model, in this thread or
another, are unchanged.

The cache and the attention mask that transformers sees contain own tokens only, so its bookkeeping is that of a run
without a prefix. The hook adds the prompt's length to the positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

from softprompt_kernels.errors import NotServedError, SoftPromptError
from softprompt_kernels.models.attention import Call
from softprompt_kernels.models.cache import OwnCache
from softprompt_kernels.models.finite import check_finite
from softprompt_kernels.models.forward import check_complete, check_inputs, first_position
from softprompt_kernels.models.head import is_split
from softprompt_kernels.models.padding import Placement, is_right_padded
from softprompt_kernels.models.prepare import check_prepared
from softprompt_kernels.prompts.prefix import Prefix

# Arguments of `model.generate` that are set here, and arguments that do not work with a prefix.
_RESERVED = (
    "past_key_values",
    "position_ids",
    "inputs_embeds",
    "cache_implementation",
    "use_cache",
    "prefill_chunk_size",
)
_UNSUPPORTED = ("assistant_model", "prompt_lookup_num_tokens", "inputs", "custom_generate")
_DEFAULT_NEW_TOKENS = 20  # the default of transformers


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    prefix: Prefix | None,
    *,
    attention_mask: Tensor | None = None,
    prompt_index: Tensor | None = None,
    **generate_kwargs: Any,
) -> Tensor:
    """Continue `input_ids` after a prefix.

    Args:
        model: a prepared model that can generate.
        input_ids: `[B, M]` int64.
        prefix: R rows of keys and values, None for no prompt.
        attention_mask: `[B, M]`, non-zero for real tokens, padding on the left. None: all tokens are real; padding is
            not guessed from token ids.
        prompt_index: `[B]` int64, the row of the prefix that each sequence reads, as in `prompted_hidden`.
        generate_kwargs: other arguments of `model.generate`.

    Returns:
        What `model.generate` returns: `[B, M + new]` int64, the inputs with the new tokens appended, unless the caller
        or the model's generation configuration asks for more (`return_dict_in_generate`).

    Raises:
        SoftPromptError: as `prompted_hidden`; or padding on the right; or prompt, input and new tokens are more than
            the model's window; or an argument would replace the cache or the positions; or logits are not finite.
    """
    for name in _RESERVED + _UNSUPPORTED:
        if generate_kwargs.get(name) is not None:
            reason = "the prefix sets it" if name in _RESERVED else "it cannot be combined with a prefix"
            raise SoftPromptError(f"{name}: not accepted by generate, {reason}")
    check_prepared(model)
    if not model.can_generate():
        raise SoftPromptError(f"model: {type(model).__name__} cannot generate, accepted is a ...ForCausalLM")
    if is_split(model):
        raise NotServedError(
            "model: its head is split over ranks, accepted by generate is a whole one; sample takes both"
        )
    new_tokens = _new_token_limit(model, input_ids, generate_kwargs)
    check_inputs(model, input_ids, prefix, attention_mask, prompt_index, new_tokens)
    state = _GenerationState(model, input_ids, prefix, attention_mask, prompt_index)
    processors = generate_kwargs.pop("logits_processor", None)
    generate_kwargs.pop("remove_invalid_values", None)
    handle = model.register_forward_pre_hook(state.inject, with_kwargs=True)
    try:
        generator: Any = model
        tokens: Tensor = generator.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask.long(),
            past_key_values=state.cache,
            use_cache=True,
            remove_invalid_values=False,  # it would hide numbers that are not finite from the check
            cache_implementation=None,  # the model's generation config may ask for a static cache
            logits_processor=LogitsProcessorList([_CheckedLogits(model, state), *(processors or ())]),
            **{name: value for name, value in generate_kwargs.items() if name not in _RESERVED},
        )
        return tokens
    finally:
        handle.remove()


class _CheckedLogits(LogitsProcessor):
    """Stops a generation whose forward dropped the prefix, or whose logits are not finite.

    The most probable token would be one of those that are not finite, often number 0.
    """

    def __init__(self, model: PreTrainedModel, state: _GenerationState) -> None:
        self.model, self.state = model, state

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_complete(self.model, self.state.call)
        check_finite(self.model, "logits", scores.max(dim=-1).values)  # a single token may have −inf
        return scores


class _GenerationState:
    """The state of one `generate` call: its cache, and the prompt and padding that each forward gets.

    `first` is the position of the first own token, `pads [B]` the padding of each row, `max_padding` its maximum.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        prefix: Prefix | None,
        attention_mask: Tensor | None,
        prompt_index: Tensor | None,
    ) -> None:
        self.prefix, self.prompt_index = prefix, prompt_index
        if prefix is not None and prompt_index is None and prefix.rows > 1:
            self.prompt_index = torch.arange(prefix.rows, device=input_ids.device)
        self.first = first_position(prefix, self.prompt_index, input_ids)
        self.pads: Tensor | None = None
        self.max_padding = 0
        if attention_mask is not None and not bool((mask := attention_mask.to(input_ids.device).bool()).all()):
            if not is_right_padded(mask.flip(1)) or not bool(mask[:, -1].all()):
                raise SoftPromptError("attention_mask: got padding right of real tokens, accepted is left padding")
            self.pads = (~mask).sum(dim=1)
            self.max_padding = int(self.pads.max())
        self.cache = OwnCache(self.pads)
        self.call = Call(prefix)  # that of the last forward

    def inject(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]] | None:
        """Pre-hook of the model's forward.

        PyTorch registers and removes the hook and its `with_kwargs` flag in two steps. A forward of another thread
        between these steps calls the hook without keywords. The hook must then do nothing.
        """
        if kwargs is None or kwargs.get("past_key_values") is not self.cache:
            return None
        batch, queries = kwargs["input_ids"].shape
        keys = self.cache.get_seq_length() + queries
        self.call = self._call(batch, queries, keys)
        positions = kwargs["position_ids"] + _repeat_for_batch(self.first, batch)
        # `softprompt` carries the padding. Without an attention mask, transformers prepares none.
        return args, kwargs | {
            "position_ids": positions,
            "attention_mask": None,
            "softprompt": self.call,
        }

    def _call(self, batch: int, queries: int, keys: int) -> Call:
        """Prompt and padding of a forward of the last `queries` of `keys` columns, over `batch` rows."""
        index = None if self.prompt_index is None else _repeat_for_batch(self.prompt_index, batch)
        if self.pads is None:
            return Call(self.prefix, index)
        lengths = keys - _repeat_for_batch(self.pads, batch)
        placement = Placement.at_row_ends(lengths, keys, queries, self.max_padding)
        return Call(self.prefix, index, lengths, placement)


def _repeat_for_batch(tensor: Tensor, batch: int) -> Tensor:
    """One entry for each row that transformers made of the inputs. Beams and samples of an input are neighbours."""
    return tensor if tensor.shape[0] in (1, batch) else tensor.repeat_interleave(batch // tensor.shape[0], dim=0)


def _new_token_limit(model: PreTrainedModel, input_ids: Tensor, kwargs: dict[str, Any]) -> int:
    """How many tokens the call may add. The order of precedence is that of transformers."""

    def setting(name: str) -> int | None:
        sources = (kwargs.get(name), getattr(kwargs.get("generation_config"), name, None))
        return next((value for value in sources if value is not None), getattr(model.generation_config, name))

    new, total = setting("max_new_tokens"), setting("max_length")
    if new is not None:
        return new
    return _DEFAULT_NEW_TOKENS if total is None else max(total - input_ids.shape[1], 0)
