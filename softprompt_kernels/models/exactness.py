"""The test whether a model is served: what it gives behind a prefix against its run over the concatenated sequence.

Each check runs the model as its authors wrote it, over context and input as one sequence, and once with the context as
a prefix. A family of this package passes them all in the tests, on tiny models. Here they run on a model of any size,
so the accepted difference is relative to the spread of its logits.

Cost: a dozen forwards over `context + 12` tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from softprompt_kernels.models.attention import Call
from softprompt_kernels.models.capture import capture, embed_prefix
from softprompt_kernels.models.families import rope_parameters, text_config
from softprompt_kernels.models.forward import prompted_logits, run_base
from softprompt_kernels.models.head import head_of
from softprompt_kernels.models.prepare import prepare, release
from softprompt_kernels.models.rope import LENGTH_DEPENDENT, shift_keys
from softprompt_kernels.prompts.prefix import Prefix

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
"""Accepted largest difference, in standard deviations of the exact values. Rounding grows with the model's depth."""

INPUT = 12  # tokens behind the context
SHIFT = 5  # positions


@dataclass(frozen=True)
class Check:
    """One comparison: what was compared, the largest difference and the largest that is accepted."""

    name: str
    difference: float
    accepted: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.difference <= self.accepted


@torch.no_grad()
def check_exactness(model: PreTrainedModel, context_tokens: int = 48) -> Iterator[Check]:
    """Compare the model behind a prefix with the concatenated run, one check after the other.

    Args:
        model: a prepared model in evaluation mode. It is prepared again at the end of each check.
        context_tokens: of random context. Only a context longer than the windows of the model's layers tests these.

    Raises:
        SoftPromptError: the model cannot run behind a prefix, or the sequence is longer than its window.
    """
    vocabulary = min(text_config(model).vocab_size, head_of(model).weight.shape[0])
    generator = torch.Generator("cpu").manual_seed(0)
    ids = torch.randint(vocabulary, (1, context_tokens + INPUT), generator=generator, device="cpu").to(model.device)
    context, own = ids[:, :context_tokens], ids[:, context_tokens:]
    prefix = capture(model, context)
    expected = _own_run(model, lambda: model(input_ids=ids, use_cache=False).logits[:, context_tokens:])
    yield _compare("logits behind a prefix", prompted_logits(model, own, prefix), expected)

    short = INPUT // 2
    mask = torch.ones(2, INPUT, dtype=torch.int64, device="cpu")
    mask[1, :short] = 0
    shifted = own.roll(short, dims=1)  # the second row: half padding, then the first half of the input
    batch = torch.cat([own, shifted])
    padded = prompted_logits(model, batch, prefix, attention_mask=mask)
    yield _compare("a padded batch", padded[mask.bool()], torch.cat([expected[0], expected[0, :short]]))

    chunked = capture(model, context, max(context_tokens // 2, 1))
    yield _compare("a context in chunks", prompted_logits(model, own, chunked), expected)

    embed = model.get_input_embeddings()
    vectors = embed(context[0].flip(0))
    joined = torch.cat([vectors[None], embed(own)], dim=1)
    expected = _own_run(model, lambda: model(inputs_embeds=joined, use_cache=False).logits[:, context_tokens:])
    yield _compare("an embedding prompt", prompted_logits(model, own, embed_prefix(model, vectors)), expected)

    settings = rope_parameters(text_config(model)).values()
    if settings and not any(one["rope_type"] in LENGTH_DEPENDENT for one in settings):
        moved, at_other = shift_keys(model, _capture_at(model, own, 0), SHIFT), _capture_at(model, own, SHIFT)
        pairs = zip(moved.layers, at_other.layers, strict=True)
        checks = [_compare("keys moved to other positions", one[0], other[0]) for one, other in pairs]
        yield next((check for check in checks if not check.passed), max(checks, key=lambda check: check.difference))


def _own_run(model: PreTrainedModel, run: Callable[[], Tensor]) -> Tensor:
    """What `run` gives with the model's own attention."""
    release(model)
    try:
        return run()
    finally:
        prepare(model)


def _compare(name: str, got: Tensor, expected: Tensor) -> Check:
    got, expected, dtype = got.double(), expected.double(), expected.dtype
    spread = float(expected.std())
    return Check(name, float((got - expected).abs().max()), spread * TOLERANCE[dtype])


class _Keys:
    """Keeps the keys and values of every layer."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def put(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.layers[layer] = (key, value)


def _capture_at(model: PreTrainedModel, ids: Tensor, first: int) -> Prefix:
    """Keys and values of `ids [1, M]` with the first token at position `first`."""
    keys = _Keys()
    positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
    run_base(model, Call(None, sink=keys), positions, input_ids=ids)
    return Prefix.of(keys.layers[index] for index in sorted(keys.layers))
