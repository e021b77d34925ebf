"""Train a KV prompt with accelerate (`pip install accelerate`): processes, accumulation, autocast, exact resume.

Only the prompt is given to `Accelerator.prepare`. With several processes it comes back in DistributedDataParallel, and
`prefix_of` takes it so. The frozen model is not wrapped. The loss is a sum over tokens. accelerate divides its gradient
by the number of processes and of accumulated batches. The loop undoes that and divides by the tokens of the whole step:

    gradient = Σ_processes Σ_batches Σ_tokens ∂KL / Σ_processes Σ_batches tokens

    python -m accelerate.commands.launch -m examples.accelerate_loop MODEL TEXT OUTPUT
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel

from examples.distributed_loop import teach_together
from examples.plain_loop import (
    PADDING,
    Example,
    Prompt,
    arguments,
    collate,
    first_tokens,
    load,
    loss_sum,
    numbered,
    passages,
    teach,
)
from softprompt_kernels import TeacherMoments
from softprompt_kernels.prompts import save


class Progress:
    """Where a training stands: finished epochs, batches of the current one, and the losses of all steps."""

    def __init__(self) -> None:
        self.epoch, self.batches = 0, 0
        self.losses: list[float] = []

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def make_accelerator(accumulate: int = 1, mixed_precision: str = "no", cpu: bool | None = None) -> Accelerator:
    """Gradients of `accumulate` batches a step, and an order of examples that a resumed training repeats.

    Without `cpu`, accelerate takes the processes of a machine that has no GPU for independent ones.
    """
    return Accelerator(
        cpu=not torch.cuda.is_available() if cpu is None else cpu,
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0),
    )


def save_state(accelerator: Accelerator, folder: Path) -> None:
    """Write the state to another folder, then give it the name `folder`: no crash leaves half a state under it."""
    new, old = (folder.with_name(folder.name + ending) for ending in (".new", ".old"))
    accelerator.save_state(new)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def train(
    accelerator: Accelerator,
    model: PreTrainedModel,
    prompt: Prompt,
    examples: Sequence[Example],
    moments: TeacherMoments,
    *,
    epochs: int = 1,
    batch_size: int = 4,
    learning_rate: float = 2e-2,
    checkpoint: Path | None = None,
    save_every: int = 100,
) -> list[float]:
    """Train `prompt` in place. Returns the mean loss of each step, in nats per token, over all processes.

    A batch is `batch_size` examples a process. If the folder `checkpoint` exists, the training goes on from there.
    accelerate repeats some examples where the batches cannot be divided among the processes.
    """
    dataset = cast(Dataset[Example], examples)  # a DataLoader takes any sequence
    loader: Any = DataLoader(dataset, batch_size, shuffle=True, collate_fn=collate)
    optimizer = torch.optim.AdamW(prompt.parameters(), learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    wrapped, optimizer, loader = accelerator.prepare(prompt, optimizer, loader)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if checkpoint is not None and checkpoint.exists():
        accelerator.load_state(checkpoint)
    loss = tokens = torch.zeros((), device=accelerator.device)
    for epoch in range(progress.epoch, epochs):
        loader.set_epoch(epoch)
        for batch in accelerator.skip_first_batches(loader, progress.batches):
            with accelerator.accumulate(wrapped):
                with accelerator.autocast():
                    part = loss_sum(model, wrapped, moments, batch)
                accelerator.backward(part)
                loss, tokens = loss + part.detach(), tokens + (batch[1] != PADDING).sum()
                if accelerator.sync_gradients:
                    loss, tokens = accelerator.reduce((loss, tokens))
                    for parameter in prompt.parameters():
                        parameter.grad *= accelerator.num_processes * accelerator.gradient_accumulation_steps / tokens
                optimizer.step()
                optimizer.zero_grad()
            progress.batches += 1
            if accelerator.sync_gradients:
                progress.losses.append(float(loss / tokens))
                loss = tokens = torch.zeros_like(loss)
                if checkpoint is not None and len(progress.losses) % save_every == 0:
                    save_state(accelerator, checkpoint)
        progress.epoch, progress.batches = epoch + 1, 0
    return progress.losses


def main() -> None:
    options = arguments("Train a KV prompt of 16 tokens for a text, with accelerate.")
    accelerator = make_accelerator()
    model, text = load(options.model, options.text)
    model, text = model.to(accelerator.device), text.to(accelerator.device)
    prompt, sequences = first_tokens(model, text, 16), passages(text)
    moments = (teach_together if dist.is_initialized() else teach)(model, text, sequences)
    losses = train(accelerator, model, prompt, numbered(sequences), moments, epochs=4)
    if accelerator.is_main_process:
        save(options.output, accelerator.unwrap_model(prompt), model=model)
        print(f"KL per token in the first step {losses[0]:.4f}, in the last {losses[-1]:.4f}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    main()
