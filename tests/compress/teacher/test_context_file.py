"""A context whose keys and values go to a file while they are computed, or are kept in 16 bits."""

import errno
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from softprompt_kernels.compress.reporter import Advance, SilentReporter
from softprompt_kernels.compress.teacher import context as module
from softprompt_kernels.compress.teacher.context import ContextStorage, capture_context
from softprompt_kernels.compress.teacher.context_file import ContextFile
from softprompt_kernels.errors import SoftPromptError
from softprompt_kernels.kernels.cpu import native
from softprompt_kernels.models import MemoryStore, capture, prepare, prompted_logits
from softprompt_kernels.ops import prompt_attention
from softprompt_kernels.prompts import Prefix

TOKENS, CHUNK = 40, 7
FED = 1  # tokens of the forward that gives the shapes


class Messages(SilentReporter):
    """Keeps messages, and calls `each` with the tokens that are done after every chunk."""

    def __init__(self, each: Callable[[int], None] = lambda done: None) -> None:
        self.messages: list[str] = []
        self.each = each

    def message(self, text: str) -> None:
        self.messages.append(text)

    @contextmanager
    def progress(self, description: str, total: int, unit: str) -> Iterator[Advance]:
        done = 0

        def advance(count: int, **figures: float) -> None:
            nonlocal done
            done += count
            self.each(done)

        yield advance


@pytest.fixture(autouse=True)
def _chunks(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """Seven tokens go through the model at once."""
    monkeypatch.setattr(module, "CAPTURE_TOKENS", CHUNK)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 250, (1, TOKENS), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "context.safetensors"


@pytest.fixture
def fed(model: PreTrainedModel) -> Iterator[list[int]]:
    """The tokens of each forward of the model."""
    counts: list[int] = []
    layer: Any = model.get_input_embeddings()
    hook = layer.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    yield counts
    hook.remove()


def same(one: Prefix, other: Prefix) -> bool:
    """Whether all keys and values are equal, bit for bit."""
    pairs = zip(one.layers, other.layers, strict=True)
    return one.dtype == other.dtype and all(torch.equal(a, b) for x, y in pairs for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("behind", [0, 5])
def test_a_file_holds_the_bits_of_memory(
    model: PreTrainedModel, ids: Tensor, path: Path, dtype: torch.dtype | None, behind: int
) -> None:
    before = capture(model, ids[:, :behind]) if behind else None
    in_memory = capture_context(model, ids, before=before, storage=ContextStorage(dtype))
    on_disk = capture_context(model, ids, before=before, storage=ContextStorage(dtype, path))
    assert on_disk.length == TOKENS + behind
    assert same(on_disk, in_memory)
    assert os.listdir(path.parent) == [path.name]
    stored = load_file(path)
    assert torch.equal(stored["key.1"], in_memory.layers[1][0])
    assert torch.equal(stored["value.0"], in_memory.layers[0][1])


def test_chunks_give_what_one_run_gives(model: PreTrainedModel, ids: Tensor, path: Path) -> None:
    whole = capture(model, ids)
    in_chunks = capture_context(model, ids, storage=ContextStorage(file=path))
    for pair, expected in zip(in_chunks.layers, whole.layers, strict=True):
        torch.testing.assert_close(pair, expected)


def test_a_complete_file_is_read_back(model: PreTrainedModel, ids: Tensor, path: Path, fed: list[int]) -> None:
    first = capture_context(model, ids, storage=ContextStorage(file=path))
    fed.clear()
    assert same(capture_context(model, ids, storage=ContextStorage(file=path)), first)
    assert sum(fed) == FED


def test_an_interrupted_capture_goes_on_at_its_chunk_with_the_same_bits(
    model: PreTrainedModel, ids: Tensor, path: Path, fed: list[int]
) -> None:
    def stop(done: int) -> None:
        if done == 3 * CHUNK:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture_context(model, ids, storage=ContextStorage(file=path, reporter=Messages(stop)))
    assert not path.exists(), "the name says that it is complete"
    fed.clear()
    reporter, expected = Messages(), capture_context(model, ids)
    fed.clear()
    assert same(capture_context(model, ids, storage=ContextStorage(file=path, reporter=reporter)), expected)
    assert sum(fed) == FED + TOKENS - 3 * CHUNK
    assert reporter.messages == [f"Resuming the context from token {3 * CHUNK} of {TOKENS}."]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"made_from": {"model": "b", "tokenizer": "a"}}, "another model,"),
        ({"made_from": {"model": "a", "tokenizer": "b"}}, "another tokenizer,"),
        ({"dtype": torch.bfloat16}, "another dtype,"),
        ({"ids": slice(0, TOKENS - 1)}, "another context and total,"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_of_something_else_is_named_and_made_again(
    model: PreTrainedModel, ids: Tensor, path: Path, change: dict[str, Any], words: str
) -> None:
    ours = {"model": "a", "tokenizer": "a"}
    capture_context(model, ids, storage=ContextStorage(file=path, made_from=ours))
    reporter, ids = Messages(), ids[:, change.pop("ids", slice(None))]
    storage = ContextStorage(**{"file": path, "made_from": ours, "reporter": reporter, **change})
    found = capture_context(model, ids, storage=storage)
    assert same(found, capture_context(model, ids, storage=ContextStorage(storage.dtype)))
    assert reporter.messages == [f"{path} was made with {words.rstrip(',')}, and is made again."]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "is damaged or cut off"),
        (lambda data: data[:100], "cannot be read"),
        (lambda data: b"", "cannot be read"),
        (lambda data: b"\xff" * len(data), "cannot be read"),
        (lambda data: data.replace(b'"filled": "000000000040"', b'"filled": "000000000012"'), "is damaged or cut off"),
    ],
)
def test_a_damaged_file_is_made_again(
    model: PreTrainedModel, ids: Tensor, path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    expected = capture_context(model, ids)
    capture_context(model, ids, storage=ContextStorage(file=path))
    path.write_bytes(damage(path.read_bytes()))
    reporter = Messages()
    assert same(capture_context(model, ids, storage=ContextStorage(file=path, reporter=reporter)), expected)
    assert reporter.messages == [f"{path} {words}, and is made again."]


def test_a_full_disk_is_found_before_the_work(
    model: PreTrainedModel, ids: Tensor, path: Path, fed: list[int], full_disk: Any
) -> None:
    with full_disk(5000), pytest.raises(SoftPromptError, match=r"has no room .*: \S+ kB are needed, \S+ \wB are free"):
        capture_context(model, ids, storage=ContextStorage(file=path))
    assert sum(fed) == FED
    assert os.listdir(path.parent) == []


def test_what_a_disk_took_before_it_was_full_is_kept(
    model: PreTrainedModel, ids: Tensor, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    def sync(file: int) -> None:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", sync)
        with pytest.raises(SoftPromptError, match="has no room"):
            capture_context(model, ids, storage=ContextStorage(file=path))
    reporter = Messages()
    capture_context(model, ids, storage=ContextStorage(file=path, reporter=reporter))
    assert reporter.messages == [f"Resuming the context from token {2 * CHUNK} of {TOKENS}."]


def test_a_folder_that_cannot_be_written_to_is_refused(model: PreTrainedModel, ids: Tensor, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SoftPromptError, match=r"output: .* cannot be written"):
        capture_context(model, ids, storage=ContextStorage(file=tmp_path / "file" / "context.safetensors"))


def test_keys_that_float16_cannot_hold_are_refused(model: PreTrainedModel, path: Path) -> None:
    large = torch.full((1, 2, 3, 8), 1e5)
    with pytest.raises(SoftPromptError, match="context_dtype: got float16"):
        MemoryStore(3, torch.float16, "context_dtype").put(0, large, large)
    MemoryStore(3, torch.bfloat16).put(0, large, large)


def test_sixteen_bits_change_the_teacher_a_little(model: PreTrainedModel, ids: Tensor, path: Path) -> None:
    exact = capture_context(model, ids)
    rounded = capture_context(model, ids, storage=ContextStorage(torch.bfloat16, path))
    assert rounded.nbytes == exact.nbytes // 2
    one, other = (prompted_logits(model, ids[:, :5], prefix).log_softmax(-1) for prefix in (exact, rounded))
    assert one.dtype == other.dtype == torch.float32, "the model computes as before"
    assert 0 < float((one - other).abs().max()) < 0.1


# --- memory -----------------------------------------------------------------------------------------------------------


def status(name: str) -> int:
    """Bytes of this process. RssAnon: its own pages, without those of files, which the system can drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the memory counts of Linux")
def test_the_memory_of_a_capture_on_disk_does_not_grow_with_the_context(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CAPTURE_TOKENS", 512)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 256, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=4096)
    model: Any = LlamaForCausalLM(config).eval().requires_grad_(False)
    prepare(model)
    found: dict[int, int] = {}
    reporter = Messages(lambda done: found.update({done: status("RssAnon")}))
    ids = torch.randint(0, 50, (1, 4096))
    context = capture_context(model, ids, storage=ContextStorage(file=path, reporter=reporter))
    written = context.nbytes * (4096 - 1024) // 4096
    assert written > 8 << 20
    assert found[4096] - found[1024] < written // 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs the memory counts of Linux")
def test_attention_reads_a_mapped_context_without_a_copy(path: Path) -> None:
    if native.missing():
        pytest.skip(f"the cpu backend: {native.missing()}")
    import resource

    tokens, width = 1 << 18, 40  # keys of 42 MB: malloc always asks the system for a block of more than 32 MiB
    one = torch.zeros(1, 1, 1, width)
    file = ContextFile(path, {}, Prefix.of([(one, one)]), tokens, torch.float)
    some = torch.randn(1, 1, tokens // 8, width)
    for _ in range(8):
        file.put(0, some, some)
        file.advance(tokens // 8)
    file.close()
    key, value = file.prefix().layers[0]
    query = torch.randn(2, 2, 3, width)
    none = torch.zeros(2, 1, 0, width)
    prompt_attention(query, none, none, key[:, :, :64], value[:, :, :64], causal=False)  # makes the threads' buffers
    used, before = status("VmData"), resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + key.nbytes // 2, before[1]))  # no room for a copy of the keys
    try:
        for part in (slice(None), slice(0, tokens - 5)):  # the second is not contiguous
            prompt_attention(query, none, none, key[:, :, part], value[:, :, part], causal=False)
        with pytest.raises(RuntimeError, match="memory"):
            key.clone()
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def test_the_header_is_padded_to_a_page(model: PreTrainedModel, ids: Tensor, path: Path) -> None:
    capture_context(model, ids, storage=ContextStorage(file=path))
    with path.open("rb") as file:
        count = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(count))
    assert (8 + count) % 4096 == 0
    assert header["__metadata__"]["filled"] == f"{TOKENS:012d}"
