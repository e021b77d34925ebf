"""A tiny model with prompts of different lengths, and a server of it in a thread, which the tests of requests share."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import torch

from softprompt_kernels.compress import load_model
from softprompt_kernels.models import capture
from softprompt_kernels.prompts import EmbeddingPrompt, KVPrompt, Prefix, save
from softprompt_kernels.serve import Bank, Options, Server, Work, load_bank, named_prompts, serving

KEY = "a key"
LENGTHS = (5, 9, 14, 20, 27, 33, 40)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Of every test here."""


@pytest.fixture(scope="session")
def prompts(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with eight prompts: seven of keys and values, and one of vectors, which lies in the folder of a run."""
    folder = tmp_path_factory.mktemp("prompts")
    model, tokenizer = load_model(str(tiny_model_folder))
    for number, length in enumerate(LENGTHS):
        tokens = torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(number))
        prompt = KVPrompt.from_prefix(capture(model, tokens))
        save(folder / f"prompt-{number}", prompt, model=model, tokenizer=tokenizer)
    vectors = torch.randn(11, 32, generator=torch.Generator().manual_seed(99))
    (folder / "run").mkdir()
    save(folder / "run" / "prompt", EmbeddingPrompt(vectors), model=model, tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="session")
def bank(tiny_model_folder: Path, prompts: Path) -> Bank:
    """The model as "base", and the prompts by the names of their folders."""
    return load_bank(str(tiny_model_folder), named_prompts([], prompts), base_name="base")


def alone(bank: Bank, row: int) -> Prefix | None:
    """One row of the bank as a prefix of its own; None if it is empty."""
    assert bank.prefix is not None and bank.prefix.lengths is not None
    length = int(bank.prefix.lengths[row])
    pairs = ((key[row : row + 1, :, :length], value[row : row + 1, :, :length]) for key, value in bank.prefix.layers)
    return Prefix.of(pairs) if length else None


@pytest.fixture(scope="session")
def server(bank: Bank) -> Iterator[Server]:
    """A server with a key. Tests leave it empty."""
    with serving(bank, Options(key=KEY, most_bytes=20_000, most_tokens=300), Work(batch_size=16, queue=48)) as running:
        yield running


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's client of the server, with its key."""
    with openai.OpenAI(base_url=server.address, api_key=KEY, max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def http(server: Server) -> Iterator[httpx.Client]:
    """A plain client of the same server, with the key."""
    with httpx.Client(base_url=server.address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as made:
        yield made
