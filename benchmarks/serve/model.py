"""A random model with prompts in a folder, for a server that needs no download."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from softprompt_kernels.compress import load_model
from softprompt_kernels.models import capture
from softprompt_kernels.prompts import KVPrompt, save

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_model(folder: Path, layers: int, width: int) -> None:
    """A random Llama with a tokenizer of bytes. Its weights are large enough for inputs to change its answers."""
    words = Tokenizer(
        models.BPE({byte: index for index, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<|im_start|>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prompts_of(model_folder: Path, folder: Path, count: int) -> list[str]:
    """Prompts of different lengths: keys and values of random tokens. Their names."""
    model, tokenizer = load_model(str(model_folder))
    names = [f"prompt-{number}" for number in range(count)]
    for number, name in enumerate(names):
        draw = torch.Generator().manual_seed(number)
        tokens = torch.randint(0, 256, (1, 24 + 17 * number), generator=draw)
        save(folder / name, KVPrompt.from_prefix(capture(model, tokens)), model=model, tokenizer=tokenizer)
    return names
