"""Frozen models in 8 and 4 bits: quantised as they are loaded, or stored so (bitsandbytes, torchao).

    8bit    torchao: int8, one scale a row                            1 byte a weight
    4bit    bitsandbytes: NF4, blocks of 64 weights with one scale    .5 byte a weight

Weights alone are rounded, so the model computes the same behind a prefix and in one piece, and gradients go through the
weights as they are rounded. LLM.int8 of bitsandbytes rounds activations too: a rounding error before it can become a
whole step of int8, and `softprompt doctor` finds differences of some percent. Only folders that are stored so have it.

Embedding and head stay as they are stored, because the losses read the head's weight. Norms do too. The prompt is
trained in fp32. A quantised model is another model than the one in full precision: its teacher differs, and so does its
fingerprint, which says how it was quantised.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any, cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from softprompt_kernels.errors import SoftPromptError

BITS = {"8bit": "torchao", "4bit": "bitsandbytes"}
"""The values of `dtype` that quantise -> the package that does."""


def check_quantization(name: str, config: PreTrainedConfig, dtype: str) -> bool:
    """Whether the model will be quantised by bitsandbytes or torchao: as `dtype` says, or because it is stored so.

    Raises:
        SoftPromptError: it is stored quantised and shall be so again, or a package is missing.
    """
    method = stored_method(config)
    if dtype in BITS and method is not None:
        raise SoftPromptError(
            f"dtype: got {dtype} for {name!r}, which is stored quantised ({method}); accepted are auto, float32, "
            "bfloat16 and float16, in which it then computes"
        )
    package = BITS.get(dtype) or method
    if package is None or package not in BITS.values():
        return False
    missing = [each for each in (package, "accelerate") if find_spec(each) is None]
    if missing:
        what = f"dtype: got {dtype}" if dtype in BITS else f"model: {name!r} is stored quantised ({method})"
        raise SoftPromptError(
            f'{what}, for which {" and ".join(missing)} must be installed: pip install --editable ".[quantize]"'
        )
    return True


def stored_method(config: PreTrainedConfig) -> str | None:
    """How the weights of a model are stored quantised, as in its config.json; None: they are not."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(method, "value", method))


def loading_options(dtype: str, compute_dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Further arguments of `from_pretrained`: the weights are quantised as they come to the device."""
    # The log of LLM.int8 says for every layer and every call that activations are cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    options: dict[str, Any] = {"device_map": {"": device}}
    if dtype == "8bit":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        options["quantization_config"] = TorchAoConfig(Int8WeightOnlyConfig())
    elif dtype == "4bit":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=compute_dtype, bnb_4bit_quant_type="nf4"
        )
    return options


def keep_arithmetic(model: PreTrainedModel) -> None:
    """Make 4-bit layers compute the same with and without a gradient.

    On some CPUs bitsandbytes repacks a weight in the first run without a gradient, and then computes in bfloat16. The
    teacher, which runs so, would be another model than the student.
    """
    if find_spec("bitsandbytes") is None:
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            cast(Any, module).support_avx512bf16_for_cpu = False
