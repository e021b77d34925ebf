"""TRL's DistillationTrainer for a soft prompt of PEFT, with the loss from hidden states.

    python examples/trl_distillation.py STUDENT TEACHER PROMPTS OUTPUT

STUDENT and TEACHER are folders of models with one vocabulary (they may be one), PROMPTS has one prompt a line. The
student answers the prompts, and its distribution is pulled to the teacher's on its own answers. It needs TRL and
PEFT: `pip install ".[trl]"` in a checkout.

TRL refuses PEFT's prompts, because its loss calls the decoder and so goes past `PeftModel.forward`, which puts the
prompt in front. This subclass gives TRL the bare model, adds the prompt afterwards, and calls the whole model in the
loss. The lines that differ from TRL are marked with `# changed`.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PromptTuningConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DistillationConfig, DistillationTrainer

from softprompt_kernels import LinearKLDivLoss
from softprompt_kernels.models import head_of


class PromptDistillationTrainer(DistillationTrainer):
    """TRL's trainer, whose student is a frozen model behind a PEFT prompt. `args.beta` means what it means in TRL."""

    def __init__(self, model: PreTrainedModel, *arguments: Any, peft_config: PeftConfig, **options: Any) -> None:
        super().__init__(model, *arguments, **options)
        # changed: the prompt comes after TRL's check, and before the optimiser is made.
        prompted = get_peft_model(model, peft_config)
        self.model = self.model_wrapped = self.callback_handler.model = prompted

        self.teacher_model.eval()
        self.head, self.teacher_head = head_of(model), head_of(self.teacher_model)
        heads = (self.head, self.teacher_head)
        if len({(head.softcap, head.logit_scale) for head in heads}) > 1 or any(h.bias is not None for h in heads):
            raise ValueError("student and teacher must have heads without a bias, with one softcap and logit scale")

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if model.training and inputs.get("num_items_in_batch") is not None:  # tokens of all accumulated batches
            num_items_in_batch = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
        answers = inputs["completion_ids"].shape[1]
        tokens = {
            "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            "use_cache": False,
        }

        # changed: PeftModel.forward puts the prompt in front. Counting from the end leaves its positions out.
        student = model(**tokens, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
        with torch.no_grad():
            teacher = self.teacher_model.get_decoder()(**tokens).last_hidden_state
        counted = inputs["completion_mask"] * inputs.get("tool_mask", 1)

        # changed: our loss. It multiplies by T², TRL's does not.
        loss_function = LinearKLDivLoss(
            "jsd",
            beta=self.beta,
            temperature=self.temperature,
            reduction="mean" if num_items_in_batch is None else "sum",
            softcap=self.head.softcap,
            logit_scale=self.head.logit_scale,
        )
        loss = loss_function(
            student[:, -answers - 1 : -1],
            self.head.weight,
            teacher[:, -answers - 1 : -1],
            self.teacher_head.weight,
            weights=counted,
        )
        loss = loss / self.temperature**2
        loss = loss if num_items_in_batch is None else loss / num_items_in_batch
        return (loss, None) if return_outputs else loss


def main(
    student: str | Path,
    teacher: str | Path,
    prompts: list[str],
    output: str | Path,
    prompt_tokens: int = 16,
    **options: Any,
) -> PromptDistillationTrainer:
    """Trains a prompt and saves it as a PEFT adapter. `options` are those of DistillationConfig."""
    if len(prompts) < 2:
        raise ValueError(f"prompts: got {len(prompts)}, accepted are 2 or more: a tenth is held out")
    held_out = max(1, len(prompts) // 10)
    trainer = PromptDistillationTrainer(
        AutoModelForCausalLM.from_pretrained(student),
        AutoModelForCausalLM.from_pretrained(teacher),
        DistillationConfig(str(output), **options),
        Dataset.from_dict({"prompt": prompts[held_out:]}),
        Dataset.from_dict({"prompt": prompts[:held_out]}),
        processing_class=AutoTokenizer.from_pretrained(student, padding_side="left"),
        peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=prompt_tokens),
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a soft prompt with TRL's DistillationTrainer.")
    for name in ("student", "teacher", "prompts", "output"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    lines = [line for line in given.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
    bf16 = torch.cuda.is_available()  # TRL's default, which needs a GPU
    main(given.student, given.teacher, lines, given.output, learning_rate=1e-2, logging_steps=10, bf16=bf16)
