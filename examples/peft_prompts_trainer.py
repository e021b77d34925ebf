"""Train a PEFT prompt with transformers' Trainer, on this package's attention.

One line differs from the same script without the package: `patch(model)`. Losses and gradients stay those of PEFT
within rounding. A step takes less time and memory, because the batch shares one prompt, and PREFIX_TUNING and CARTRIDGE
also work with gradient checkpointing.

The arguments are those of transformers' TrainingArguments, and a few of the prompt:

    python examples/peft_prompts_trainer.py --model my-model --data my-texts.jsonl --kind PREFIX_TUNING \
        --output_dir my-prompt --learning_rate 0.02 --num_train_epochs 3 --gradient_checkpointing --bf16

The data has one {"text": "..."} a line. The last tenth of it is held out. The best prompt is kept in the output folder
as an ordinary PEFT adapter. The same command with `--resume` goes on from the last checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import CartridgeConfig, PeftModelForCausalLM, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from softprompt_kernels import patch

CONFIGS: dict[str, Any] = {
    "PREFIX_TUNING": PrefixTuningConfig,
    "CARTRIDGE": CartridgeConfig,
    "PROMPT_TUNING": PromptTuningConfig,
}


@dataclass
class PromptArguments:
    """What is trained, and on what."""

    model: str = field(metadata={"help": "name or folder of a causal language model"})
    data: Path = field(metadata={"help": 'file with one {"text": "..."} a line'})
    kind: str = field(default="PREFIX_TUNING", metadata={"choices": list(CONFIGS)})
    tokens: int = field(default=32, metadata={"help": "virtual tokens"})
    max_length: int = field(default=512, metadata={"help": "tokens of a text, the rest is cut off"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint in output_dir"})


def make_model(prompt: PromptArguments) -> PeftModelForCausalLM:
    """The frozen model with a fresh prompt."""
    base = AutoModelForCausalLM.from_pretrained(prompt.model)
    config = CONFIGS[prompt.kind](task_type="CAUSAL_LM", num_virtual_tokens=prompt.tokens)
    model = get_peft_model(base, config)
    patch(model)  # <- the one line: the batch shares the prompt
    return model


def read(prompt: PromptArguments, tokenizer: Any) -> tuple[list[Any], list[Any]]:
    """Tokenised texts for training, and the held-out last tenth."""
    lines = enumerate(prompt.data.read_text(encoding="utf-8").splitlines(), 1)
    texts = [text_of(line, number) for number, line in lines if line.strip()]
    rows = [tokenizer(text, truncation=True, max_length=prompt.max_length) for text in texts]
    if len(rows) < 2:
        raise ValueError(f"data: got {len(rows)} texts, accepted are 2 or more: a tenth is held out")
    held_out = max(1, len(rows) // 10)
    return rows[:-held_out], rows[-held_out:]


def text_of(line: str, number: int) -> str:
    """The text of one line of the data."""
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f'data: got {line[:80]!r} in line {number}, accepted is {{"text": "..."}}')
    return text


def make_trainer(prompt: PromptArguments, arguments: TrainingArguments) -> Trainer:
    """A Trainer of the library, as it is."""
    tokenizer = AutoTokenizer.from_pretrained(prompt.model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    train, held_out = read(prompt, tokenizer)
    trainer = Trainer(
        model=make_model(prompt),
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    if trainer.is_fsdp_enabled:
        raise ValueError("fsdp: got True, accepted is False (DDP): PEFT cannot save a prompt that is in shards")
    return trainer


def main(argv: list[str] | None = None) -> Trainer:
    """Train, keep the best prompt, and save it."""
    kinds: Any = (PromptArguments, TrainingArguments)
    parser: Any = HfArgumentParser(kinds)
    parser.set_defaults(
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        prediction_loss_only=True,  # the logits of a batch would otherwise be kept for the whole evaluation
        report_to="none",
    )
    prompt, arguments = parser.parse_args_into_dataclasses(argv)
    trainer = make_trainer(prompt, arguments)
    trainer.train(resume_from_checkpoint=prompt.resume)
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main()
