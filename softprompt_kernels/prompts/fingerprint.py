"""Fingerprints of the model and tokenizer that a prompt belongs to. They are compared when a prompt is loaded.

A prompt works only with the weights that it was trained with. Another checkpoint of the same shape would load without
an error and give nonsense. The fingerprint therefore has the shape, the rotary settings, and hashes of a sample of the
weights: 64 evenly spaced elements of every parameter, including embedding and head, tied or not.

What a user changes without changing what a prompt means is no difference: more tokens behind the known ones, in the
model or in the tokenizer, and the tokens that the tokenizer calls its padding, end and so on. So the rows of the first
tokens are compared: as many as the prompt's model has, or, where that has more than this one, the largest power of two
that both have. Of a multimodal model, its text part counts.

Cost: milliseconds, for any size of model and any device. Weights that are offloaded are loaded one module at a time.

The comparison does not depend on the dtype. The sample is hashed twice, rounded to float16 and rounded to bfloat16, and
one equal hash is enough. A checkpoint that was cast to one of these types has the same hash of that type as the
original, because rounding twice to one type equals rounding once. (If an fp32 checkpoint is cast to bfloat16 in one
place and to float16 in another, the two share no hash: their weights differ by more than either rounding.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.prompts.offload import loaded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAMPLES = 64
"""Number of elements of each parameter in the hash of the weights."""

PROBE = "Naïve façade №5: 1234.5 km\n\tdef f(x): return x**2  # 你好, Привет!"
"""A text that tokenizers with one vocabulary but different rules (case, digits, spaces) split differently."""


def model_fingerprint(model: PreTrainedModel, saved: Any = None) -> dict[str, Any]:
    """The shape of a transformers model, its rotary settings, and hashes of a sample of its weights.

    Args:
        model: the model.
        saved: a fingerprint to compare with. If it has fewer tokens, the rows of the others are left out.

    Fields: `family`, `layers`, `hidden_size`, `attention_heads`, `kv_heads`, `head_dim`, `vocabulary`, `rope` (None
    without rotary embedding), `weights` and `body {"float16", "bfloat16"}` (SHA-256, hexadecimal; `body` is without
    embedding and head), `rows {"1", "2", "4", …}` (such hashes of the first rows of embedding and head), if rows were
    left out `all_tokens` (a number), and of a quantised model `quantization` ("bitsandbytes 4bit"). All values
    can be written as JSON.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    rope = getattr(config, "rope_parameters", None)
    fewer = fewer_tokens(saved, config.vocab_size)
    return {
        "family": config.model_type,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "attention_heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "vocabulary": fewer or config.vocab_size,
        "rope": json.loads(json.dumps(rope)) if rope else None,
        **weights_hashes(model, fewer),
        **({"all_tokens": config.vocab_size} if fewer else {}),
        **({"quantization": how} if (how := _quantization(model)) else {}),
    }


def _quantization(model: PreTrainedModel) -> str | None:
    """How the weights are quantised, such as "bitsandbytes 4bit"; None: they are not."""
    how = getattr(model.config, "quantization_config", None)
    if how is None or getattr(model, "hf_quantizer", None) is None:
        return None
    settings = how if isinstance(how, dict) else how.to_dict()
    method = settings.get("quant_method")
    bits = [
        f"{bits}bit" for bits in (8, 4) if settings.get(f"load_in_{bits}bit") or settings.get(f"_load_in_{bits}bit")
    ]
    kind = settings.get("quant_type")  # of torchao: its class, by name
    named = kind.get("default", {}).get("_type") if isinstance(kind, dict) else None
    return " ".join([str(getattr(method, "value", method)), *bits, *([named] if named else [])])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase, saved: Any = None) -> dict[str, Any]:
    """The size of the vocabulary, and hashes of its tokens and of the tokens of a probe text.

    Args:
        tokenizer: the tokenizer.
        saved: a fingerprint to compare with. If it has fewer tokens, those with the largest ids are left out.

    Fields: `vocabulary` (a number), `tokens`, `tokens_without_added`, `splitting` (SHA-256, hexadecimal), and, if some
    were left out, `others_added` (whether these are added tokens). The chat template and the names of special tokens
    are not included: they may change while all tokens keep their meaning.
    """
    everything, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    fewer = fewer_tokens(saved, len(tokenizer))
    ordered = sorted(everything.items(), key=lambda item: item[1])
    first, others = ordered[:fewer], ordered[fewer:] if fewer else []
    return {
        "vocabulary": fewer or len(tokenizer),
        "tokens": json_hash(sorted(first)),
        "tokens_without_added": json_hash(sorted(item for item in everything.items() if item[0] not in added)),
        "splitting": json_hash(tokenizer(PROBE, add_special_tokens=False)["input_ids"]),
        **({"others_added": all(token in added for token, _ in others)} if fewer else {}),
    }


def fewer_tokens(saved: Any, tokens: int) -> int | None:
    """The number of tokens of a saved fingerprint if it is less than `tokens`, else None."""
    known = saved.get("vocabulary") if isinstance(saved, dict) else None
    return known if type(known) is int and 0 < known < tokens else None


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """The differences of two fingerprints, one phrase per field, saved value first. Empty if they agree.

    If `saved` has more tokens than `now`, what does not depend on them is compared: the body and the first rows of a
    model, the tokens of a tokenizer without added ones. Where all tokens agree, some may be added ones in one of the
    two. Hashes of weights are compared only if all other fields agree: models of different
    shapes differ in them anyway.

    Args:
        saved: a fingerprint.
        now: one that was made to compare with it.
    """
    hashes, left_out = ["weights"], {"weights", "body", "rows", "all_tokens", "others_added"}
    same_tokens = saved.get("tokens") == now.get("tokens") and now.get("others_added", True)
    if same_tokens or "tokens_without_added" not in saved:
        left_out.add("tokens_without_added")
    known = saved.get("vocabulary")
    if type(known) is int and known > now.get("vocabulary", known) and {"body", "tokens_without_added"} & saved.keys():
        hashes, left_out = ["body", "rows"], {"weights", "body", "rows", "all_tokens", "vocabulary", "tokens"}
    if "weights" in now:
        now = {**now, "quantization": now.get("quantization")}  # a model in full precision has none
    phrases = [
        phrase
        for field, here in now.items()
        if field not in left_out
        for phrase in field_difference(field, saved, here)
    ]
    if "weights" in now and not phrases and not all(_same_hash(name, saved, now) for name in hashes):
        here = now.get("all_tokens", now.get("vocabulary"))
        shape = "the same shape" if known == here else f"{known} against {here} tokens, and those of both"
        phrases.append(f"weights ({shape} with other values)")
    return phrases


def _same_hash(name: str, saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether the two share a hash of `name`; of "rows", of the most rows. Older records have no "rows"."""
    there, here = saved.get(name), now.get(name)
    if name == "rows":
        if there is None:
            return True
        most = max(here, key=int) if here else None
        there, here = (rows.get(most) if isinstance(rows, dict) else None for rows in (there, here))
    if not isinstance(there, dict) or not isinstance(here, dict):
        return False
    return any(there.get(kind) == digest for kind, digest in here.items())


def as_recorded(saved: Any, now: dict[str, Any]) -> dict[str, Any]:
    """The saved fingerprint if `now`, made to compare with it, agrees, else `now`."""
    return saved if isinstance(saved, dict) and not differences(saved, now) else now


def field_difference(field: str, saved: dict[str, Any], here: Any) -> Iterator[str]:
    """One phrase for each difference in one field."""
    name = field.replace("_", " ")
    there = saved.get(field)
    if isinstance(here, dict) and isinstance(there, dict):
        # Compare only settings that both have: a later version of transformers may write an old default explicitly.
        for key in sorted(here.keys() & there.keys()):
            yield from (f"{name} {phrase}" for phrase in field_difference(key, there, here[key]))
    elif there != here:
        is_hash = isinstance(here, str) and len(here) == 64  # the digits of a hash are of no use in a message
        yield name if is_hash else f"{name} {there} against {here}"


@torch.no_grad()
def weights_hashes(model: PreTrainedModel, tokens: int | None) -> dict[str, dict[str, Any]]:
    """SHA-256 of a sample of all parameters ("weights") and of those without embedding and head ("body").

    Each once rounded to float16 and once to bfloat16. "rows" has the same of embedding and head, for each power of two
    of rows.

    Args:
        model: the model.
        tokens: how many rows of embedding and head count; None: all.
    """
    # Embedding and head come first, and both are sampled also if they are tied. `parameters()` lists a tied matrix
    # once and an untied copy twice; this way both give one hash.
    layers: list[Any] = [
        layer for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    ]
    ends = [layer.weight for layer in layers]
    biases = [bias for layer in layers if (bias := getattr(layer, "bias", None)) is not None]
    owners = {
        id(parameter): (f"{path}.{name}".lstrip("."), module, name)
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
    }

    def sample(parameter: Tensor, counts: Sequence[int | None] = (None,)) -> list[Tensor]:
        return _sample(parameter, counts, *owners.get(id(parameter), ()))

    # Before the first sample, because loading an offloaded weight replaces it.
    text = model if model.config.get_text_config() is model.config else model.get_decoder()
    parameters = list(text.parameters())
    parameters += [bias for bias in biases if not any(bias is parameter for parameter in parameters)]  # a wrapper's
    size = min((end.shape[0] for end in ends), default=0)
    powers = [2**power for power in range(min(tokens or size, size).bit_length())]
    counts = [tokens, *powers]  # a parameter is read once for all counts
    sampled_ends = [sample(end, counts) for end in ends]
    sampled = [all_rows for all_rows, *_ in sampled_ends]
    body = []
    for parameter in parameters:
        if any(parameter is bias for bias in biases):
            sampled_ends.append(sample(parameter, counts))
            sampled.append(sampled_ends[-1][0])
        elif not any(parameter is end for end in ends):
            body += sample(parameter)
            sampled.append(body[-1])
    rows = zip(*(few_rows for _, *few_rows in sampled_ends), strict=True)
    return {
        "weights": rounded_hashes(torch.cat(sampled)),
        "body": rounded_hashes(torch.cat(body)),
        "rows": {str(count): rounded_hashes(torch.cat(one)) for count, one in zip(powers, rows, strict=True)},
    }


def rounded_hashes(values: Tensor) -> dict[str, str]:
    """SHA-256 of numbers, once rounded to float16 and once to bfloat16."""
    # The values are fp32 for every dtype of parameter, so float64 and quantised integers are rounded in the same way.
    return {
        str(kind).removeprefix("torch."): hashlib.sha256(
            values.to(kind).view(torch.int16).numpy().astype("<i2").tobytes()
        ).hexdigest()
        for kind in (torch.float16, torch.bfloat16)
    }


def _sample(
    parameter: Tensor, counts: Sequence[int | None], path: str = "", module: nn.Module | None = None, name: str = ""
) -> list[Tensor]:
    """`sample_elements` of the first rows of a parameter, for each number of rows; None: all.

    It may be offloaded, and is `name` of a module at `path`.
    """
    if not parameter.is_meta:
        return [sample_elements(parameter if rows is None else parameter[:rows]) for rows in counts]
    if module is not None:
        with loaded(module):
            here: Tensor = getattr(module, name)
            if not here.is_meta:
                return [sample_elements(here[:rows]) for rows in counts]
    raise SoftPromptError(
        f"model: its parameter {path} is on the meta device, without numbers; accepted are parameters with numbers, "
        "or offloaded by accelerate"
    )


def sample_elements(parameter: Tensor) -> Tensor:
    """`SAMPLES` evenly spaced elements of a parameter, in fp32 on the CPU (repeated if it has fewer)."""
    parameter = parameter.detach()
    if hasattr(parameter, "tensor_data_names"):  # torchao's: integers and scales, of which few operations are known
        parameter = parameter.dequantize()
    flat = parameter.reshape(-1)
    if flat.numel() == 0:
        return torch.zeros(0, device="cpu")
    index = torch.arange(SAMPLES, device=flat.device) * flat.numel() // SAMPLES
    # Adding 0 turns −0 into 0. The two are equal, but have different bits and would have different hashes.
    return flat[index].float().cpu() + 0.0


def json_hash(value: Any) -> str:
    """SHA-256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
