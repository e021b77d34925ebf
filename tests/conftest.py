"""Which backends a test runs on, the list of skipped tests, and a tiny model on disk for what starts from a folder."""

import os
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import hypothesis
import pytest
import torch
from torch import Tensor

from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.kernels.cuda.attention import HEAD_SIZES
from softprompt_kernels.kernels.cuda.native import DEVICE, HOST
from softprompt_kernels.kernels.triton import runtime as triton
from softprompt_kernels.ops import prompt_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The same examples in each run: what a property test finds, a change has caused.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# --- backends ---------------------------------------------------------------------------------------------------------

BACKENDS = ("reference", "composed", "cpu", "triton", "simt")
CUDA_KERNELS = ("simt", "cuda")  # on the CPU, and on a GPU
ON_A_GPU = {"triton-gpu": "triton", "cuda": "cuda"}  # "triton" alone is Triton's interpreter


def backends_of_this_run() -> set[str]:
    """What this process can test. Triton's interpreter needs a process of its own; simt must have been built."""
    if triton.interpreting():
        return {"triton", *ON_A_GPU}
    return {"reference", "composed", "cpu", *ON_A_GPU} | ({"simt"} if not HOST.missing() else set())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what belongs to another run: other backends, and the tests inside or outside Triton's interpreter."""
    here, interpreting = backends_of_this_run(), triton.interpreting()

    def belongs(item: pytest.Item) -> bool:
        name = _backend_of(item)
        if name in (*BACKENDS, *ON_A_GPU) and name not in here:
            return False
        if item.get_closest_marker("interpreter") and (not interpreting or triton.missing()):
            return False
        if item.get_closest_marker("simt") and HOST.missing():
            return False
        return not (item.get_closest_marker("no_interpreter") and interpreting)

    kept = [item for item in items if belongs(item)]
    config.hook.pytest_deselected(items=[item for item in items if not belongs(item)])
    items[:] = kept


def _backend_of(item: pytest.Item) -> str | None:
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("backend")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """A test marked `refused` on its backend must be refused, for what the mark says, and fails if it is not."""
    name = _backend_of(item)
    marks = list(item.iter_markers("refused"))
    assert {backend for mark in marks for backend in mark.args} <= {*BACKENDS, *ON_A_GPU}
    mark = next((mark for mark in marks if name in mark.args), None)
    if mark is None:
        return (yield)
    try:
        yield
    except Exception as error:  # opcheck wraps the ValueError of ops/dispatch.py
        served = ON_A_GPU.get(str(name), name)
        if re.search(rf"backend='{served}' cannot serve this \w+ call: {served}: .*{mark.kwargs['match']}", str(error)):
            return None
        raise
    pytest.fail(f"{name} is marked as refusing this test, and ran it: remove the mark")


@pytest.fixture(params=[*BACKENDS, *(pytest.param(name, marks=pytest.mark.gpu) for name in ON_A_GPU)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend of this run."""
    name = request.param
    if name == "cpu" and native.missing():
        pytest.skip(f"the cpu backend: {native.missing()}")
    if name == "triton" and triton.missing():
        pytest.skip(f"the triton backend: {triton.missing()}")
    if name in ON_A_GPU and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda finds none")
    if name == "triton-gpu" and (triton.missing() or triton.interpreting()):
        pytest.skip(f"the triton backend: {triton.missing() or 'TRITON_INTERPRET is set'}")
    if name == "cuda" and DEVICE.missing():
        pytest.skip(f"the cuda backend: {DEVICE.missing()}")
    if name == "simt":
        HOST.module().seed(int(os.environ.get("SOFTPROMPT_SIMT_SEED", "0")))
    torch.manual_seed(0)
    with torch.device("cuda") if name in ON_A_GPU else nullcontext():  # where a test makes its tensors
        yield ON_A_GPU.get(name, name)


class Precision(NamedTuple):
    """What a backend computes in, and how close to float64 its results are to be."""

    dtype: torch.dtype
    tolerance: float


@pytest.fixture
def precision(backend: str) -> Precision:
    """Of the losses."""
    return Precision(torch.float64, 1e-10) if backend in ("reference", "composed") else Precision(torch.float32, 2e-5)


@pytest.fixture
def attention_precision(backend: str, precision: Precision) -> Precision:
    """Of attention, which the CUDA C++ kernels compute in 16 bits."""
    return Precision(torch.float16, 4e-3) if backend in CUDA_KERNELS else precision


@pytest.fixture
def attention(backend: str) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    """`prompt_attention` for small heads: on the CUDA C++ kernels, in fp16 and padded to a head size that they have."""
    return _padded_attention if backend in CUDA_KERNELS else prompt_attention


def _padded_attention(query, key, value, prompt_key, prompt_value, *, scale=None, **options):
    size, value_size = query.shape[3], value.shape[3]
    if query.dtype == torch.bfloat16:
        return prompt_attention(query, key, value, prompt_key, prompt_value, scale=scale, **options)
    head_size = next((s for s in HEAD_SIZES if s >= max(size, value_size)), max(size, value_size))
    padded = [
        torch.nn.functional.pad(t.half(), (0, head_size - t.shape[3]))
        for t in (query, key, value, prompt_key, prompt_value)
    ]
    result = prompt_attention(*padded, scale=size**-0.5 if scale is None else scale, **options)
    out, *rest = result if isinstance(result, tuple) else (result,)
    out = out[..., :value_size].to(query.dtype)
    return (out, *rest) if rest else out


# --- the list of skipped tests ----------------------------------------------------------------------------------------

SKIPS = Path(__file__).parent / "skips.toml"
UNLISTED = pytest.StashKey[list[str]]()


def unlisted_skips(reasons: list[str]) -> list[str]:
    """What is wrong with these skips: reasons that skips.toml does not have, and more of one than it allows."""
    listed = tomllib.loads(SKIPS.read_text(encoding="utf-8"))["skip"]
    found: Counter[str] = Counter()
    wrong = []
    for reason in reasons:
        entry = next((entry for entry in listed if re.search(entry["reason"], reason)), None)
        if entry is None:
            wrong.append(f"a test is skipped for a reason that is not in tests/skips.toml: {reason}")
        else:
            found[entry["reason"]] += 1
    for entry in listed:
        if found[entry["reason"]] > entry["at_most"]:
            count = f"{found[entry['reason']]} tests are skipped, and tests/skips.toml allows {entry['at_most']}"
            wrong.append(f"{count}: {entry['reason']}")
    return list(dict.fromkeys(wrong))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run that skips more than the list allows."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if hasattr(session.config, "workerinput") or reporter is None:
        return
    reasons = [report.longrepr[2] for report in reporter.stats.get("skipped", ()) if isinstance(report.longrepr, tuple)]
    session.config.stash[UNLISTED] = unlisted_skips(reasons)
    if session.config.stash[UNLISTED] and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(UNLISTED, []):
        terminalreporter.write_line(line, red=True)


# --- a tiny model -----------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Signals do what they do in a terminal, also where the tests are started by nohup or in the background."""
    import signal

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number in before:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread for PyTorch. At the sizes of tests more threads are slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


@pytest.fixture(scope="session")
def loaded(tiny_model_folder: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """The tiny model and its tokenizer, in memory."""
    from softprompt_kernels.compress import load_model  # tests of kernels need no transformers

    return load_model(str(tiny_model_folder), "float32", "cpu")


@pytest.fixture(scope="session")
def model(loaded: "tuple[PreTrainedModel, PreTrainedTokenizerBase]") -> "PreTrainedModel":
    return loaded[0]


@pytest.fixture(scope="session")
def tokenizer(loaded: "tuple[PreTrainedModel, PreTrainedTokenizerBase]") -> "PreTrainedTokenizerBase":
    return loaded[1]
