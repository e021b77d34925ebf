"""The default device of the caller is not asked: what is made for the caller's tensors is made where these are."""

import pytest
import torch

from softprompt_kernels.models import (
    capture,
    embed_prefix,
    generate,
    prepare,
    prompted_logits,
    sample,
    shift_keys,
)
from softprompt_kernels.models.exactness import check_exactness
from softprompt_kernels.prompts import KVPrompt, PromptBank, initialise
from softprompt_kernels.prompts.fingerprint import model_fingerprint

RIGHT = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])

CALLS = {
    "capture": lambda model, ids, prefix: capture(model, ids, chunk_tokens=3).layers[1][0],
    "prompted_logits": lambda model, ids, prefix: prompted_logits(model, ids, prefix),
    "right padding": lambda model, ids, prefix: prompted_logits(model, ids, prefix, attention_mask=RIGHT)[1],
    "left padding": lambda model, ids, prefix: prompted_logits(model, ids, prefix, attention_mask=RIGHT.flip(1))[1],
    "embed_prefix": lambda model, ids, prefix: embed_prefix(model, prefix.layers[0][0][0, 0].repeat(1, 4)).layers[1][0],
    "bank": lambda model, ids, prefix: PromptBank([KVPrompt.from_prefix(prefix)] * 2).prefix().layers[0][0],
    "shift_keys": lambda model, ids, prefix: shift_keys(model, prefix, 3).layers[1][0],
    "random prefix": lambda model, ids, prefix: initialise.random_prefix(
        prefix, 4, generator=torch.Generator().manual_seed(0)
    ).layers[0][0],
    "strided tokens": lambda model, ids, prefix: initialise.strided_tokens(ids[0], 2),
    "vocabulary": lambda model, ids, prefix: initialise.vocabulary_tokens(
        61, 5, generator=torch.Generator().manual_seed(0)
    ),
    "random embedding": lambda model, ids, prefix: initialise.random_embedding(
        model.get_input_embeddings(), 61, 5, generator=torch.Generator().manual_seed(0)
    ),
    "generate": lambda model, ids, prefix: generate(model, ids, prefix, max_new_tokens=4, do_sample=False),
    "generate, padded": lambda model, ids, prefix: generate(
        model, ids, prefix, attention_mask=RIGHT.flip(1), max_new_tokens=4, do_sample=False
    ),
    "sample": lambda model, ids, prefix: torch.cat(
        [
            c.hidden
            for c in sorted(
                sample(model, [*ids.tolist(), [5]], prefix, new_tokens=4, end_tokens=[7], batch_size=2),
                key=lambda c: c.index,
            )
        ]
    ),
    "check": lambda model, ids, prefix: list(check_exactness(model, 8)),
    "fingerprint": lambda model, ids, prefix: model_fingerprint(model),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_the_default_device_changes_nothing(name, kind, build, tokens):
    model = build(kind)
    prepare(model)
    ids, prefix = tokens(2, 4), capture(model, tokens(1, 6, seed=1))
    expected = CALLS[name](model, ids, prefix)
    torch.set_default_device("meta")
    try:
        found = CALLS[name](model, ids, prefix)
    finally:
        torch.set_default_device(None)
    assert torch.equal(found, expected) if isinstance(found, torch.Tensor) else found == expected
