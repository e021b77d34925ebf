"""Tiny tokenizers of the kinds that people's models have, trained on a few lines."""

import json
import string
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

LINES = [
    "The mill is blue. It grinds 40 sacks a day, and the river turns it.\n\n",
    "def turn(self):\n    return self.river + 1\n\n",
    "Which colour has the mill? Answer from this text.\n\nQuestion: Why? Answer: Because.\n\n",
    "user assistant system model [INST] [/INST] <<SYS>> <</SYS>> <|user|> <|im_end|> thought final\n\n\n",
    "米拉看守蓝色的磨坊。它每天磨四十袋大麦。 Größe é ñ\n",
] * 3
KINDS = ("gpt2", "llama3", "first", "always", "unigram")
"""gpt2, llama3: bytes, with the splitting of GPT-2 or Llama 3. first, always: SentencePiece-like BPE, with a blank
before the first word of a text, or of every text between special tokens. unigram: the same as first, with Unigram."""
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerBase]:
    """`make_tokenizer(kind, special, template)`: `special` are the control tokens; options go to transformers."""
    return build


def build(kind: str, special: Sequence[str], template: str | None = None, **options: Any) -> PreTrainedTokenizerBase:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet: list[str] = []
    if kind in ("gpt2", "llama3"):
        words = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        words.pre_tokenizer = bytes_of if kind == "gpt2" else pre_tokenizers.Sequence([split, bytes_of])
        words.post_processor = processors.ByteLevel(trim_offsets=True)
        words.decoder = decoders.ByteLevel()
        begin, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    else:
        words = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        scheme = "always" if kind == "always" else "first"
        words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)])
        begin = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        alphabet = sorted({character for line in (*LINES, string.printable) for character in line})
    trainer = trainers.BpeTrainer(
        vocab_size=len(begin) + len(alphabet) + 150,
        special_tokens=begin,
        initial_alphabet=alphabet,
        max_token_length=12,
        show_progress=False,
    )
    words.train_from_iterator(LINES, trainer)
    saved = json.loads(words.to_str())
    saved["added_tokens"] = []  # the bytes are plain tokens of the vocabulary
    if kind == "unigram":
        pieces = [(token, -(9.0 + index / 64)) for token, index in words.get_vocab().items() if token not in begin]
        saved["model"] = {"type": "Unigram", "unk_id": 0, "vocab": [("<unk>", 0.0), *sorted(pieces)]}
    words = Tokenizer.from_str(json.dumps(saved))
    words.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=template, **options)
