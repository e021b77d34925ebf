"""The backends that every op is tested on, and a tiny model on the disk for everything that starts from a folder."""

import re
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.cuda.native import HOST
from softprompt_kernels.kernels.triton import runtime as triton

BACKENDS = ("reference", "composed", "cpu", "triton", "simt")
FP32_BACKENDS = ("cpu", "triton", "simt")
GPU = "triton on a GPU"
_REFUSED = (
    "backend='triton' cannot serve.*("
    "which Triton's interpreter computes wrongly|is 256 in float32, and it serves up to 128 there)"
)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """What Triton's interpreter cannot run is skipped, with the reason that the dispatcher gives."""
    try:
        return (yield)
    except Exception as error:  # opcheck wraps them
        reason = str(error)
        if triton.interpreting() and re.search(_REFUSED, reason):
            pytest.skip(reason)
        raise


class Precision(NamedTuple):
    """What a backend computes in, and how close to float64 its results are to be."""

    dtype: torch.dtype
    tolerance: float


@pytest.fixture(params=[*BACKENDS, pytest.param(GPU, marks=pytest.mark.gpu)])
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
    if name == GPU and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda finds none")
    if name != "triton" and triton.interpreting():
        pytest.skip("tested without TRITON_INTERPRET")
    torch.manual_seed(0)
    with torch.device("cuda") if name == GPU else nullcontext():  # where a test makes its tensors
        yield "triton" if name == GPU else name


@pytest.fixture
def precision(backend: str) -> Precision:
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
