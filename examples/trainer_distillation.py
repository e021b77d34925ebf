"""transformers' Trainer, distilling a model into another, without the logits of either.

    python examples/trainer_distillation.py STUDENT TEACHER TEXTS OUTPUT

STUDENT and TEACHER are folders of models with one vocabulary, TEXTS has one text a line. The Trainer needs accelerate.
The lines that make the difference to a trainer with F.kl_div on logits are marked with `# changed`. Accumulation,
padding, autocast, gradient checkpointing, torch_compile, evaluation, load_best_model_at_end and resume are the
Trainer's own.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from softprompt_kernels import LinearKLDivLoss
from softprompt_kernels.models import Head, head_of


class DistillationTrainer(Trainer):
    """A Trainer whose loss is KL(teacher‖student) over the tokens that have a label."""

    def __init__(self, *arguments: Any, teacher: PreTrainedModel, temperature: float = 1.0, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.is_fsdp_enabled:
            raise ValueError("fsdp: got True, accepted is False (DDP): it shards the head, whose weight the loss reads")
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.temperature = temperature
        self.heads()  # refuses what cannot be served before the first step

    def heads(self) -> tuple[Head, Head]:
        """The heads of student and teacher."""
        student = self.accelerator.unwrap_model(self.model)
        student = student.get_base_model() if hasattr(student, "get_base_model") else student
        heads = head_of(student), head_of(self.teacher)
        if len({(head.softcap, head.logit_scale) for head in heads}) > 1 or any(h.bias is not None for h in heads):
            raise ValueError("student and teacher must have heads without a bias, with one softcap and logit scale")
        return heads

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = inputs["labels"][:, 1:]
        tokens = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}

        # changed: hidden states in place of logits. The model's own forward runs, so DDP, PEFT and compile see it.
        output = model(**tokens, output_hidden_states=True, logits_to_keep=1)
        student = output.hidden_states[-1][:, -labels.shape[1] - 1 : -1]
        with torch.no_grad():
            teacher = self.teacher.get_decoder()(**tokens).last_hidden_state[:, :-1]

        # changed: the loss of hidden states and heads. Padding and other tokens with label −100 are skipped.
        head, teacher_head = self.heads()
        loss_function = LinearKLDivLoss(
            temperature=self.temperature,
            reduction="mean" if num_items_in_batch is None else "sum",
            softcap=head.softcap,
            logit_scale=head.logit_scale,
        )
        loss = loss_function(student, head.weight, teacher, teacher_head.weight, labels)

        if num_items_in_batch is not None:  # tokens of all accumulated batches, in all processes
            loss = loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes  # DDP averages the gradients
        return (loss, {"loss": loss}) if return_outputs else loss


def main(student: str | Path, teacher: str | Path, texts: list[str], output: str | Path, **options: Any) -> Trainer:
    """Distils and saves. `options` are TrainingArguments."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = [{"input_ids": tokenizer(text, truncation=True, max_length=512)["input_ids"]} for text in texts]
    if len(rows) < 2:
        raise ValueError(f"texts: got {len(rows)}, accepted are 2 or more: a tenth is held out")
    held_out = max(1, len(rows) // 10)
    trainer = DistillationTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        TrainingArguments(str(output), **options),
        teacher=AutoModelForCausalLM.from_pretrained(teacher),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),  # labels: −100 at padding
        train_dataset=rows[held_out:],
        eval_dataset=rows[:held_out],
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Distil a teacher into a student.")
    for name in ("student", "teacher", "texts", "output"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    lines = [line for line in given.texts.read_text(encoding="utf-8").splitlines() if line.strip()]
    main(given.student, given.teacher, lines, given.output, learning_rate=1e-4, logging_steps=10)
