"""The backends that every op is tested on, and a tiny model on the disk for everything that starts from a folder."""

import os
import re
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.cuda.attention import HEAD_SIZES
from softprompt_kernels.kernels.cuda.native import DEVICE, HOST
from softprompt_kernels.kernels.triton import runtime as triton
from softprompt_kernels.ops import prompt_attention

BACKENDS = ("reference", "composed", "cpu", "triton", "simt")
FP32_BACKENDS = ("cpu", "triton", "simt", "cuda")
CUDA_KERNELS = ("simt", "cuda")  # on the host, and on a GPU
GPU = "triton on a GPU"
CUDA_GPU = "cuda on a GPU"
ON_A_GPU = {GPU: "triton", CUDA_GPU: "cuda"}
_REFUSED = (
    "backend='triton' cannot serve.*("
    "which Triton's interpreter computes wrongly|is 256 in float32, and it serves up to 128 there)"
)
_REFUSED_BY_CUDA = (
    "backend='(simt|cuda)' cannot serve this prompt_attention call: (simt|cuda): "
    "(sinks is given|cu_seqlens is given|the head sizes of query and value are (16|256)|"
    "query is torch.(float32|bfloat16))"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """What Triton's interpreter or CUDA's kernels cannot run is skipped, with the reason that the dispatcher gives."""
    try:
        return (yield)
    except Exception as error:  # opcheck wraps them
        reason = str(error)
        if (triton.interpreting() and re.search(_REFUSED, reason)) or re.search(_REFUSED_BY_CUDA, reason):
            pytest.skip(reason)
        raise


class Precision(NamedTuple):
    """What a backend computes in, and how close to float64 its results are to be."""

    dtype: torch.dtype
    tolerance: float


@pytest.fixture(params=[*BACKENDS, *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_A_GPU)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backends that run here: in Triton's interpreter, which is a process of its own, that one alone."""
    name = request.param
    if name == "cpu" and native.missing():
        pytest.skip(f"the cpu backend: {native.missing()}")
    if name == "simt" and HOST.missing():
        pytest.skip(f"the simt backend: {HOST.missing()}")
    if name == "triton" and not triton.interpreting():
        pytest.skip("the triton backend: set TRITON_INTERPRET=1 to run it on a CPU, in a process of its own")
    if name in ("triton", GPU) and triton.missing():
        pytest.skip(f"the triton backend: {triton.missing()}")
    if name in ON_A_GPU and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda finds none")
    if name == CUDA_GPU and DEVICE.missing():
        pytest.skip(f"the cuda backend: {DEVICE.missing()}")
    if name != "triton" and triton.interpreting():
        pytest.skip("tested without TRITON_INTERPRET")
    if name == "simt":
        HOST.module().seed(int(os.environ.get("SOFTPROMPT_SIMT_SEED", "0")))
    if name in ("simt", CUDA_GPU) and hasattr(request.module, "prompt_attention"):
        request.getfixturevalue("monkeypatch").setattr(request.module, "prompt_attention", _padded_attention)
    torch.manual_seed(0)
    with torch.device("cuda") if name in ON_A_GPU else nullcontext():  # where a test makes its tensors
        yield ON_A_GPU.get(name, name)


def _padded_attention(query, key, value, prompt_key, prompt_value, *, backend, scale=None, **options):
    """prompt_attention for tests of CUDA's kernels: heads padded to what they serve, and fp32 rounded to fp16."""
    if backend not in CUDA_KERNELS or not torch.is_tensor(query) or query.dtype not in (torch.float32, torch.float16):
        return prompt_attention(query, key, value, prompt_key, prompt_value, backend=backend, scale=scale, **options)
    size, value_size = query.shape[3], value.shape[3]
    if query.dtype == torch.float16 and size == value_size and size in HEAD_SIZES:
        return prompt_attention(query, key, value, prompt_key, prompt_value, backend=backend, scale=scale, **options)
    served = next((s for s in HEAD_SIZES if s >= max(size, value_size)), max(size, value_size))
    padded = [
        torch.nn.functional.pad(t.half(), (0, served - t.shape[3]))
        for t in (query, key, value, prompt_key, prompt_value)
    ]
    result = prompt_attention(*padded, backend=backend, scale=size**-0.5 if scale is None else scale, **options)
    out, *rest = result if isinstance(result, tuple) else (result,)
    out = out[..., :value_size].to(query.dtype)
    return (out, *rest) if rest else out


@pytest.fixture
def precision(backend: str, request: pytest.FixtureRequest) -> Precision:
    if backend in CUDA_KERNELS and hasattr(request.module, "prompt_attention"):
        return Precision(torch.float16, 4e-3)
    return Precision(torch.float32, 2e-5) if backend in FP32_BACKENDS else Precision(torch.float64, 1e-10)


TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (2 layers of width 32, 4 heads over 2, window 512, fp32) with a byte-level ChatML tokenizer.

    Its weights are large enough for what it reads to change what it predicts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=TEMPLATE,
        model_max_length=512,
    )
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
