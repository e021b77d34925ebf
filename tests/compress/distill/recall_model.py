"""A transformer of two layers that recalls: constructed, not trained. A context holds pairs of a key and a value, a
query ends with a key, and the answer is its value.

    residual   x = [ cur | prev | out | const ]     a token's embedding e(t), of norm 1, stands in `cur`
    layer 1    head 0 attends to the token before (rotary dimensions alone) and copies its `cur` to `prev`
    layer 2    finds the token whose `prev` is the query's `cur` (the other dimensions), and copies its `cur` to `out`
    head       logits = g ⟨e(v), out⟩

So behind "k" a context with "… k v …" gives v. Embeddings are random directions of `WIDTH` dimensions, and there are
more tokens than dimensions: v gets a third to a half of the probability, and the rest is spread over all other tokens
by their likeness to v. So the tail depends on the context too. A loss that ignores the mass of the tail can lower the
tail as far as `const` allows: the final LayerNorm divides by the norm of all four parts.

Both halves of `out` have an attention head of their own. It is a GPT-NeoX: part of its dimensions rotate, and its
queries and keys have biases. The MLPs are zero.

`python -m tests.compress.distill.recall_model FOLDER SEED` writes the model and a task, to try commands on.
"""

import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from softprompt_kernels.compress.sources.chat import INSTRUCTION

WIDTH, HEADS, HIDDEN = 40, 2, 128
ROTARY, ROTARY_BASE = 16, 10.0
CONST = 6.0  # norm of the constant part
PREVIOUS, MATCH, LOGIT = 20.0, 10.0, 7.0  # scores of both kinds of attention, and the logit of the answer
KEYS, VALUES, FILLERS = ([f"{kind}{i}" for i in range(count)] for kind, count in (("k", 32), ("v", 64), ("f", 1000)))
SPECIAL = ("<bos>", "<end>", "<unk>")


@dataclass(frozen=True)
class RecallTask:
    """A context, and what to ask.

    Args:
        pairs: value by key.
        context: the pairs, with other words around them.
        train, heldout: queries, a word and a key each. Both ask for every key, behind different words.
    """

    pairs: dict[str, str]
    context: str
    train: tuple[str, ...]
    heldout: tuple[str, ...]

    @classmethod
    def of(cls, seed: int = 0, pairs: int = 7, words: int = 40, wordings: int = 4) -> "RecallTask":
        """A task of `pairs` pairs between `words` other words; each key is asked for in `wordings` ways, and held out
        in two more."""
        draw = random.Random(seed)
        chosen = dict(zip(draw.sample(KEYS, pairs), draw.sample(VALUES, pairs), strict=True))
        parts = [*([key, value] for key, value in chosen.items()), *([draw.choice(FILLERS)] for _ in range(words))]
        draw.shuffle(parts)
        context = " ".join(word for part in parts for word in part)
        asked = {key: draw.sample(FILLERS, wordings + 2) for key in chosen}
        train = tuple(f"{word} {key}" for key in chosen for word in asked[key][:wordings])
        return cls(chosen, context, train, tuple(f"{word} {key}" for key in chosen for word in asked[key][wordings:]))

    def write(self, folder: Path) -> dict[str, Path]:
        """Write context, training and held-out queries; they are returned as fields of a CompressConfig."""
        files = {name: folder / f"{name}.txt" for name in ("context", "queries", "heldout")}
        files["context"].write_text(self.context)
        for name, queries in (("queries", self.train), ("heldout", self.heldout)):
            files[name].write_text("".join(json.dumps({"input": query}) + "\n" for query in queries))
        return files


def recall_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; a chat is the words of its turns, and an answer ends with "<end>"."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL, *INSTRUCTION.split(), *KEYS, *VALUES, *FILLERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}<bos> {% endif %}{{ m['content'] }} "
        "{% if m['role'] == 'assistant' %}<end> {% endif %}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<end>",
        pad_token="<end>",
        unk_token="<unk>",
        chat_template=template,
        model_max_length=512,
    )


def recall_model(vocabulary: int, seed: int = 0) -> GPTNeoXForCausalLM:
    """The model for this many tokens; `seed` draws their embeddings."""
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=HIDDEN,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=512,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": ROTARY_BASE,
            "partial_rotary_factor": ROTARY * HEADS / HIDDEN,
        },
        use_parallel_residual=False,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    model = GPTNeoXForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    embedding = torch.randn(vocabulary, WIDTH, generator=torch.Generator().manual_seed(seed))
    embedding -= embedding.mean(dim=1, keepdim=True)  # LayerNorm's mean is then 0
    embedding /= embedding.norm(dim=1, keepdim=True)
    cur, prev, out = (slice(i * WIDTH, (i + 1) * WIDTH) for i in range(3))
    constant = HIDDEN - 3 * WIDTH
    model.get_input_embeddings().weight[:, cur] = embedding
    model.get_input_embeddings().weight[:, 3 * WIDTH :] = (
        CONST / math.sqrt(constant) * torch.tensor([1.0, -1.0]).repeat(constant // 2)
    )
    model.get_output_embeddings().weight[:, out] = LOGIT / _scale(3) * embedding
    one, two = (layer.attention for layer in model.gpt_neox.layers)
    _attend_to_token_before(one.query_key_value.bias)
    head_size = HIDDEN // HEADS
    values = slice(2 * head_size, 2 * head_size + WIDTH)
    one.query_key_value.weight[values, cur] = torch.eye(WIDTH) / _scale(1)
    one.dense.weight[prev, :WIDTH] = torch.eye(WIDTH)
    strength = math.sqrt(MATCH * math.sqrt(head_size)) / _scale(2)
    for head in range(HEADS):
        query, key, value = (head * 3 * head_size + part * head_size for part in range(3))
        half = slice(head * WIDTH // HEADS, (head + 1) * WIDTH // HEADS)
        content = slice(ROTARY, ROTARY + WIDTH)
        two.query_key_value.weight[query:][content, cur] = strength * torch.eye(WIDTH)
        two.query_key_value.weight[key:][content, prev] = strength * torch.eye(WIDTH)
        two.query_key_value.weight[value : value + WIDTH // HEADS, cur] = torch.eye(WIDTH)[half] / _scale(2)
        two.dense.weight[out, head * head_size : head * head_size + WIDTH // HEADS] = torch.eye(WIDTH)[:, half]
    return model


def save_recall_model(folder: Path) -> Path:
    """Model and tokenizer in transformers' layout."""
    tokenizer = recall_tokenizer()
    recall_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _scale(parts: int) -> float:
    """What LayerNorm multiplies by, where so many parts of norm 1 stand beside the constant one."""
    return math.sqrt(HIDDEN / (parts + CONST**2))


def _attend_to_token_before(bias: Tensor) -> None:
    """Set queries and keys of head 0: scores PREVIOUS · mean of cos(ω (distance − 1)) over the rotary frequencies ω."""
    half, head_size = ROTARY // 2, HIDDEN // HEADS
    frequencies = ROTARY_BASE ** (-torch.arange(half) / half)
    size = math.sqrt(PREVIOUS * math.sqrt(head_size) / half)
    bias[:half] = size * frequencies.cos()  # of the query, turned back by one position
    bias[half:ROTARY] = -size * frequencies.sin()
    bias[head_size : head_size + half] = size  # of the key


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    save_recall_model(folder / "model")
    RecallTask.of(int(sys.argv[2])).write(folder)
